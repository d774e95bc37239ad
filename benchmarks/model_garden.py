"""Compares our SpineNet-49 RetinaNet at 256 px with TensorFlow Model Garden's, in one run.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install tf-models-official
    python benchmarks/model_garden.py /tmp/peer/bin/python [ROUNDS]

The two run in turn, each in a process of its own. Printed are medians over the rounds: CPU seconds
to build the network, for a forward pass of one image (network only) and for a training step of two
images, and peak memory. Our step includes matching the anchors, which Model Garden does in its
input pipeline.
"""

import math
import statistics
import sys
import time

import harness

SIZE, REPEATS = 256, 5


def built(function):
    """CPU seconds of a call, and its result."""
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def ours():
    import tensorflow as tf
    import train_step

    from official_selftrain import config
    from official_selftrain.engine import distribution
    from official_selftrain.pipeline import training
    from official_selftrain.tasks import make_task

    overrides = [f"task.image_size=[{SIZE},{SIZE}],task.bn_synchronized=false"]
    settings = config.resolve("coco_spinenet49", overrides=overrides)
    distribution.make_distribution(settings.runtime)
    task = make_task(settings.task)
    build, trainer = built(lambda: training.make_trainer(settings, task))
    images, data = train_step.batch(task, 1)[0]["human"], train_step.batch(task, 2)
    forward = tf.function(lambda: trainer.student(images, training=False), autograph=False)
    step = tf.function(lambda: trainer.train_step(data), autograph=False)
    return build, forward, step, trainer.student


def peer():
    import tensorflow as tf
    import tf_keras
    from official.vision.configs import backbones, common, decoders
    from official.vision.configs import retinanet as configs
    from official.vision.tasks.retinanet import RetinaNetTask

    model_config = configs.RetinaNet(
        num_classes=91,
        input_size=[SIZE, SIZE, 3],
        backbone=backbones.Backbone(
            type="spinenet", spinenet=backbones.SpineNet(model_id="49", max_level=7)
        ),
        decoder=decoders.Decoder(type="identity", identity=decoders.Identity()),
        head=configs.RetinaNetHead(num_convs=4, num_filters=256),
        norm_activation=common.NormActivation(activation="swish", use_sync_bn=False),
    )
    task = RetinaNetTask(configs.RetinaNetTask(model=model_config))

    def make():
        model = task.build_model()
        model(tf_keras.Input([SIZE, SIZE, 3]), training=True)  # creates the variables of the head
        optimizer = tf_keras.optimizers.SGD(0.01, momentum=0.9)
        optimizer.build(model.trainable_variables)
        return model, optimizer

    build, (model, optimizer) = built(make)
    images = tf.random.normal([2, SIZE, SIZE, 3])
    levels = {str(level): -(-SIZE // 2**level) for level in range(3, 8)}
    anchors = 9 * sum(side**2 for side in levels.values())
    labels = {
        "cls_targets": {k: -tf.ones([2, s, s, 9], tf.int32) for k, s in levels.items()},
        "box_targets": {k: tf.zeros([2, s, s, 36]) for k, s in levels.items()},
        "cls_weights": tf.ones([2, anchors]),
        "box_weights": tf.zeros([2, anchors]),
    }

    @tf.function
    def forward():
        features = model.backbone(images[:1], training=False)
        return model.head(features, training=False)

    step = tf.function(lambda: task.train_step((images, labels), model, optimizer))
    return build, forward, step, model


def measure(side):
    build, forward, step, model = {"ours": ours, "peer": peer}[side]()
    row = {
        "build": build,
        "forward": harness.timed(forward, REPEATS).cpu,
        "step": harness.timed(step, REPEATS).cpu,
        "gigabytes": harness.peak_megabytes() / 2**10,
        "parameters": sum(math.prod(weight.shape) for weight in model.weights),
    }
    harness.report(row)


def main():
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    rows = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, python in (("ours", sys.executable), ("peer", sys.argv[1])):
            rows[side].append(harness.measured(__file__, "--side", side, python=python))
    print(f"{'':<12}{'ours':>10}{'peer':>10}{'peer / ours':>13}")
    for name in rows["ours"][0]:
        mine, theirs = (
            statistics.median(row[name] for row in rows[side]) for side in ("ours", "peer")
        )
        print(f"{name:<12}{mine:>10.3g}{theirs:>10.3g}{theirs / mine:>13.2f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--side":
        measure(sys.argv[2])
    else:
        main()

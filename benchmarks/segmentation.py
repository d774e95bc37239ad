"""Measures speed and memory of EfficientNet + NAS-FPN at 512 px: training and pseudo labeling.

    python benchmarks/segmentation.py [VARIANT ...]      # b0 and b7 unless given

Each network is measured in a process of its own: images/s of a training step; images/s of labeling
a PASCAL-sized image at one scale (the baseline) and at the paper's six scales; peak memory after
labeling it and after labeling an image of 12 megapixels.
"""

import subprocess
import sys
import tempfile
import time

import harness

SIZE, STEPS, CLASSES = 512, 3, 21
BATCH = {"b0": 2, "b7": 1}


def settings(variant):
    from official_selftrain import config

    overrides = [f"task.backbone=efficientnet-{variant}", f"task.num_classes={CLASSES}"]
    overrides += [f"task.image_size=[{SIZE},{SIZE}]", "pseudo=null"]
    return config.resolve("pascal_b7_imagenetpp_s4_selftrain_aug", overrides=overrides)


def training(variant):
    import numpy as np
    import tensorflow as tf

    from official_selftrain.engine import distribution
    from official_selftrain.pipeline.training import make_trainer
    from official_selftrain.tasks import make_task

    chosen, size = settings(variant), BATCH.get(variant, 1)
    distribution.make_distribution(chosen.runtime)
    task = make_task(chosen.task.model_copy(update={"bn_synchronized": False}))
    trainer = make_trainer(chosen, task)
    print(f"{variant}: {trainer.student.count_params():,} parameters")
    rng = np.random.default_rng(0)
    images = tf.constant(rng.standard_normal((size, SIZE, SIZE, 3)), tf.float32)
    masks = tf.constant(rng.integers(0, CLASSES, (size, SIZE, SIZE)), tf.int32)
    data = {"human": images}, {"human": {"mask": masks}}
    step = tf.function(lambda: trainer.train_step(data), autograph=False)
    forward = tf.function(lambda: trainer.student(images, training=False), autograph=False)
    whole = harness.print_speed(f"{variant}: train step, batch {size}", step, size, STEPS)
    alone = harness.print_speed(f"{variant}: forward, batch {size}", forward, size, STEPS)
    print(f"{variant}: a step costs {whole / alone:.1f} forward passes; {peak()}")


def labeling(variant):
    from official_selftrain.tasks import make_task

    task = make_task(settings(variant).task)
    model = task.build_model()
    print(f"{variant}: network built, {peak()}")
    pascal = write_image(375, 500)
    one = label(task.config.model_copy(update={"label_scales": (1.0,)}), model, pascal)
    print(f"{variant}: 500 x 375, one scale {1 / one:.3f} images/s, {peak()}")
    six = label(task.config, model, pascal)
    print(f"{variant}: six scales {1 / six:.3f} images/s, {six / one:.1f} times one, {peak()}")
    large = label(task.config, model, write_image(3000, 4000))
    print(f"{variant}: 4000 x 3000, six scales {1 / large:.3f} images/s, {peak()}")


def write_image(height, width):
    """A TFRecord of `STEPS` + 1 images of noise."""
    import numpy as np

    from official_selftrain.data import png, records

    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), "uint8")
    image = {"encoded": png.encode(pixels), "height": height, "width": width}
    file = f"{tempfile.mkdtemp()}/images.tfrecord"
    records.write(file, (records.ImageRecord(i, **image) for i in range(STEPS + 1)))
    return [file]


def label(config, model, files):
    """Seconds per image, from the second image on, including records and PNGs."""
    from official_selftrain import teacher
    from official_selftrain.tasks import make_task

    task, times = make_task(config, labeling=True), []
    for record, prediction in teacher.Predictor(task, model, 1)(files):
        task.to_record(record, prediction, "teacher")
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / STEPS


def peak():
    return f"peak {harness.peak_megabytes() / 2**10:.2f} GB"


def main():
    if sys.argv[1:2] in (["training"], ["labeling"]):
        return globals()[sys.argv[1]](sys.argv[2])
    for variant in sys.argv[1:] or BATCH:
        for part in ("training", "labeling"):
            subprocess.run([sys.executable, __file__, part, variant], check=True)


if __name__ == "__main__":
    main()

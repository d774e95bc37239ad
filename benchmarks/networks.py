"""Measures every released network: size, cost, exactness, build time, latency, memory (CPU).

    python benchmarks/networks.py [NAME ...]

Prints a Markdown table. Each row is measured in a process of its own: trainable parameters and
multiply-adds at the native size next to the published ones; the largest difference from the golden
outputs in standard deviations, where the golden numbers are next to the checkout; seconds to build
the network and to process one image at the native size and at 256 px; peak memory at the native
size.
"""

import sys
import time

import harness
import numpy as np

# name: (golden case, published parameters in millions, multiply-adds in 10^9)
ROWS = {
    "retinanet_spinenet49S": ("retinanet_spinenet49S_128", 11.27, 30.89),
    "retinanet_spinenet49": (None, 28.54, 85.46),
    "retinanet_spinenet96": (None, 42.97, 265.63),
    "retinanet_spinenet143": ("retinanet_spinenet143_128", 66.96, 524.59),
    "retinanet_spinenet190": (None, 163.64, 1883.92),
    "retinanet_resnet50_fpn": ("retinanet_resnet50_fpn_128", 34.09, 96.96),
    "segmentation_efficientnet-b7_nasfpn": (
        "segmentation_efficientnet-b7_nasfpn_128",
        71.73,
        60.17,
    ),
    "segmentation_efficientnet-l2_nasfpn": (
        "segmentation_efficientnet-l2_nasfpn_128",
        485.97,
        229.44,
    ),
}


def task_config(name, side=None):
    """The task config of a released network, at its native size or at `side` pixels."""
    from official_selftrain import config

    if name.startswith("segmentation"):
        backbone = name.split("_")[1]
        task = config.SegmentationConfig(
            num_classes=21, backbone=backbone, stochastic_depth=0.2, bn_synchronized=False
        )
    elif "spinenet" in name:
        experiment = "coco_spinenet" + name.removeprefix("retinanet_spinenet")
        task = config.resolve(experiment).task
    else:
        task = config.DetectionConfig(
            num_classes=91, backbone="resnet50", neck="fpn", activation="relu", anchor_size=4.0
        )
    return task.model_copy(update={"image_size": (side, side)}) if side else task


def measure(name):
    import keras

    from official_selftrain.models import multiply_adds
    from official_selftrain.tasks import make_task

    began = time.perf_counter()
    model = make_task(task_config(name)).build_model()
    row = {"build": time.perf_counter() - began}
    row["parameters"] = sum(int(np.prod(v.shape)) for v in model.trainable_variables) / 1e6
    row["multiply_adds"] = multiply_adds(model) / 1e9
    row["native"] = latency(model)
    row["gigabytes"] = harness.peak_megabytes() / 2**10
    del model
    keras.backend.clear_session()
    row["small"] = latency(make_task(task_config(name, 256)).build_model())
    harness.report(row)


def latency(model):
    """Seconds of a forward pass of one image: the faster of two, after one that traces."""
    import tensorflow as tf

    images = tf.random.normal([1, *model.input.shape[1:]])
    forward = tf.function(lambda: model(images, training=False), autograph=False)
    forward()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        forward()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def difference(case):
    """Largest difference from the golden outputs, in standard deviations of each output."""
    networks = harness.golden_networks()
    _, model = networks.golden_network(harness.GOLDEN, case)
    with np.load(harness.GOLDEN / f"forward/{case}_infer.npz") as arrays:
        expected = dict(arrays)
    model, stages = networks.with_stages(model, expected)
    outputs = model(expected["image"], training=False)
    pairs = networks.comparisons(expected, outputs, stages)
    worst = max(float(np.abs(ours - wanted).max() / wanted.std()) for _, wanted, ours in pairs)
    harness.report(worst)


def main():
    print(
        "| network | M parameters (published) | G multiply-adds (published) | from golden | build "
        "| one image | at 256 px | memory |\n| --- " + "| --- " * 7 + "|"
    )
    for name in sys.argv[1:] or ROWS:
        case, parameters, cost = ROWS[name]
        row = harness.measured(__file__, "--measure", name)
        exact = "–"
        if case and harness.GOLDEN.is_dir():
            exact = f"{harness.measured(__file__, '--golden', case):.0e} σ"
        print(
            f"| {name} | {row['parameters']:.2f} ({parameters}) "
            f"| {row['multiply_adds']:.2f} ({cost}) | {exact} | {row['build']:.1f} s "
            f"| {row['native']:.2f} s | {row['small']:.2f} s | {row['gigabytes']:.1f} GB |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    elif sys.argv[1:2] == ["--golden"]:
        difference(sys.argv[2])
    else:
        main()

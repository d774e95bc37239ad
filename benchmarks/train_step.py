"""Training speed of SpineNet-49 RetinaNet at 256 px.

    python benchmarks/train_step.py [BATCH] [VARIANT]

Prints seconds from nothing to the first step, and images/s and CPU seconds a step after it, with
the forward pass alone in the same run as the baseline.
"""

import sys
import time

import keras
import numpy as np
import tensorflow as tf

from official_selftrain import config
from official_selftrain.engine import distribution
from official_selftrain.pipeline import training
from official_selftrain.tasks import make_task

SIZE, STEPS = 256, 5


def batch(task, size):
    rng = np.random.default_rng(0)
    max_boxes = task.config.max_instances
    labels = {
        "boxes": np.tile(np.array([20.0, 30.0, 90.0, 120.0], "float32"), (size, max_boxes, 1)),
        "classes": np.where(np.arange(max_boxes) < 8, 5, -1).astype("int32")[None].repeat(size, 0),
    }
    images = rng.standard_normal((size, SIZE, SIZE, 3)).astype("float32")
    to_tensor = keras.ops.convert_to_tensor
    return {"human": to_tensor(images)}, {"human": tf.nest.map_structure(to_tensor, labels)}


def measure(name, function, images):
    began = time.perf_counter()
    function()
    first = time.perf_counter() - began
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        function()
    wall, cpu = (time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS
    print(
        f"{name}: first {first:.1f} s, then {wall:.2f} s, {cpu:.2f} CPU s, "
        f"{images / wall:.2f} images/s"
    )
    return wall


def main():
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    variant = sys.argv[2] if len(sys.argv) > 2 else "49"
    overrides = [f"task.image_size=[{SIZE},{SIZE}]"]
    settings = config.resolve(f"coco_spinenet{variant}", overrides=overrides)
    distribution.make_distribution(settings.runtime)
    began = time.perf_counter()
    task = make_task(settings.task)
    trainer = training.make_trainer(settings, task)
    print(
        f"build {time.perf_counter() - began:.1f} s, {trainer.student.count_params():,} parameters"
    )
    data = batch(task, size)
    step = tf.function(lambda: trainer.train_step(data), autograph=False)
    forward = tf.function(
        lambda: trainer.student(data[0]["human"], training=False), autograph=False
    )
    whole = measure(f"train step, batch {size}", step, size)
    alone = measure(f"forward, batch {size}", forward, size)
    print(f"a step costs {whole / alone:.1f} forward passes")


if __name__ == "__main__":
    main()

"""Measures the training speed of the detector of an experiment at 256 px, with 8 boxes an image.

    python benchmarks/train_step.py [BATCH] [EXPERIMENT]     # by default 2 coco_spinenet49

Prints the seconds to build the network and to the first step, then images/s and CPU seconds per
step. The forward pass, measured in the same run, is the baseline.
"""

import sys
import time

import harness
import keras
import numpy as np
import tensorflow as tf

from official_selftrain import config
from official_selftrain.engine import distribution
from official_selftrain.pipeline import training
from official_selftrain.tasks import make_task

SIZE, STEPS, CLASSES = 256, 5, 91


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


def main():
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    experiment = sys.argv[2] if len(sys.argv) > 2 else "coco_spinenet49"
    overrides = [f"task.image_size=[{SIZE},{SIZE}]", f"task.num_classes={CLASSES}"]
    settings = config.resolve(experiment, overrides=[*overrides, "trainer.steps=100000"])
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
    whole = harness.print_speed(f"train step, batch {size}", step, size, STEPS)
    alone = harness.print_speed(f"forward, batch {size}", forward, size, STEPS)
    print(f"a step costs {whole / alone:.1f} forward passes")


if __name__ == "__main__":
    main()

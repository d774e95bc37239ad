"""Times class-wise non-maximum suppression of one 512 px image: 49,104 anchors, 90 classes.

    python benchmarks/nms.py

Prints CPU seconds per call, summed over all cores, and the ratio to TensorFlow's combined
suppression, which has no Soft-NMS, on the same input. The scores resemble those of a trained
detector: nearly all are close to 0, a few thousand are above 0.05.
"""

import harness
import keras
import numpy as np
import tensorflow as tf

from official_selftrain.ops import anchors
from official_selftrain.ops.nms import class_wise_nms

CLASSES, REPEATS = 90, 20


def scene(rng):
    boxes = anchors.anchor_boxes((512, 512)) + rng.normal(0, 2, (49_104, 4)).astype("float32")
    boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    logits = rng.normal(-7, 1.2, (len(boxes), CLASSES)).astype("float32")
    for _ in range(40):  # objects, whose anchors agree on a class
        center = boxes[rng.integers(len(boxes))].mean()
        near = rng.permutation(np.argsort(np.abs(boxes.mean(axis=1) - center))[:60])
        logits[near, rng.integers(CLASSES)] += rng.uniform(3, 8, len(near))
    return boxes[None], 1 / (1 + np.exp(-logits[None]))


def cpu_seconds(function, *arguments):
    compiled = tf.function(function, autograph=False)
    return harness.timed(lambda: compiled(*arguments), REPEATS).cpu


def main():
    boxes, scores = map(keras.ops.convert_to_tensor, scene(np.random.default_rng(0)))
    above = int(keras.ops.sum(keras.ops.cast(scores > 0.05, "int32")))
    print(f"{boxes.shape[1]} anchors, {CLASSES} classes, {above} scores above 0.05")
    peer = cpu_seconds(
        lambda b, s: tf.image.combined_non_max_suppression(
            b[:, :, None], s, 100, 100, 0.5, 0.05, clip_boxes=False
        ),
        boxes,
        scores,
    )
    print(f"{'tf.image.combined':<18} {peer:.4f} CPU s")
    for name, sigma in (("hard", 0.0), ("soft", 0.3)):
        ours = cpu_seconds(lambda b, s, g=sigma: class_wise_nms(b, s, soft_sigma=g), boxes, scores)
        print(f"{'ours, ' + name:<18} {ours:.4f} CPU s, {ours / peer:.2f} of combined")


if __name__ == "__main__":
    main()

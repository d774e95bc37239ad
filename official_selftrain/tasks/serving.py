"""What an exported model computes from prepared images: detections or class maps.

Output names are those of the released code, TensorFlow's TPU repository,
`models/official/detection/serving`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from official_selftrain.ops import nms as nms_ops
from official_selftrain.utils.types import Tensor

if TYPE_CHECKING:
    import keras

SOFT_SIGMA = 0.3  # the paper's Soft-NMS


class Detector:
    """Serving function of a detector.

    Outputs, for B images: `num_detections` `[B]` int32; `detection_boxes` `[B, D, 4]` as (ymin,
    xmin, ymax, xmax) in pixels of the original image, best first; `detection_classes` `[B, D]`
    int32; `detection_scores` `[B, D]`, -1 in unused slots. Without suppression: `raw_boxes`
    `[B, R, 1, 4]`, `raw_scores` `[B, R, C - 1]`, and `raw_encoded_boxes` `[B, R, 4]`, with R boxes
    per image.

    Args:
        model: a `RetinaNet`.
        task: its `DetectionTask`.
        suppress: whether to apply non-maximum suppression.
    """

    def __init__(self, model: keras.Model, task: Any, suppress: bool = True) -> None:
        self.model, self.task, self.suppress = model, task, suppress

    def __call__(self, images: Tensor, info: Tensor) -> dict[str, Tensor]:
        """Outputs for normalized images `[B, H, W, 3]` and their `image_info` `[B, 4, 2]`."""
        size = tf.tile(info[:, 0], [1, 2])[:, None]
        if not self.suppress:
            outputs = self.model(images, training=False)
            boxes, scores = self.task.decode(outputs, info)
            # Boxes are clipped to the network's input so far, whose padding is outside of the
            # image.
            boxes = tf.minimum(boxes / tf.tile(info[:, 2], [1, 2])[:, None], size)
            return {
                "raw_boxes": boxes[:, :, None],
                "raw_scores": scores,
                "raw_encoded_boxes": outputs["box_deltas"],
            }
        found = self.task.predict(self.model, images, {"image_info": info})
        used = tf.cast(found["scores"] > nms_ops.NO_SCORE, tf.int32)
        return {
            "num_detections": tf.reduce_sum(used, axis=-1),
            "detection_boxes": found["boxes"] * size,
            "detection_classes": found["classes"],
            "detection_scores": found["scores"],
        }


class ClassMap:
    """Serving function of a segmenter.

    Outputs, for B images: `category_bytes` `[B]`, PNG files with the most likely class of each
    pixel of the original image, and `score_bytes` `[B]`, PNG files with 255 times its probability,
    rounded down.

    Args:
        model: a `Segmenter`.
        size: (height, width) of its input in pixels.
    """

    def __init__(self, model: keras.Model, size: tuple[int, int]):
        self.model, self.size = model, size

    def __call__(self, images: Tensor, info: Tensor) -> dict[str, Tensor]:
        """Outputs for normalized images `[B, H, W, 3]` and their `image_info` `[B, 4, 2]`."""
        logits = self.model(images, training=False)["logits"]
        logits = tf.raw_ops.ResizeBilinear(images=logits, size=self.size)
        png = tf.TensorSpec([], tf.string)
        return tf.map_fn(
            lambda pair: self._encode(*pair),
            (logits, info),
            fn_output_signature={"category_bytes": png, "score_bytes": png},
        )

    def _encode(self, logits: Tensor, info: Tensor) -> dict[str, Tensor]:
        """The two files of one image, from logits `[*size, C]` and `image_info` `[4, 2]`."""
        inside = tf.cast(tf.round(info[0] * info[2]), tf.int32)
        logits = logits[: inside[0], : inside[1]]
        size = tf.cast(info[0], tf.int32)
        logits = tf.raw_ops.ResizeBilinear(images=logits[None], size=size)[0]
        score = tf.reduce_max(tf.nn.softmax(logits), axis=-1)
        category = tf.argmax(logits, axis=-1)
        images = {"category_bytes": category, "score_bytes": tf.minimum(255.0 * score, 255.0)}
        return {
            name: tf.io.encode_png(tf.cast(image, tf.uint8)[..., None])
            for name, image in images.items()
        }

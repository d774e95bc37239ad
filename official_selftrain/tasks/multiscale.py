"""One class map out of the logits of many scales, strip by strip."""

from collections.abc import Sequence

import numpy as np

from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.ops import resize
from official_selftrain.utils.types import Tensor

MAX_PROBABILITIES = 2**24  # probabilities held at a time while an image is put together


def inside(logits: np.ndarray, info: np.ndarray, size: Sequence[int]) -> Tensor:
    """Logits at the pixels of the fitted image, without the padding: `[h, w, C]`.

    Args:
        logits: `[H / r, W / r, C]` of the padded network input.
        info: `[4, 2]`, as in `geometry.plan_resize`.
        size: (H, W) of the padded network input in pixels.
    """
    import tensorflow as tf

    height, width = (int(side) for side in np.rint(info[0] * info[2]))
    return tf.raw_ops.ResizeBilinear(images=logits[None], size=size)[0, :height, :width]


def merge_views(views: Sequence[Tensor], height: int, width: int, stored: int) -> MaskPrediction:
    """The classes with the largest mean probabilities over all views, at every pixel.

    Args:
        views: logits `[h, w, C]`, each of a size of its own.
        height, width: of the result in pixels.
        stored: number of classes to keep for each pixel.
    """
    import tensorflow as tf

    rows = max(1, MAX_PROBABILITIES // (width * views[0].shape[-1]))
    classes, confidences = [], []
    for first in range(0, height, rows):
        last = min(first + rows, height)
        mean = tf.add_n(
            [tf.nn.softmax(_resized_rows(v, first, last, height, width)) for v in views]
        )
        largest, which = tf.math.top_k(mean, stored)
        classes.append(which.numpy().astype("uint8"))
        confidences.append(np.rint(255 / len(views) * largest.numpy()).astype("uint8"))
    # One map below the other.
    classes, confidences = (
        np.concatenate(strips).transpose(2, 0, 1).reshape(stored * height, width)
        for strips in (classes, confidences)
    )
    return MaskPrediction(
        classes[:height], confidences[:height], classes[height:], confidences[height:]
    )


def _resized_rows(x, first, last, height, width):
    """Rows `first` to `last` of `x` resized to (height, width), by TF1's bilinear rule."""
    import tensorflow as tf

    low, high, weight = (v[first:last] for v in resize.bilinear_weights(x.shape[0], height))
    top = tf.gather(x, low)
    rows = top + (tf.gather(x, high) - top) * weight[:, None, None]
    return tf.raw_ops.ResizeBilinear(images=rows[None], size=[last - first, width])[0]

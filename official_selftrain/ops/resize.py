"""TF1's two rules of resizing, with which the released networks and labels were made.

Pixel t of the target reads the source at t * (source size / target size), in float32. There are
neither half-pixel centers nor aligned corners, one of which every resize of `keras.ops` assumes.
"""

import numpy as np
from keras import ops

from official_selftrain.utils.types import Tensor


def nearest_indices(source: int, target: int) -> np.ndarray:
    """Which pixel each target pixel copies, along one axis.

    Args:
        source: size of the axis before, in pixels.
        target: size of the axis after, in pixels.

    Returns:
        int32 `[target]`, in [0, source).
    """
    return np.minimum(np.floor(_coordinates(source, target)), source - 1).astype("int32")


def bilinear_weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which two pixels each target pixel mixes, along one axis.

    Args:
        source: size of the axis before, in pixels.
        target: size of the axis after, in pixels.

    Returns:
        `low` and `high`, int32 `[target]`, and `weight`, float32 `[target]` in [0, 1): the target
        is x[low] + (x[high] - x[low]) * weight.
    """
    low = nearest_indices(source, target)
    weight = (_coordinates(source, target) - low).astype("float32")
    return low, np.minimum(low + 1, source - 1), weight


def upsample(x: Tensor, factor: int) -> Tensor:
    """The bilinear rule for a whole factor, where it needs no size: sizes may be unknown.

    Args:
        x: `[B, H, W, C]`.
        factor: at least 1.

    Returns:
        `[B, factor * H, factor * W, C]`.
    """
    return _upsample_axis(_upsample_axis(x, factor, 1), factor, 2)


def _coordinates(source, target):
    # The ratio is rounded to float32 before it is multiplied, as in TF1's kernels: in float64 some
    # products would fall on the other side of a whole number.
    return np.arange(target, dtype="float32") * (np.float32(source) / np.float32(target))


def _upsample_axis(x, factor, axis):
    if factor == 1:
        return x
    size = ops.shape(x)[axis]
    # The next pixel of each; the last pixel is its own next one.
    following = ops.concatenate([x, ops.take(x, [-1], axis=axis)], axis)
    following = ops.split(following, [1], axis)[1]
    phases = [x + (following - x) * (p / factor) for p in range(factor)]
    shape = list(ops.shape(x))
    shape[axis] = size * factor
    return ops.reshape(ops.stack(phases, axis + 1), shape)

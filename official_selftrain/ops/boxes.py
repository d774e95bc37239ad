"""Box geometry and the released box coding.

Boxes are `[..., 4]` as (ymin, xmin, ymax, xmax); encoded boxes are (ty, tx, th, tw).
"""

import math

import numpy as np
from keras import ops

# The released decoder treats pixels as inclusive, so a box is one pixel larger than max - min; the
# released encoder does not. `decode` is therefore not quite the inverse of `encode`. Networks with
# released weights need both as they are. Set to 0.0 for a symmetric pair.
DECODE_EXTRA_PIXEL = 1.0

# Largest size relative to the anchor, so that exp() of an untrained output stays finite.
MAX_LOG_SIZE = math.log(1000 / 16)


def area(boxes):
    """Areas `[...]` of boxes `[..., 4]`, in squared units of the boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a, b):
    """Intersection over union of boxes that broadcast, `[..., 4]` and `[..., 4]` to `[...]`.

    Empty boxes have IoU 0. Two NumPy arrays give a NumPy array, anything else a tensor.
    """
    # The boxes of single images are compared on the host, where dispatching each operation to the
    # backend would take 3 ms an image instead of 0.02 ms.
    on_host = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    array = np if on_host else ops
    height = array.minimum(a[..., 2], b[..., 2]) - array.maximum(a[..., 0], b[..., 0])
    width = array.minimum(a[..., 3], b[..., 3]) - array.maximum(a[..., 1], b[..., 1])
    intersection = array.maximum(height, 0.0) * array.maximum(width, 0.0)
    union = area(a) + area(b) - intersection
    return array.where(union > 0, intersection / array.where(union > 0, union, 1.0), 0.0)


def encode(boxes, anchors):
    """Training targets of boxes relative to anchors, both `[..., 4]` in pixels.

    ty = (yc - yc_a) / h_a, tx likewise, th = ln(h / h_a), tw likewise, with 1e-8 added to sizes.
    """
    y, x, height, width = _center_size(boxes, 1e-8)
    anchor_y, anchor_x, anchor_height, anchor_width = _center_size(anchors, 1e-8)
    return ops.stack(
        [
            (y - anchor_y) / anchor_height,
            (x - anchor_x) / anchor_width,
            ops.log(height / anchor_height),
            ops.log(width / anchor_width),
        ],
        axis=-1,
    )


def decode(deltas, anchors):
    """Boxes `[..., 4]` in pixels from network outputs and anchors `[..., 4]`, as released."""
    anchor_y, anchor_x, anchor_height, anchor_width = _center_size(anchors, DECODE_EXTRA_PIXEL)
    y = deltas[..., 0] * anchor_height + anchor_y
    x = deltas[..., 1] * anchor_width + anchor_x
    height = ops.exp(ops.minimum(deltas[..., 2], MAX_LOG_SIZE)) * anchor_height
    width = ops.exp(ops.minimum(deltas[..., 3], MAX_LOG_SIZE)) * anchor_width
    top, left = y - 0.5 * height, x - 0.5 * width
    return ops.stack(
        [top, left, top + height - DECODE_EXTRA_PIXEL, left + width - DECODE_EXTRA_PIXEL], axis=-1
    )


def clip(boxes, size):
    """Clips boxes `[..., N, 4]` in pixels to [0, height - 1] x [0, width - 1] (released code).

    Args:
        boxes: `[..., N, 4]`.
        size: `[..., 2]`, height and width of the image in pixels.
    """
    limits = ops.concatenate([size, size], axis=-1)[..., None, :] - 1.0
    return ops.clip(boxes, 0.0, limits)


def _center_size(boxes, extra):
    height = boxes[..., 2] - boxes[..., 0] + extra
    width = boxes[..., 3] - boxes[..., 1] + extra
    if extra == DECODE_EXTRA_PIXEL:
        return boxes[..., 0] + 0.5 * height, boxes[..., 1] + 0.5 * width, height, width
    y = 0.5 * (boxes[..., 0] + boxes[..., 2])
    x = 0.5 * (boxes[..., 1] + boxes[..., 3])
    return y, x, height, width

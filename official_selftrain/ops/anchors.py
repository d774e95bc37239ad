"""Anchors and their assignment to ground truth, on the device.

Lin et al. 2017, section 4, with the rules of the released code.
M ground-truth boxes, R anchors, B images.
"""

import numpy as np
from keras import ops

from official_selftrain.ops import boxes as box_ops

NEGATIVE, IGNORED = -1, -2


def anchor_boxes(
    image_size,
    min_level=3,
    max_level=7,
    anchor_size=4.0,
    num_scales=3,
    aspect_ratios=(1.0, 2.0, 0.5),
):
    """All anchors of an image, not clipped to it.

    Args:
        image_size: (height, width) in pixels, divisible by the largest stride to fit a network.
        min_level, max_level: pyramid levels, level `l` having stride `2^l`.
        anchor_size: side of the smallest anchor in strides.
        num_scales: sizes per octave.
        aspect_ratios: width over height.

    Returns:
        float32 NumPy array `[R, 4]` in pixels, by level, row, column, scale, then aspect ratio.
    """
    levels = []
    for level in range(min_level, max_level + 1):
        stride = 2**level
        y = np.arange(stride / 2, image_size[0], stride)
        x = np.arange(stride / 2, image_size[1], stride)
        centers = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)[:, :, None, :]
        sides = anchor_size * stride * 2.0 ** (np.arange(num_scales) / num_scales)
        ratios = np.sqrt(np.asarray(aspect_ratios, "float64"))
        sizes = np.stack([sides[:, None] / ratios, sides[:, None] * ratios], -1).reshape(-1, 2)
        corners = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=-1)
        levels.append(corners.reshape(-1, 4))
    return np.concatenate(levels).astype("float32")


def assign(anchors, boxes, classes, match_threshold=0.5, unmatched_threshold=0.5):
    """Matches anchors to ground truth and encodes the targets.

    An anchor takes the box with the largest IoU: it is positive from `match_threshold` on, negative
    below `unmatched_threshold`, ignored between. Then each box claims its best anchor whatever the
    IoU; of two boxes that claim one anchor the first wins, and a box that overlaps no anchor claims
    anchor 0 (released code). Ties go to the lower index.

    Args:
        anchors: `[R, 4]` in pixels.
        boxes: `[B, M, 4]` in pixels, padded with any value.
        classes: `[B, M]` int, class of each box, -1 where padded.
        match_threshold, unmatched_threshold: IoU in [0, 1].

    Returns:
        `class_targets` `[B, R]` int32 (class, `NEGATIVE` or `IGNORED`), `box_targets` `[B, R, 4]`
        as (ty, tx, th, tw), zero unless positive, and `num_positives` `[B]` float32.
    """
    anchors = ops.convert_to_tensor(anchors, "float32")
    boxes = ops.cast(boxes, "float32")
    classes = ops.cast(classes, "int32")
    valid = classes >= 0
    overlap = box_ops.iou(boxes[:, :, None, :], anchors[None, None])  # [B, M, R]
    overlap = ops.where(valid[:, :, None], overlap, -1.0)
    best_box = ops.argmax(overlap, axis=1)  # [B, R]
    best_overlap = ops.max(overlap, axis=1)

    best_anchor = ops.argmax(overlap, axis=2)  # [B, M]
    claims = best_anchor[:, :, None] == ops.arange(anchors.shape[0], dtype=best_anchor.dtype)
    claims = ops.cast(ops.logical_and(claims, valid[:, :, None]), "int32")
    claimed = ops.max(claims, axis=1) > 0  # [B, R]
    best_box = ops.where(claimed, ops.argmax(claims, axis=1), best_box)

    positive = ops.logical_or(claimed, best_overlap >= match_threshold)
    ignored = ops.logical_and(best_overlap >= unmatched_threshold, ops.logical_not(positive))
    matched_class = ops.take_along_axis(classes, best_box, axis=1)
    matched_boxes = ops.take_along_axis(boxes, best_box[..., None], axis=1)
    class_targets = ops.where(positive, matched_class, ops.where(ignored, IGNORED, NEGATIVE))
    # Padding may hold boxes of negative size; encode a harmless box there, or the logarithm's NaN
    # would reach the gradient.
    matched_boxes = ops.where(positive[..., None], matched_boxes, anchors)
    box_targets = ops.where(positive[..., None], box_ops.encode(matched_boxes, anchors), 0.0)
    return class_targets, box_targets, ops.sum(ops.cast(positive, "float32"), axis=1)

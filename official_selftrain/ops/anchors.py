"""Anchors and their assignment to ground truth.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4, with the rules of the
released code. In the shapes, M is the number of ground-truth boxes, R of anchors and B of images.
"""

from collections.abc import Sequence

import numpy as np
from keras import ops

from official_selftrain.ops import boxes as box_ops
from official_selftrain.utils.types import Tensor

LEVELS = range(3, 8)  # of the pyramid; level l has stride 2^l
NUM_SCALES = 3  # sizes per octave
ASPECT_RATIOS = (1.0, 2.0, 0.5)  # width over height
ANCHORS_PER_CELL = NUM_SCALES * len(ASPECT_RATIOS)
NEGATIVE, IGNORED = -1, -2


def anchor_boxes(image_size: Sequence[int], anchor_size: float = 4.0) -> np.ndarray:
    """All anchors of an image, not clipped to it.

    Args:
        image_size: (height, width) in pixels. To match the outputs of a network, both must be
            divisible by the largest stride, 128.
        anchor_size: side of the smallest anchor of a level, in strides.

    Returns:
        float32 `[R, 4]`, (ymin, xmin, ymax, xmax) in pixels, ordered by level, row, column, scale
        and aspect ratio.
    """
    levels = []
    for level in LEVELS:
        stride = 2**level
        y = np.arange(stride / 2, image_size[0], stride)
        x = np.arange(stride / 2, image_size[1], stride)
        centers = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)[:, :, None, :]
        sides = anchor_size * stride * 2.0 ** (np.arange(NUM_SCALES) / NUM_SCALES)
        # A ratio stretches one side by its root and shrinks the other: the area stays the same.
        ratios = np.sqrt(np.asarray(ASPECT_RATIOS, "float64"))
        sizes = np.stack([sides[:, None] / ratios, sides[:, None] * ratios], -1).reshape(-1, 2)
        corners = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=-1)
        levels.append(corners.reshape(-1, 4))
    return np.concatenate(levels).astype("float32")


def assign(
    anchors: Tensor,
    boxes: Tensor,
    classes: Tensor,
    *,
    match_threshold: float = 0.5,
    unmatched_threshold: float = 0.5,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Matches anchors to ground truth and encodes the targets.

    Each anchor is compared with the box with which it has the largest IoU: it is positive if that
    is at least `match_threshold`, negative if it is below `unmatched_threshold`, and ignored in
    between. Then each box claims the anchor with which it has the largest IoU, however small. If
    two boxes claim the same anchor, the first one wins; a box that overlaps no anchor claims anchor
    0 (released code). Ties go to the lower index.

    Args:
        anchors: `[R, 4]`, (ymin, xmin, ymax, xmax) in pixels.
        boxes: `[B, M, 4]`, likewise; padding may hold any value.
        classes: `[B, M]` int, class of each box, -1 where it is padding.
        match_threshold: IoU in [0, 1].
        unmatched_threshold: IoU in [0, `match_threshold`].
        weights: `[B, M]`, of each box in the loss, or None.

    Returns:
        `class_targets` `[B, R]` int32: a class, `NEGATIVE` or `IGNORED`; `box_targets`
        `[B, R, 4]`: (ty, tx, th, tw), zero unless positive; `num_positives` `[B]` float32. With
        `weights` the last one adds up the weights of the positive anchors, and a fourth result is
        the weight of each anchor, `[B, R]`: that of its box, or 1 unless it is positive.
    """
    anchors = ops.convert_to_tensor(anchors, "float32")
    boxes = ops.cast(boxes, "float32")
    classes = ops.cast(classes, "int32")
    best_box, best_overlap, claimed = _match(anchors, boxes, classes >= 0)
    positive = ops.logical_or(claimed, best_overlap >= match_threshold)
    ignored = ops.logical_and(best_overlap >= unmatched_threshold, ops.logical_not(positive))
    matched_class = ops.take_along_axis(classes, best_box, axis=1)
    matched_boxes = ops.take_along_axis(boxes, best_box[..., None], axis=1)
    class_targets = ops.where(positive, matched_class, ops.where(ignored, IGNORED, NEGATIVE))
    # Padding may hold boxes of negative size. Encode a harmless box instead: the NaN of a logarithm
    # would reach the gradient although its value is not selected.
    matched_boxes = ops.where(positive[..., None], matched_boxes, anchors)
    box_targets = ops.where(positive[..., None], box_ops.encode(matched_boxes, anchors), 0.0)
    if weights is None:
        return class_targets, box_targets, ops.sum(ops.cast(positive, "float32"), axis=1)
    return class_targets, box_targets, *_weighted(positive, best_box, weights)


def _weighted(positive, best_box, weights):
    """Sum of the weights of the positive anchors `[B]`, and the weights of all `[B, R]`."""
    matched = ops.take_along_axis(ops.cast(weights, "float32"), best_box, axis=1)
    total = ops.sum(ops.where(positive, matched, 0.0), axis=1)
    return total, ops.where(positive, matched, 1.0)


def _match(anchors: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The box of each anchor, its IoU, and whether the box claims the anchor, each `[B, R]`.

    One box after the other, up to the last one of the fullest image: most of the padding is never
    compared, and no array `[B, M, R]` has to be kept.
    """
    batch, limit = ops.shape(boxes)[0], boxes.shape[1]
    shape = (batch, anchors.shape[0])
    indices = ops.arange(anchors.shape[0], dtype="int32")
    count = ops.max(ops.where(valid, ops.arange(1, limit + 1, dtype="int32"), 0))

    def compare(i, best_box, best_overlap, claimed):
        present = ops.take(valid, i, axis=1)[:, None]  # [B, 1]
        overlap = box_ops.iou(ops.take(boxes, i, axis=1)[:, None], anchors)  # [B, R]
        best_anchor = ops.cast(ops.argmax(overlap, axis=1), "int32")
        claims = ops.logical_and(best_anchor[:, None] == indices, present)
        claims = ops.logical_and(claims, ops.logical_not(claimed))
        # Padding gets less than the IoU of any box, which may be 0, so that no anchor matches it.
        better = ops.logical_and(present, overlap > best_overlap)
        # A claim holds whatever the IoU with the boxes that follow.
        taken = ops.logical_or(claims, ops.logical_and(better, ops.logical_not(claimed)))
        return (
            i + 1,
            ops.where(taken, i, best_box),
            ops.where(better, overlap, best_overlap),
            ops.logical_or(claimed, claims),
        )

    start = (0, ops.zeros(shape, "int32"), ops.full(shape, -1.0), ops.zeros(shape, "bool"))
    return ops.while_loop(lambda i, *_: i < count, compare, start, maximum_iterations=limit)[1:]

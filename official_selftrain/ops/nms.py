"""Non-maximum suppression within each class, hard and soft, for all images in one loop.

In the shapes, K is the number of candidates, C of classes, R of anchors, B of images and D of
detections.
"""

from keras import ops

from official_selftrain.ops import boxes as box_ops
from official_selftrain.utils.types import Tensor

NO_SCORE = -1.0  # score of an empty slot


def class_wise_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    max_detections: int = 100,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.05,
    pre_nms: int = 5000,
    soft_sigma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of each image, best first.

    Greedy suppression never mixes classes. So going through all candidates in order of their scores
    and keeping D of them gives the same boxes as suppressing class by class and merging, but it
    needs only one loop of D steps for any number of classes.

    Args:
        boxes: `[B, R, 4]`, (ymin, xmin, ymax, xmax) in any unit.
        scores: `[B, R, C]` in [0, 1], without the background.
        max_detections: D.
        iou_threshold: hard suppression drops candidates whose IoU with a kept box of their class is
            larger than this.
        score_threshold: only scores above it are candidates. Soft suppression also applies it to
            the decayed scores.
        pre_nms: K, the number of candidates: the best of each image, over all classes. The released
            code takes this many of each class; the results differ only if so many candidates are
            suppressed that fewer than D remain.
        soft_sigma: a value above 0 selects Soft-NMS (Bodla et al. 2017), where a kept box
            multiplies the scores of all others of its class by exp(-0.5 / sigma * iou^2), as in
            TensorFlow's NonMaxSuppressionV5.

    Returns:
        `boxes` `[B, D, 4]`; `scores` `[B, D]`, which are `NO_SCORE` in empty slots, always the last
        ones; `classes` `[B, D]`, int32 indices into the C classes.
    """
    num_classes = scores.shape[-1]
    candidates = min(pre_nms, scores.shape[1] * num_classes)
    # The K best pairs of anchor and class belong to the K anchors with the best maxima. Finding
    # these first leaves much less to sort.
    anchors = min(candidates, scores.shape[1])
    _, anchor = ops.top_k(ops.max(scores, axis=-1), anchors)  # [B, anchors]
    pairs = ops.reshape(_rows(scores, anchor), (-1, anchors * num_classes))
    score, pair = ops.top_k(pairs, candidates)
    label = pair % num_classes
    candidate_boxes = _rows(boxes, _rows(anchor, pair // num_classes))  # [B, K, 4]
    kept, kept_scores = _suppress(
        _apart_by_class(candidate_boxes, label),
        ops.where(score > score_threshold, score, NO_SCORE),
        steps=max_detections,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        soft_sigma=soft_sigma,
    )
    labels = ops.cast(_rows(label, kept), "int32")
    return _rows(candidate_boxes, kept), kept_scores, labels


def _rows(x, indices):
    """`x[b, indices[b, i]]`: `[B, N, ...]` and `[B, K]` to `[B, K, ...]`.

    This is one flat gather; `take_along_axis` would need an index for every number.
    """
    batch, count = ops.shape(x)[0], x.shape[1]
    start = count * ops.arange(batch, dtype=indices.dtype)[:, None]
    return ops.take(ops.reshape(x, (-1, *x.shape[2:])), indices + start, axis=0)


def _apart_by_class(boxes, label):
    """Moves the boxes of each class to a region of their own, so that classes never overlap."""
    low = ops.min(boxes, axis=(1, 2), keepdims=True)
    extent = ops.max(boxes, axis=(1, 2), keepdims=True) - low + 1.0
    return boxes - low + ops.cast(label, boxes.dtype)[..., None] * extent


def _suppress(boxes, scores, *, steps, iou_threshold, score_threshold, soft_sigma):
    """Picks the best remaining candidate `steps` times; indices and scores `[B, steps]`.

    The time depends on the number of operations in a step, not on their size. Hence the corners lie
    side by side, and the chosen box is looked up by a masked sum.
    """
    batch = ops.shape(scores)[0]
    slots = ops.arange(steps, dtype="int32")
    positions = ops.arange(scores.shape[1], dtype="int32")
    area = box_ops.area(boxes)  # [B, K]
    table = ops.transpose(ops.concatenate([boxes, area[..., None]], axis=-1), (0, 2, 1))
    low, high = table[:, :2], table[:, 2:4]  # [B, 2, K]

    def step(i, state):
        scores, kept, kept_scores = state
        best = ops.cast(ops.argmax(scores, axis=-1, keepdims=True), "int32")  # [B, 1]
        best_score = ops.max(scores, axis=-1, keepdims=True)
        chosen = positions == best  # [B, K]
        row = ops.sum(ops.where(chosen[:, None], table, 0.0), axis=-1, keepdims=True)  # [B, 5, 1]
        sides = ops.relu(ops.minimum(high, row[:, 2:4]) - ops.maximum(low, row[:, :2]))
        intersection = sides[:, 0] * sides[:, 1]
        union = area + row[:, 4] - intersection
        if soft_sigma > 0:
            overlap = intersection / ops.maximum(union, 1e-12)
            scores = scores * ops.exp(-0.5 / soft_sigma * overlap * overlap)
            drop = ops.logical_or(chosen, scores <= score_threshold)
        else:
            drop = ops.logical_or(chosen, intersection > iou_threshold * union)
        here = slots == i
        kept = ops.where(here, best, kept)
        kept_scores = ops.where(here, best_score, kept_scores)
        return ops.where(drop, NO_SCORE, scores), kept, kept_scores

    empty = ops.zeros((batch, steps), dtype="int32")
    state = (scores, empty, ops.full((batch, steps), NO_SCORE, dtype=scores.dtype))
    _, kept, kept_scores = ops.fori_loop(0, steps, step, state)
    return kept, kept_scores

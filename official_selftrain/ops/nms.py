"""Non-maximum suppression per class, hard and soft, for all classes and images in one loop.

K candidates, C classes, R anchors, B images, D detections.
"""

from keras import ops

from official_selftrain.ops import boxes as box_ops

NO_SCORE = -1.0  # score of an empty slot


def class_wise_nms(
    boxes,
    scores,
    max_detections=100,
    iou_threshold=0.5,
    score_threshold=0.05,
    pre_nms=5000,
    soft_sigma=0.0,
):
    """Detections of each image, best first.

    Greedy suppression never mixes classes, so walking through all candidates in order of score
    and keeping D of them gives the same boxes as suppressing class by class and merging, and needs
    one loop of D steps for any number of classes.

    Args:
        boxes: `[B, R, 4]`.
        scores: `[B, R, C]`, all classes that may be detected; no background.
        max_detections: D.
        iou_threshold: hard suppression drops candidates that overlap a kept box of their class by
            more.
        score_threshold: only scores above it are candidates; soft suppression applies it again to
            the decayed score.
        pre_nms: K, candidates looked at: the best of the image, over all classes. The released code
            takes this many from every class; the difference shows only if so many candidates are
            suppressed that fewer than D remain.
        soft_sigma: above 0, Soft-NMS (Bodla et al. 2017) instead: a kept box multiplies the scores
            it overlaps by exp(-0.5 / sigma * iou^2), whatever the IoU, as TensorFlow's
            NonMaxSuppressionV5 does.

    Returns:
        `boxes` `[B, D, 4]`, `scores` `[B, D]` (`NO_SCORE` in empty slots, which are last),
        `classes` `[B, D]` int32 index into C.
    """
    num_classes = scores.shape[-1]
    candidates = min(pre_nms, scores.shape[1] * num_classes)
    # The K best pairs lie among the K anchors with the best maximum: a smaller sort.
    anchors = min(candidates, scores.shape[1])
    _, anchor = ops.top_k(ops.max(scores, axis=-1), anchors)  # [B, anchors]
    pairs = ops.reshape(_rows(scores, anchor), (-1, anchors * num_classes))
    score, pair = ops.top_k(pairs, candidates)
    label = pair % num_classes
    candidate_boxes = _rows(boxes, _rows(anchor, pair // num_classes))  # [B, K, 4]
    kept, kept_scores = _suppress(
        _apart_by_class(candidate_boxes, label),
        ops.where(score > score_threshold, score, NO_SCORE),
        max_detections,
        iou_threshold,
        score_threshold,
        soft_sigma,
    )
    labels = ops.cast(_rows(label, kept), "int32")
    return _rows(candidate_boxes, kept), kept_scores, labels


def _rows(x, indices):
    """`x[b, indices[b, i]]`: `[B, N, ...]` and `[B, K]` to `[B, K, ...]`.

    One flat gather; `take_along_axis` would spell out an index for every number.
    """
    batch, count = ops.shape(x)[0], x.shape[1]
    start = count * ops.arange(batch, dtype=indices.dtype)[:, None]
    return ops.take(ops.reshape(x, (-1, *x.shape[2:])), indices + start, axis=0)


def _apart_by_class(boxes, label):
    """Moves each class to a place of its own, so that boxes of two classes never overlap."""
    low = ops.min(boxes, axis=(1, 2), keepdims=True)
    extent = ops.max(boxes, axis=(1, 2), keepdims=True) - low + 1.0
    return boxes - low + ops.cast(label, boxes.dtype)[..., None] * extent


def _suppress(boxes, scores, steps, iou_threshold, score_threshold, soft_sigma):
    """Picks the best remaining candidate `steps` times; indices and scores `[B, steps]`.

    Time is the number of operations in a step, not their size: hence corners side by side, and a
    masked sum to look up the chosen box.
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

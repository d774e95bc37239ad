"""Losses as pure functions: element-wise or summed, never averaged.

So the caller divides, and it can divide by a count over all replicas and micro-batches.
"""

from collections.abc import Sequence

from keras import ops

from official_selftrain.ops.anchors import IGNORED
from official_selftrain.utils.types import Tensor


def focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 1.5
) -> Tensor:
    """Sigmoid focal loss of every element.

        FL = a * (1 - p_t)^gamma * CE,  a = alpha where the target is 1, otherwise 1 - alpha

    Lin et al. 2017, equation 5; the released configurations have a gamma of 1.5 instead of 2.

    Args:
        logits: `[...]`.
        targets: `[...]`, 0 or 1.
        alpha: weight of positive elements, in (0, 1).
        gamma: how much to focus on hard elements, at least 0; 0 is the weighted cross entropy.

    Returns:
        `[...]`, non-negative.
    """
    positive = targets > 0.5
    signed = ops.where(positive, logits, -logits)
    cross_entropy = ops.softplus(-signed)
    # (1 - p_t)^gamma in log space, where p_t near 1 keeps its precision:
    # log(1 - p_t) = -softplus(signed) = -(signed + softplus(-signed)).
    modulator = ops.exp(-gamma * (signed + cross_entropy))
    return ops.where(positive, alpha, 1.0 - alpha) * modulator * cross_entropy


def huber_loss(predictions: Tensor, targets: Tensor, delta: float = 0.1) -> Tensor:
    """Huber loss `[...]` of predictions and targets, both `[...]`.

    For a difference d it is 0.5 d^2 up to |d| = delta, and delta |d| - 0.5 delta^2 beyond.
    """
    distance = ops.abs(predictions - targets)
    quadratic = ops.minimum(distance, delta)
    return 0.5 * quadratic * quadratic + delta * (distance - quadratic)


def detection_loss_sums(
    class_logits: Tensor,
    box_deltas: Tensor,
    class_targets: Tensor,
    box_targets: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 1.5,
    delta: float = 0.1,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of the class and the box loss over all anchors of all images.

    Args:
        class_logits: `[B, R, C]`.
        box_deltas: `[B, R, 4]`, (ty, tx, th, tw).
        class_targets: `[B, R]` int: a class, `anchors.NEGATIVE` or `anchors.IGNORED`.
        box_targets: `[B, R, 4]`. A coordinate counts only if its target is not exactly zero
            (released code); this also leaves out anchors without a box.
        alpha, gamma: see `focal_loss`.
        delta: see `huber_loss`.
        weights: `[B, R]`, factors on both losses of each anchor, or None.

    Returns:
        Two scalars. The released loss divides the first by N and the second by 4 N, where
        N = 1 + number of positive anchors in the batch, and adds 50 times the second to the first.
    """
    classes = ops.arange(class_logits.shape[-1], dtype="int32")
    # No class is negative, so a negative anchor has only zeros: it belongs to no class.
    one_hot = ops.cast(class_targets[..., None] == classes, class_logits.dtype)
    element = focal_loss(class_logits, one_hot, alpha=alpha, gamma=gamma)
    if weights is not None:
        element = element * weights[..., None]
    class_sum = ops.sum(ops.where(class_targets[..., None] != IGNORED, element, 0.0))
    box_element = huber_loss(box_deltas, box_targets, delta)
    if weights is not None:
        box_element = box_element * weights[..., None]
    box_sum = ops.sum(ops.where(box_targets != 0.0, box_element, 0.0))
    return class_sum, box_sum


def segmentation_loss_sum(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_label: int = 255,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    probabilities: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the softmax cross entropy over all labeled pixels, and their number.

    Args:
        logits: `[B, H, W, C]`.
        labels: `[B, H, W]` int: a class, or `ignore_label`.
        ignore_label: label of the pixels that do not count.
        label_smoothing: fraction of a label that is spread evenly over all classes, in [0, 1).
        class_weights: `[C]`, factors on the loss of the pixels of each class, or None.
        probabilities: `[B, H, W, C]`, distributions to learn instead of the classes (distillation),
            or None. With them, `labels` only says which pixels count.
        weights: `[B, H, W]`, how much each pixel counts, in the sum and in the number; or None.

    Returns:
        Two scalars. The released loss divides the first by the second, with or without
        `class_weights`.
    """
    valid = ops.cast(labels != ignore_label, logits.dtype)
    if weights is not None:
        valid = valid * weights
    classes = ops.arange(logits.shape[-1], dtype=labels.dtype)
    if probabilities is None:
        probabilities = ops.cast(labels[..., None] == classes, logits.dtype)
    smooth = probabilities * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    # `log_softmax` stays finite where the logarithm of a softmax would be -inf.
    cross_entropy = -ops.sum(smooth * ops.log_softmax(logits, axis=-1), axis=-1)
    if class_weights is not None:
        cross_entropy *= ops.sum(probabilities * ops.convert_to_tensor(class_weights), axis=-1)
    return ops.sum(cross_entropy * valid), ops.sum(valid)

"""Losses as pure functions: element-wise or summed, never averaged, so scaling stays visible."""

from keras import ops


def focal_loss(logits, targets, alpha=0.25, gamma=1.5):
    """Sigmoid focal loss of every element.

        FL = a * (1 - p_t)^gamma * CE,  a = alpha where the target is 1, else 1 - alpha

    Lin et al. 2017, equation 5. Gamma is 1.5 in the released configurations, not 2.

    Args:
        logits: `[...]`.
        targets: `[...]`, 0 or 1.
        alpha: weight of positive elements, in (0, 1).
        gamma: focus on hard elements, >= 0.

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


def huber_loss(predictions, targets, delta=0.1):
    """Huber loss of every element: 0.5 d^2 up to |d| = delta, then delta |d| - 0.5 delta^2."""
    distance = ops.abs(predictions - targets)
    quadratic = ops.minimum(distance, delta)
    return 0.5 * quadratic * quadratic + delta * (distance - quadratic)


def detection_loss_sums(
    class_logits, box_deltas, class_targets, box_targets, alpha=0.25, gamma=1.5, delta=0.1
):
    """Sums of the class and the box loss over all anchors of all images.

    Args:
        class_logits: `[B, R, C]`.
        box_deltas: `[B, R, 4]`.
        class_targets: `[B, R]` int; class, -1 for background, -2 for ignored.
        box_targets: `[B, R, 4]`. A coordinate counts only where its target is not exactly zero
            (released code), which also leaves out anchors without a box.
        alpha, gamma: of the focal loss.
        delta: of the Huber loss.

    Returns:
        Two scalars. The released loss divides the first by N and the second by 4 N, where
        N = 1 + number of positive anchors in the batch, and adds 50 times the second to the first.
    """
    classes = ops.arange(class_logits.shape[-1], dtype="int32")
    one_hot = ops.cast(class_targets[..., None] == classes, class_logits.dtype)
    element = focal_loss(class_logits, one_hot, alpha, gamma)
    class_sum = ops.sum(ops.where(class_targets[..., None] != -2, element, 0.0))
    box_element = huber_loss(box_deltas, box_targets, delta)
    box_sum = ops.sum(ops.where(box_targets != 0.0, box_element, 0.0))
    return class_sum, box_sum


def segmentation_loss_sum(
    logits, labels, ignore_label=255, label_smoothing=0.0, class_weights=None, probabilities=None
):
    """Sum of the softmax cross entropy over all labeled pixels, and their number.

    Args:
        logits: `[B, H, W, C]`.
        labels: `[B, H, W]` int; class, or `ignore_label`.
        ignore_label: pixels that do not count.
        label_smoothing: share of a label that is spread evenly over all classes, in [0, 1).
        class_weights: `[C]` factors on the loss of each class' pixels, or None.
        probabilities: `[B, H, W, C]`, a distribution to learn in place of the class (distillation),
            or None; `labels` then only tell which pixels count.

    Returns:
        Two scalars. The released loss divides the first by the second, whatever the weights.
    """
    valid = ops.cast(labels != ignore_label, logits.dtype)
    classes = ops.arange(logits.shape[-1], dtype=labels.dtype)
    if probabilities is None:
        probabilities = ops.cast(labels[..., None] == classes, logits.dtype)
    smooth = probabilities * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    cross_entropy = -ops.sum(smooth * ops.log_softmax(logits, axis=-1), axis=-1)
    if class_weights is not None:
        cross_entropy *= ops.sum(probabilities * ops.convert_to_tensor(class_weights), axis=-1)
    return ops.sum(cross_entropy * valid), ops.sum(valid)

"""Computations for which a backend has a kernel of its own that is clearly faster."""

import keras
from keras import ops

from official_selftrain.utils.types import Tensor


def normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization by the statistics of this replica's batch, with its gradient.

    Args:
        x: `[B, H, W, C]` float32.
        gamma: `[C]`, scale.
        beta: `[C]`, offset.
        epsilon: added to the biased variance.

    Returns:
        Normalized `[B, H, W, C]`; mean and unbiased variance `[C]`, which have no gradient.
    """
    if keras.backend.backend() != "tensorflow":
        return _in_closed_form(x, gamma, beta, epsilon)
    import tensorflow as tf

    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=[], variance=[], epsilon=epsilon, is_training=True
    )[:3]


def _in_closed_form(x, gamma, beta, epsilon):
    """`normalize` with a gradient in closed form, for backends without such a kernel."""
    count = ops.cast(ops.prod(ops.shape(x)[:3]), "float32")

    @ops.custom_gradient
    def normalize(x, gamma, beta):
        axes = (0, 1, 2)
        mean = ops.mean(x, axes)
        variance = ops.mean(ops.square(x - mean), axes)
        deviation = ops.rsqrt(variance + epsilon)
        scale = gamma * deviation

        # Only dy and dy * x are summed over the batch; all else is a multiply-add per element.
        def gradient(upstream, **_):
            dy = upstream[0]
            dbeta = ops.sum(dy, axes)
            dgamma = (ops.sum(dy * x, axes) - mean * dbeta) * deviation
            slope = -scale * deviation * dgamma / count
            return dy * scale + x * slope - (scale * dbeta / count + slope * mean), dgamma, dbeta

        return (x * scale + (beta - mean * scale), mean, variance), gradient

    # Reshaping makes tensors of the variables, which a custom gradient cannot take.
    y, mean, variance = normalize(x, ops.reshape(gamma, (-1,)), ops.reshape(beta, (-1,)))
    return y, mean, variance * count / ops.maximum(count - 1.0, 1.0)

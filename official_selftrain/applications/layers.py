"""Primitive layers of the released networks, named as in the released checkpoints.

A layer is called like its TF1 variable scope with `.` in place of `/`, for example
`spinenet.sub_policy0.scale_permuted_block_2.conv2d_1`, because Keras allows no slash in a name.
So `layer.name.replace(".", "/") + "/" + variable.name` is the name in a released checkpoint.
"""

import dataclasses

import keras
from keras import ops

from official_selftrain.engine.replicas import ReplicaSeed
from official_selftrain.ops import resize


@dataclasses.dataclass(frozen=True)
class NormActivation:
    """Batch normalization and the activation that follows it.

    Attributes:
        activation: "relu" or "swish".
        momentum: share of the old moving average that is kept in one step.
        epsilon: added to the variance.
        synchronized: compute batch statistics over all replicas.
        trainable: False freezes statistics, scale and offset.
    """

    activation: str = "swish"
    momentum: float = 0.997
    epsilon: float = 1e-3
    synchronized: bool = False
    trainable: bool = True


class Scope:
    """Builds layers under one name scope, counting unnamed ones as TF1 does.

    Calls create `conv2d`, `conv2d_1`, ... and `batch_normalization`, `batch_normalization_1`, ...
    in order, so the order of calls is part of the checkpoint format.

    Args:
        path: the scope, with dots.
        norm: `NormActivation` of every batch normalization.
        drop_block: `(keep_prob, block_size)` of `DropBlock`, or None for none.
    """

    def __init__(self, path, norm, drop_block=None):
        self.path = path
        self.norm_settings = norm
        self.drop_block_settings = drop_block
        self._counts = {}

    def child(self, name):
        path = f"{self.path}.{name}" if self.path else name
        return Scope(path, self.norm_settings, self.drop_block_settings)

    def name(self, kind):
        count = self._counts.get(kind, 0)
        self._counts[kind] = count + 1
        return f"{self.path}.{kind}" + (f"_{count}" if count else "")

    def conv(self, x, filters, kernel_size, strides=1, dilation=1):
        """Bias-free convolution whose padding does not depend on the input size."""
        padding = "same"
        if strides > 1:
            before = (kernel_size - 1) // 2
            after = kernel_size - 1 - before
            name = self.name("pad")
            x = keras.layers.ZeroPadding2D(((before, after), (before, after)), name=name)(x)
            padding = "valid"
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            dilation_rate=dilation,
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in"),
            name=self.name("conv2d"),
        )(x)

    def norm(self, x, activate=True):
        settings = self.norm_settings
        x = batch_norm(settings, self.name("batch_normalization"))(x)
        return self.activation(x) if activate else x

    def conv_norm(self, x, filters, kernel_size, strides=1, activate=True, dilation=1):
        return self.norm(self.conv(x, filters, kernel_size, strides, dilation), activate)

    def activation(self, x):
        kind = self.norm_settings.activation
        return keras.layers.Activation(kind, name=self.name(kind))(x)

    def drop_block(self, x):
        if self.drop_block_settings is None:
            return x
        return DropBlock(*self.drop_block_settings, name=self.name("drop_block"))(x)


def batch_norm(settings, name):
    """A batch normalization layer with `settings`, a `NormActivation`."""
    return BatchNorm(
        momentum=settings.momentum,
        epsilon=settings.epsilon,
        synchronized=settings.synchronized,
        trainable=settings.trainable,
        name=name,
    )


@keras.saving.register_keras_serializable("official_selftrain")
class BatchNorm(keras.layers.BatchNormalization):
    """Keras' batch normalization with a gradient in closed form, for unsynchronized training.

    The same numbers in fewer passes over the activations, which bound narrow networks on the CPU.
    On JAX statistics are those of all devices, `synchronized` or not.
    """

    def __init__(self, *arguments, synchronized=False, **named):
        synchronized = synchronized and keras.backend.backend() != "jax"
        super().__init__(*arguments, synchronized=synchronized, **named)

    def call(self, x, training=None, mask=None):
        if not training or not self.trainable or self.synchronized or mask is not None:
            return super().call(x, training=training, mask=mask)
        # Reshaping makes tensors of the variables, which a custom gradient cannot take.
        gamma, beta = ops.reshape(self.gamma, (-1,)), ops.reshape(self.beta, (-1,))
        y, mean, variance = _normalize(ops.cast(x, "float32"), gamma, beta, self.epsilon)
        for average, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moved = self.momentum * average + (1.0 - self.momentum) * ops.stop_gradient(value)
            average.assign(ops.cast(moved, average.dtype))
        return ops.cast(y, self.compute_dtype)


def _normalize(x, gamma, beta, epsilon):
    """Normalized `[B, H, W, C]`, and mean and biased variance `[C]`, which carry no gradient."""

    @ops.custom_gradient
    def normalize(x, gamma, beta):
        axes = (0, 1, 2)
        mean = ops.mean(x, axes)
        variance = ops.mean(ops.square(x - mean), axes)
        deviation = ops.rsqrt(variance + epsilon)
        scale = gamma * deviation

        def gradient(*upstream, **_):
            # One gradient for each output from TensorFlow, all in a tuple from JAX.
            dy = upstream[0][0] if isinstance(upstream[0], tuple) else upstream[0]
            count = ops.cast(ops.prod(ops.shape(x)[:3]), "float32")
            dbeta = ops.sum(dy, axes)
            dgamma = (ops.sum(dy * x, axes) - mean * dbeta) * deviation
            slope = -scale * deviation * dgamma / count
            return dy * scale + x * slope - (scale * dbeta / count + slope * mean), dgamma, dbeta

        return (x * scale + (beta - mean * scale), mean, variance), gradient

    return normalize(x, gamma, beta)


@keras.saving.register_keras_serializable("official_selftrain")
class DropConnect(keras.layers.Layer):
    """Drops the whole residual branch of an example ("stochastic depth"), in training only.

    A kept branch is divided by the probability of being kept. Input and output `[B, H, W, C]`.

    Args:
        rate: probability of dropping, in [0, 1).
    """

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        self.seed_generator = ReplicaSeed(seed)

    def call(self, x, training=False):
        if not training or not self.rate:
            return x
        keep = 1.0 - self.rate
        shape = (ops.shape(x)[0], 1, 1, 1)
        mask = ops.floor(keep + keras.random.uniform(shape, seed=self.seed_generator))
        return x / keep * ops.cast(mask, x.dtype)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable("official_selftrain")
class DropBlock(keras.layers.Layer):
    """Drops square blocks of a feature map, each channel by itself, in training only.

    Ghiasi et al., "DropBlock", NeurIPS 2018, with the released code's rescaling by the share of
    cells that were kept. Input and output `[B, H, W, C]`, H and W fixed.

    Args:
        keep_prob: share of cells to keep, in (0, 1].
        block_size: side of a block in cells; at most the side of the map is used.
    """

    def __init__(self, keep_prob, block_size, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.keep_prob = keep_prob
        self.block_size = block_size
        self.seed = seed
        self.seed_generator = ReplicaSeed(seed)

    def call(self, x, training=False):
        if not training:
            return x
        height, width, channels = x.shape[1:]
        size = min(self.block_size, height, width)
        corners = (height - size + 1, width - size + 1)
        rate = (1.0 - self.keep_prob) * height * width / (size**2 * corners[0] * corners[1])
        shape = (ops.shape(x)[0], *corners, channels)
        corner = ops.cast(keras.random.uniform(shape, seed=self.seed_generator) < rate, "float32")
        around = ((0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0))
        dropped = ops.max_pool(ops.pad(corner, around), size, strides=1)
        kept = 1.0 - dropped
        return x * ops.cast(kept / ops.maximum(ops.mean(kept), 1e-6), x.dtype)

    def get_config(self):
        config = {"keep_prob": self.keep_prob, "block_size": self.block_size, "seed": self.seed}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("official_selftrain")
class BilinearUpsample(keras.layers.Layer):
    """Bilinear up-sampling with TF1's rule, `[B, H, W, C]` to `[B, f * H, f * W, C]`.

    Source coordinate = target / factor, clamped at the far edge: no half-pixel shift, which
    `keras.ops.image.resize` has.
    """

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return resize.upsample(x, self.factor)

    def compute_output_shape(self, input_shape):
        batch, *sides, channels = input_shape
        return (batch, *(side and side * self.factor for side in sides), channels)

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


@keras.saving.register_keras_serializable("official_selftrain")
class NearestResize(keras.layers.Layer):
    """Nearest-neighbor resize with TF1's index rule, `[B, h, w, C]` to `[B, height, width, C]`.

    Source index = min(floor(target index * (in / out)), in - 1), in float32: neither half-pixel
    centers nor aligned corners, which no resize of `keras.ops` offers.
    """

    def __init__(self, height, width, **kwargs):
        super().__init__(**kwargs)
        self.height = height
        self.width = width

    def call(self, x):
        for axis, size in ((1, self.height), (2, self.width)):
            x = ops.take(x, resize.nearest_indices(x.shape[axis], size), axis=axis)
        return x

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.height, self.width, input_shape[3])

    def get_config(self):
        return {**super().get_config(), "height": self.height, "width": self.width}

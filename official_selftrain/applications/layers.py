"""Layers of the released networks, named as in the released checkpoints.

The name of a layer is its TF1 variable scope with `.` instead of `/`, for example
`spinenet.sub_policy0.scale_permuted_block_2.conv2d_1`, because Keras allows no slash in a name.
So `layer.name.replace(".", "/") + "/" + variable.name` is the name in a released checkpoint.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from official_selftrain.engine.kernels import normalize
from official_selftrain.engine.replicas import ReplicaSeed, replicas
from official_selftrain.ops import resize
from official_selftrain.utils.types import Tensor


@dataclasses.dataclass(frozen=True)
class NormActivation:
    """Batch normalization and the activation that follows it.

    Attributes:
        activation: "relu", "relu6" or "swish".
        momentum: decay of the moving averages in each step, in [0, 1).
        epsilon: added to the variance.
        synchronized: whether batch statistics are those of all replicas.
        trainable: False freezes statistics, scale and offset.
    """

    activation: str = "swish"
    momentum: float = 0.997
    epsilon: float = 1e-3
    synchronized: bool = False
    trainable: bool = True


class Scope:
    """Builds layers under one name scope and counts those of a kind, as TF1 does.

    Calls create `conv2d`, `conv2d_1`, ... and `batch_normalization`, `batch_normalization_1`, ...
    in order, so the order of calls is part of the checkpoint format.

    Args:
        path: the name scope, with dots.
        norm: settings of every batch normalization, and the activation.
        drop_block: `(keep_prob, block_size)` of `DropBlock`; None adds no such layer.
    """

    def __init__(
        self, path: str, norm: NormActivation, drop_block: tuple[float, int] | None = None
    ) -> None:
        self.path = path
        self.norm_settings = norm
        self.drop_block_settings = drop_block
        self._counts: dict[str, int] = {}

    def child(self, name: str) -> "Scope":
        """A scope below this one, which counts from the beginning."""
        path = f"{self.path}.{name}" if self.path else name
        return Scope(path, self.norm_settings, self.drop_block_settings)

    def name(self, kind: str) -> str:
        """The name of the next layer of a kind, such as "conv2d"."""
        count = self._counts.get(kind, 0)
        self._counts[kind] = count + 1
        return f"{self.path}.{kind}" + (f"_{count}" if count else "")

    def conv(
        self, x: Tensor, filters: int, kernel_size: int, *, strides: int = 1, dilation: int = 1
    ) -> Tensor:
        """A convolution without bias, `[B, H, W, C]` to `[B, H / strides, W / strides, filters]`.

        With a stride, the padding does not depend on the size of the input.
        """
        padding = "same"
        if strides > 1:
            # "same" would pad an even side on one edge only, unlike the released code.
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

    def norm(self, x: Tensor, *, activate: bool = True) -> Tensor:
        """A batch normalization of `[B, H, W, C]` and, if wanted, the activation."""
        settings = self.norm_settings
        x = batch_norm(settings, self.name("batch_normalization"))(x)
        return self.activation(x) if activate else x

    def conv_norm(
        self,
        x: Tensor,
        filters: int,
        kernel_size: int,
        *,
        strides: int = 1,
        dilation: int = 1,
        activate: bool = True,
    ) -> Tensor:
        """`conv` followed by `norm`."""
        x = self.conv(x, filters, kernel_size, strides=strides, dilation=dilation)
        return self.norm(x, activate=activate)

    def activation(self, x: Tensor) -> Tensor:
        """The activation of the scope, element by element."""
        kind = self.norm_settings.activation
        return keras.layers.Activation(kind, name=self.name(kind))(x)

    def drop_block(self, x: Tensor) -> Tensor:
        """`DropBlock` of `[B, H, W, C]` if the scope has one, otherwise `x`."""
        if self.drop_block_settings is None:
            return x
        return DropBlock(*self.drop_block_settings, name=self.name("drop_block"))(x)


def batch_norm(settings: NormActivation, name: str) -> "BatchNorm":
    """A batch-normalization layer with the given settings, without their activation."""
    return BatchNorm(
        momentum=settings.momentum,
        epsilon=settings.epsilon,
        synchronized=settings.synchronized,
        trainable=settings.trainable,
        name=name,
    )


@keras.saving.register_keras_serializable("official_selftrain")
class BatchNorm(keras.layers.BatchNormalization):
    """Keras' batch normalization, by a fused kernel where the statistics are those of one replica.

    It computes the same numbers in fewer passes over the activations; on a CPU these passes limit
    the speed of narrow networks. Input and output `[B, H, W, C]`.

    As in the released code, the moving variance is the mean of the unbiased variances of the
    batches, and with `synchronized` that of the biased ones.

    Args:
        arguments, named: those of `keras.layers.BatchNormalization`.
        synchronized: whether batch statistics are those of all replicas. On JAX they always are.
    """

    def __init__(self, *arguments: Any, synchronized: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Keras refuses the argument on JAX, where a batch is one array over all devices anyway.
        self.synchronized = synchronized

    def call(self, x: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalizes `[B, H, W, C]`; in training by, and with an update of, batch statistics."""
        if not training or not self.trainable or (self.synchronized and replicas() > 1):
            return super().call(x, training=training, mask=mask)
        # In 16 bits a sum over all pixels of a batch would lose most of its digits.
        x = ops.cast(x, "float32")
        y, mean, variance = normalize(x, self.gamma, self.beta, self.epsilon)
        if self.synchronized:
            count = ops.cast(ops.prod(ops.shape(x)[:3]), "float32")
            variance = variance * (count - 1.0) / count
        for average, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            # The averages are not part of the loss, so no gradient may flow through them.
            moved = self.momentum * average + (1.0 - self.momentum) * ops.stop_gradient(value)
            average.assign(ops.cast(moved, average.dtype))
        return ops.cast(y, self.compute_dtype)


@keras.saving.register_keras_serializable("official_selftrain")
class DropConnect(keras.layers.Layer):
    """Drops the whole residual branch of an example ("stochastic depth"), in training only.

    A kept branch is divided by the probability of being kept. Input and output `[B, H, W, C]`.

    Args:
        rate: probability of dropping, in [0, 1).
        seed: of the random numbers; None draws one.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        # Keras' own generator would drop the same positions of the batch on every replica.
        self.seed_generator = ReplicaSeed(seed)

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """Drops examples of `[B, H, W, C]` in training."""
        if not training or not self.rate:
            return x
        keep = 1.0 - self.rate
        shape = (ops.shape(x)[0], 1, 1, 1)
        # 1 with probability `keep`, otherwise 0.
        mask = ops.floor(keep + keras.random.uniform(shape, seed=self.seed_generator))
        return x / keep * ops.cast(mask, x.dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@keras.saving.register_keras_serializable("official_selftrain")
class DropBlock(keras.layers.Layer):
    """Drops square blocks of a feature map, in each channel others, in training only.

    Ghiasi et al., "DropBlock", NeurIPS 2018. As in the released code, the rest is divided by the
    fraction of cells that were kept. Input and output `[B, H, W, C]`, where H and W are fixed.

    Args:
        keep_prob: fraction of cells to keep, in (0, 1].
        block_size: side of a block in cells; blocks are never larger than the map.
        seed: of the random numbers; None draws one.
    """

    def __init__(
        self, keep_prob: float, block_size: int, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.keep_prob = keep_prob
        self.block_size = block_size
        self.seed = seed
        self.seed_generator = ReplicaSeed(seed)

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """Drops blocks of `[B, H, W, C]` in training."""
        if not training:
            return x
        height, width, channels = x.shape[1:]
        size = min(self.block_size, height, width)
        # Blocks lie wholly inside of the map, so fewer cells than it has can be their corner; the
        # rate makes up for it.
        corners = (height - size + 1, width - size + 1)
        rate = (1.0 - self.keep_prob) * height * width / (size**2 * corners[0] * corners[1])
        shape = (ops.shape(x)[0], *corners, channels)
        corner = ops.cast(keras.random.uniform(shape, seed=self.seed_generator) < rate, "float32")
        around = ((0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0))
        dropped = ops.max_pool(ops.pad(corner, around), size, strides=1)
        kept = 1.0 - dropped
        # If everything was dropped, the mean is 0, and 0 / 0 would be NaN.
        return x * ops.cast(kept / ops.maximum(ops.mean(kept), 1e-6), x.dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        config = {"keep_prob": self.keep_prob, "block_size": self.block_size, "seed": self.seed}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("official_selftrain")
class BilinearUpsample(keras.layers.Layer):
    """Upsampling by TF1's bilinear rule, `[B, H, W, C]` to `[B, factor * H, factor * W, C]`.

    `keras.ops.image.resize` would shift the result by half a pixel; see `ops.resize`.

    Args:
        factor: at least 1.
    """

    def __init__(self, factor: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x: Tensor) -> Tensor:
        """Upsamples `[B, H, W, C]`."""
        return resize.upsample(x, self.factor)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape of the output; an open side stays open."""
        batch, *sides, channels = input_shape
        return (batch, *(side and side * self.factor for side in sides), channels)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "factor": self.factor}


@keras.saving.register_keras_serializable("official_selftrain")
class NearestResize(keras.layers.Layer):
    """A resize by TF1's nearest-neighbor rule, `[B, h, w, C]` to `[B, height, width, C]`.

    No resize of `keras.ops` takes the same pixels; see `ops.resize`.

    Args:
        height, width: size of the output in pixels.
    """

    def __init__(self, height: int, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.height = height
        self.width = width

    def call(self, x: Tensor) -> Tensor:
        """Resizes `[B, h, w, C]`, where h and w are known."""
        for axis, size in ((1, self.height), (2, self.width)):
            x = ops.take(x, resize.nearest_indices(x.shape[axis], size), axis=axis)
        return x

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """`(batch, height, width, channels)`."""
        return (input_shape[0], self.height, self.width, input_shape[3])

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "height": self.height, "width": self.width}

"""Segmenter: fuses the levels of a pyramid into one map and classifies its pixels.

The released segmentation network of Zoph et al. 2020, and the atrous spatial pyramid pooling (ASPP)
of Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
"""

from collections.abc import Sequence

import keras
from keras import ops

from official_selftrain.applications.layers import (
    BilinearUpsample,
    NormActivation,
    Scope,
    batch_norm,
)
from official_selftrain.models.fpn import input_levels
from official_selftrain.utils.types import StrPath


def Segmenter(
    pyramid: keras.Model,
    num_classes: int,
    *,
    level: int = 2,
    num_convs: int = 3,
    fusion: bool = True,
    norm: NormActivation | None = None,
    weights: StrPath | None = None,
    name: str = "segmenter",
) -> keras.Model:
    """Puts a segmentation head on a pyramid.

    Args:
        pyramid: any `keras.Model` whose output is a dict of levels such as
            `{"3": [B, H / 8, W / 8, D], ...}`, with one D for all levels, for example a `NASFPN`.
        num_classes: number of classes, including the background.
        level: the head has stride `2^level`. That of the released networks is 2, which is finer
            than any level of their pyramid.
        num_convs: number of 3x3 convolutions in the head, each with D channels.
        fusion: whether the head gets the sum of all levels, resized bilinearly to its stride, or
            only the level of its stride.
        norm: batch-norm settings and activation of the head; None is ReLU with the settings of
            `NormActivation`.
        weights: path of a `.weights.h5` file to load, or None.
        name: name of the model.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to `{"logits": [B, H / 2^level,
        W / 2^level, num_classes]}`, float32.

    Raises:
        ValueError: if the levels differ in channels, or lack `level` without fusion.
    """
    # 99: no level is too coarse.
    levels = input_levels(pyramid, min(map(int, pyramid.output)), 99)
    channels = {x.shape[-1] for x in levels.values()}
    if len(channels) != 1 or not (fusion or level in levels):
        raise ValueError(
            "`pyramid` must return levels with one number of channels and, without fusion, level "
            f"{level}. Received { {key: x.shape for key, x in levels.items()} }."
        )
    scope = Scope("segmentation", norm or NormActivation("relu"))
    x = _fuse(levels, level, scope) if fusion else levels[level]
    for index in range(num_convs):
        x = _conv(x, x.shape[-1], 3, f"segmentation.conv-{index}")
        x = scope.activation(batch_norm(scope.norm_settings, f"segmentation.conv-{index}-bn")(x))
    # In float32 also with a 16-bit policy: the loss needs the precision.
    logits = _conv(x, num_classes, 1, "segmentation.conv2d", dtype="float32")
    model = keras.Model(pyramid.input, {"logits": logits}, name=name)
    if weights is not None:
        model.load_weights(weights)
    return model


def _fuse(levels, target, scope):
    resized = []
    for level, x in levels.items():
        if level > target:
            x = BilinearUpsample(2 ** (level - target), name=scope.name("upsample"))(x)
        elif level < target:
            # Without half-pixel centers, a bilinear resize by a whole factor only picks pixels.
            pool = keras.layers.MaxPooling2D
            x = pool(1, 2 ** (target - level), padding="same", name=scope.name("subsample"))(x)
        resized.append(x)
    if len(resized) == 1:  # Keras adds no fewer than two tensors
        return resized[0]
    return keras.layers.Add(name="segmentation.fused")(resized)


def _conv(x, filters, kernel_size, name, dtype=None):
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        padding="same",
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        dtype=dtype,
        name=name,
    )(x)


def ASPP(
    backbone: keras.Model,
    *,
    level: int = 5,
    filters: int = 256,
    dilations: Sequence[int] = (6, 12, 18),
    name: str = "aspp",
) -> keras.Model:
    """Applies atrous spatial pyramid pooling to one level of a backbone.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels such as
            `{"5": [B, H / 32, W / 32, C], ...}`.
        level: the level that is replaced.
        filters: channels of each branch and of the result.
        dilations: one for each branch with 3x3 convolutions.
        name: name of the model.

    Returns:
        A `keras.Model` with the levels of `backbone`, of which `level` has `filters` channels.
    """
    # As released, whatever the configuration says about the other layers.
    scope = Scope("aspp", NormActivation("relu", epsilon=1e-4))
    x = backbone.output[str(level)]
    mean = keras.layers.GlobalAveragePooling2D(keepdims=True, name=scope.name("average_pool"))(x)
    mean = scope.conv_norm(mean, filters, 1)
    branches = [scope.conv_norm(x, filters, 1)]
    branches += [scope.conv_norm(x, filters, 3, dilation=dilation) for dilation in dilations]
    # Addition broadcasts the mean to all cells, also where the size of the image is not known.
    everywhere = mean + ops.zeros_like(branches[0])
    x = keras.layers.Concatenate(name=scope.name("concatenate"))([everywhere, *branches])
    outputs = {**backbone.output, str(level): scope.conv_norm(x, filters, 1)}
    return keras.Model(backbone.input, outputs, name=name)

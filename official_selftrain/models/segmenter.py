"""Segmenter: the levels of a pyramid fused into one map, and a convolutional head on it.

The released segmentation network of Zoph et al. 2020, with the ASPP option of Chen et al.,
"Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
"""

import keras
from keras import ops

from official_selftrain.applications.layers import (
    BilinearUpsample,
    NormActivation,
    Scope,
    batch_norm,
)
from official_selftrain.models.fpn import input_levels


def Segmenter(
    pyramid,
    num_classes,
    level=2,
    num_convs=3,
    fusion=True,
    norm=None,
    weights=None,
    name="segmenter",
):
    """Puts a segmentation head on a pyramid.

    Args:
        pyramid: any `keras.Model` whose output is a dict of levels `{"3": [B, H/8, W/8, D], ...}`
            with one D, such as a `NASFPN`.
        num_classes: channels of the logits, background included.
        level: the head works at stride `2^level`. The released networks take 2, finer than any
            level of their pyramid.
        num_convs: 3x3 convolutions of the head, with D channels.
        fusion: sum all levels, each resized bilinearly to the head's stride; otherwise take
            `level`.
        norm: `NormActivation` of the head.
        weights: path of a `.weights.h5` file to load, or None.
        name: name of the model.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to `{"logits": [B, H / 2^level,
        W / 2^level, num_classes]}`, float32.

    Raises:
        ValueError: if the pyramid's levels differ in channels, or lack `level` without fusion.
    """
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
        elif level < target:  # without half-pixel centers, this is sub-sampling
            pool = keras.layers.MaxPooling2D
            x = pool(1, 2 ** (target - level), padding="same", name=scope.name("subsample"))(x)
        resized.append(x)
    if len(resized) == 1:
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


def ASPP(backbone, level=5, filters=256, dilations=(6, 12, 18), name=None):
    """Replaces one level of a backbone by atrous spatial pyramid pooling.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels.
        level: the level to replace.
        filters: channels of each branch and of the result.
        dilations: of the 3x3 branches.
        name: name of the model.

    Returns:
        A `keras.Model` with the levels of `backbone`, `level` having `filters` channels.
    """
    scope = Scope(
        "aspp", NormActivation("relu", 0.997, 1e-4)
    )  # as released, whatever the configuration
    x = backbone.output[str(level)]
    mean = keras.layers.GlobalAveragePooling2D(keepdims=True, name=scope.name("average_pool"))(x)
    mean = scope.conv_norm(mean, filters, 1)
    branches = [scope.conv_norm(x, filters, 1)]
    branches += [scope.conv_norm(x, filters, 3, dilation=dilation) for dilation in dilations]
    everywhere = mean + ops.zeros_like(branches[0])
    x = keras.layers.Concatenate(name=scope.name("concatenate"))([everywhere, *branches])
    outputs = {**backbone.output, str(level): scope.conv_norm(x, filters, 1)}
    return keras.Model(backbone.input, outputs, name=name or "aspp")

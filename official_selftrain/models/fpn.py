"""Feature pyramid network: coarse levels are added to finer ones, from the top down.

Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, as released: strided
convolutions make two more, coarser levels, and each level ends in a batch normalization.
"""

import keras

from official_selftrain.applications.layers import NormActivation, Scope, batch_norm
from official_selftrain.utils.types import Tensor


def FPN(
    backbone: keras.Model,
    *,
    min_level: int = 3,
    max_level: int = 7,
    filters: int = 256,
    separable: bool = False,
    norm: NormActivation | None = None,
    name: str = "fpn",
) -> keras.Model:
    """Puts a feature pyramid on a backbone.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels, such as
            `{"3": [B, H / 8, W / 8, C], ...}`.
        min_level, max_level: finest and coarsest level of the result. Levels that the backbone
            lacks are made from its coarsest one by strided convolutions.
        filters: channels of every level.
        separable: use depthwise-separable convolutions.
        norm: batch-norm settings; the activation is not used.

    Returns:
        A `keras.Model` from images `[B, H, W, 3]` to `{"3": ..., ..., "7": ...}`, where level `l`
        is `[B, H / 2^l, W / 2^l, filters]`.

    Raises:
        ValueError: if the backbone lacks a level, or if its input size is not divisible by the
            stride of its coarsest level.
    """
    inputs = input_levels(backbone, min_level, max_level)
    scope = Scope("fpn", norm or NormActivation())
    finest, coarsest = min(inputs), max(inputs)
    # Otherwise, upsampling a level by 2 would not give the size of the next finer one.
    if any(side is not None and side % 2**coarsest for side in backbone.input.shape[1:3]):
        raise ValueError(
            f"FPN needs an input height and width divisible by {2**coarsest} = 2^{coarsest}, so "
            f"that each level is half the next finer one. Received {backbone.input.shape[1:3]}."
        )
    merged = {
        level: neck_conv(x, filters, 1, f"fpn.l{level}", separable=separable)
        for level, x in inputs.items()
    }
    for level in range(coarsest - 1, finest - 1, -1):
        above = keras.layers.UpSampling2D(2, name=scope.name("upsample"))(merged[level + 1])
        merged[level] = keras.layers.Add(name=scope.name("add"))([above, merged[level]])
    levels = {
        level: neck_conv(x, filters, 3, f"fpn.post_hoc_d{level}", separable=separable)
        for level, x in merged.items()
    }
    for level in range(coarsest + 1, max_level + 1):
        x = levels[level - 1]
        if level > coarsest + 1:  # as released: no activation before the first of these levels
            x = keras.layers.Activation("relu", name=scope.name("relu"))(x)
        levels[level] = neck_conv(x, filters, 3, f"fpn.p{level}", separable=separable, strides=2)
    # Unlike the paper, the release normalizes each level, but without an activation.
    outputs = {
        str(level): batch_norm(scope.norm_settings, f"fpn.p{level}-bn")(levels[level])
        for level in sorted(levels)
    }
    return keras.Model(backbone.input, outputs, name=name)


def input_levels(backbone: keras.Model, min_level: int, max_level: int) -> dict[int, Tensor]:
    """The levels of a backbone that are not finer than one level and not coarser than another.

    Args:
        backbone: model whose output is a dict of levels, with digits as keys.
        min_level: finest level, which the backbone must have.
        max_level: coarsest level, which the backbone may lack.

    Returns:
        `{level: [B, H / 2^level, W / 2^level, C]}` in ascending order.

    Raises:
        ValueError: if the output is not a dict of levels, or lacks one in between.
    """
    levels = backbone.output
    if not isinstance(levels, dict) or not all(str(key).isdigit() for key in levels):
        raise ValueError(
            'The backbone must return a dict of levels such as {"3": [B, H/8, W/8, C], ...}. '
            f"Received {levels}. Backbones of this package do so with `include_top=False`."
        )
    levels = {int(key): x for key, x in levels.items() if min_level <= int(key) <= max_level}
    # Each level is made from its neighbor, so that none may be missing in between.
    if sorted(levels) != list(range(min_level, max(levels, default=-1) + 1)):
        raise ValueError(
            f"The backbone must return levels from {min_level} up without a gap. "
            f"Received levels {sorted(backbone.output)}."
        )
    return dict(sorted(levels.items()))


def neck_conv(
    x: Tensor, filters: int, kernel_size: int, name: str, *, separable: bool, strides: int = 1
) -> Tensor:
    """A convolution with bias and the initial weights of Keras, as the released necks have it.

    Args:
        x: `[B, H, W, C]`.
        filters: channels of the output.
        kernel_size: side of the kernel.
        name: name of the layer.
        separable: use a depthwise-separable convolution.
        strides: 1 or 2.

    Returns:
        `[B, H / strides, W / strides, filters]`, rounded up.
    """
    kind = keras.layers.SeparableConv2D if separable else keras.layers.Conv2D
    return kind(filters, kernel_size, strides, padding="same", name=name)(x)

"""Feature pyramid network: strong features at every level, top down.

Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, as released: two coarser
levels by strided convolution, and a batch norm on each level.
"""

import keras

from official_selftrain.applications.layers import NormActivation, Scope, batch_norm


def FPN(backbone, min_level=3, max_level=7, filters=256, separable=False, norm=None, name=None):
    """Puts a feature pyramid on a backbone.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels, such as
            `{"3": [B, H/8, W/8, C], ...}`.
        min_level: finest level returned.
        max_level: coarsest level returned; those that the backbone lacks are convolved from its
            last.
        filters: channels of every level.
        separable: depthwise-separable convolutions.
        norm: `NormActivation`, of which the batch-norm settings are used.
        name: name of the model.

    Returns:
        A `keras.Model` from the backbone's images to levels `min_level` to `max_level`, each
        `[B, H / 2^level, W / 2^level, filters]`, with keys as strings.

    Raises:
        ValueError: if the backbone lacks a level, or its input size does not halve evenly.
    """
    inputs = input_levels(backbone, min_level, max_level)
    scope = Scope("fpn", norm or NormActivation())
    finest, coarsest = min(inputs), max(inputs)
    if any(side is not None and side % 2**coarsest for side in backbone.input.shape[1:3]):
        raise ValueError(
            f"FPN needs an input height and width divisible by {2**coarsest} = 2^{coarsest}. "
            f"Received {backbone.input.shape[1:3]}."
        )
    merged = {
        level: neck_conv(x, filters, 1, f"fpn.l{level}", separable) for level, x in inputs.items()
    }
    for level in range(coarsest - 1, finest - 1, -1):
        above = keras.layers.UpSampling2D(2, name=scope.name("upsample"))(merged[level + 1])
        merged[level] = keras.layers.Add(name=scope.name("add"))([above, merged[level]])
    levels = {
        level: neck_conv(x, filters, 3, f"fpn.post_hoc_d{level}", separable)
        for level, x in merged.items()
    }
    for level in range(coarsest + 1, max_level + 1):
        x = levels[level - 1]
        if level > coarsest + 1:
            x = keras.layers.Activation("relu", name=scope.name("relu"))(x)
        levels[level] = neck_conv(x, filters, 3, f"fpn.p{level}", separable, strides=2)
    outputs = {
        str(level): batch_norm(scope.norm_settings, f"fpn.p{level}-bn")(levels[level])
        for level in sorted(levels)
    }
    return keras.Model(backbone.input, outputs, name=name or "fpn")


def input_levels(backbone, min_level, max_level):
    """The levels `{int: tensor}` of a backbone from `min_level` to `max_level`, as far as it goes.

    Raises:
        ValueError: if its output is no dict of levels, or lacks one.
    """
    levels = backbone.output
    if not isinstance(levels, dict) or not all(str(key).isdigit() for key in levels):
        raise ValueError(
            'The backbone must return a dict of levels such as {"3": [B, H/8, W/8, C], ...}. '
            f"Received {levels}. A model of this package does with include_top=False."
        )
    levels = {int(key): x for key, x in levels.items() if min_level <= int(key) <= max_level}
    if sorted(levels) != list(range(min_level, max(levels, default=-1) + 1)):
        raise ValueError(
            f"The backbone must return levels from {min_level} up without a gap. "
            f"Received levels {sorted(backbone.output)}."
        )
    return dict(sorted(levels.items()))


def neck_conv(x, filters, kernel_size, name, separable, strides=1):
    """Convolution with bias and default initial values, depthwise-separable if asked for."""
    kind = keras.layers.SeparableConv2D if separable else keras.layers.Conv2D
    return kind(filters, kernel_size, strides, padding="same", name=name)(x)

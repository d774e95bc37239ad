"""The stem and the two residual blocks that SpineNet and ResNet have in common."""

import keras

from official_selftrain.applications.layers import DropConnect, Scope
from official_selftrain.utils.types import Tensor

BOTTLENECK, RESIDUAL = "bottleneck", "residual"


def stem(images: Tensor, scope: Scope) -> Tensor:
    """A 7x7 convolution and max pooling, `[B, H, W, 3]` to `[B, H / 4, W / 4, 64]`, rounded up."""
    x = scope.conv_norm(images, 64, 7, strides=2)
    return keras.layers.MaxPooling2D(3, 2, padding="same", name=scope.name("max_pool"))(x)


def residual_block(
    kind: str,
    x: Tensor,
    filters: int,
    scope: Scope,
    *,
    strides: int = 1,
    project: bool = False,
    drop_rate: float | None = None,
) -> Tensor:
    """A residual block of version 1 with the stride on its first 3x3 convolution.

    Args:
        kind: `BOTTLENECK`, which has `4 * filters` output channels, or `RESIDUAL` with `filters`.
        x: `[B, H, W, C]`.
        filters: channels of the 3x3 convolutions.
        scope: names and counts the layers.
        strides: 1 or 2.
        project: put a 1x1 convolution into the shortcut; needed where the shape changes.
        drop_rate: probability of dropping the block in training ("drop connect"), in [0, 1). None
            adds no such layer; a rate of 0 adds one, so that saved states fit whatever the rate.

    Returns:
        `[B, H / strides, W / strides, channels]`, rounded up.
    """
    channels = 4 * filters if kind == BOTTLENECK else filters
    shortcut = x
    # As released, DropBlock follows every convolution, also that of the shortcut.
    if project:
        shortcut = scope.conv_norm(x, channels, 1, strides=strides, activate=False)
        shortcut = scope.drop_block(shortcut)
    if kind == BOTTLENECK:
        x = scope.drop_block(scope.conv_norm(x, filters, 1))
        x = scope.drop_block(scope.conv_norm(x, filters, 3, strides=strides))
        x = scope.conv_norm(x, channels, 1, activate=False)
    else:
        x = scope.drop_block(scope.conv_norm(x, filters, 3, strides=strides))
        x = scope.conv_norm(x, filters, 3, activate=False)
    x = scope.drop_block(x)
    # The whole branch is dropped, never the shortcut: an example then skips the block.
    if drop_rate is not None:
        x = DropConnect(drop_rate, name=scope.name("drop_connect"))(x)
    x = keras.layers.Add(name=scope.name("add"))([x, shortcut])
    return scope.activation(x)

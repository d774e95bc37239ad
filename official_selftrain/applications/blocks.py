"""What SpineNet and ResNet share: the stem and the two residual blocks."""

import keras

from official_selftrain.applications.layers import DropConnect

BOTTLENECK, RESIDUAL = "bottleneck", "residual"


def stem(images, scope):
    """7x7 convolution and max pooling to stride 4, 64 channels."""
    x = scope.conv_norm(images, 64, 7, strides=2)
    return keras.layers.MaxPooling2D(3, 2, padding="same", name=scope.name("max_pool"))(x)


def residual_block(kind, x, filters, scope, strides=1, project=False, drop_rate=None):
    """A residual block of version 1 with the stride on its (first) 3x3 convolution.

    Args:
        kind: `BOTTLENECK`, which has `4 * filters` outputs, or `RESIDUAL` with `filters`.
        x: `[B, H, W, C]`.
        filters: channels of the 3x3 convolutions.
        scope: `Scope` that names and counts the layers.
        strides: 1 or 2.
        project: put a 1x1 convolution into the shortcut.
        drop_rate: probability of dropping the block in training ("drop connect"); None builds none.
            A rate of 0 builds one all the same, so that weights fit whatever the rate.
    """
    channels = 4 * filters if kind == BOTTLENECK else filters
    shortcut = x
    if project:
        shortcut = scope.conv_norm(x, channels, 1, strides, activate=False)
        shortcut = scope.drop_block(shortcut)
    if kind == BOTTLENECK:
        x = scope.drop_block(scope.conv_norm(x, filters, 1))
        x = scope.drop_block(scope.conv_norm(x, filters, 3, strides))
        x = scope.conv_norm(x, channels, 1, activate=False)
    else:
        x = scope.drop_block(scope.conv_norm(x, filters, 3, strides))
        x = scope.conv_norm(x, filters, 3, activate=False)
    x = scope.drop_block(x)
    if drop_rate is not None:
        x = DropConnect(drop_rate, name=scope.name("drop_connect"))(x)
    x = keras.layers.Add(name=scope.name("add"))([x, shortcut])
    return scope.activation(x)

"""RetinaNet: a class tower and a box tower that all levels of a pyramid share.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. As in the released code, each
convolution of a tower has one batch normalization per level.
"""

import math

import keras

from official_selftrain.applications.layers import NormActivation, Scope, batch_norm
from official_selftrain.ops.anchors import ANCHORS_PER_CELL
from official_selftrain.utils.types import StrPath


def RetinaNet(
    backbone: keras.Model,
    num_classes: int,
    *,
    num_convs: int = 4,
    num_filters: int = 256,
    norm: NormActivation | None = None,
    weights: StrPath | None = None,
    name: str = "retinanet",
) -> keras.Model:
    """Puts a RetinaNet head on a pyramid.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels such as
            `{"3": [B, H / 8, W / 8, D], ...}`, with one D for all levels.
        num_classes: number of classes, including the background. That is class 0 and is trained
            like a class that never occurs (released code).
        num_convs: number of 3x3 convolutions in each tower.
        num_filters: channels of the towers.
        norm: batch-norm settings and activation of the towers.
        weights: path of a `.weights.h5` file to load, or None.
        name: name of the model.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to a dict of float32: `class_logits`
        `[B, R, num_classes]` and `box_deltas` `[B, R, 4]`, (ty, tx, th, tw). The R anchors are
        ordered as in `ops.anchors.anchor_boxes`: by level, row, column and anchor of the cell.

    Raises:
        ValueError: if the backbone does not return a dict of levels with one number of channels.
    """
    levels = backbone.output
    if not isinstance(levels, dict) or len({x.shape[-1] for x in levels.values()}) != 1:
        raise ValueError(
            "`backbone` must return a dict of levels with one number of channels, such as "
            f'{{"3": [B, H/8, W/8, D], ...}}. Received {levels}. A backbone returns levels if '
            "it is built with `include_top=False`; FPN and NASFPN give them one number of channels."
        )
    levels = {level: levels[level] for level in sorted(levels, key=int)}
    outputs = _outputs(
        levels, num_classes, num_convs, num_filters, Scope("retinanet", norm or NormActivation())
    )
    model = keras.Model(backbone.input, outputs, name=name)
    if weights is not None:
        model.load_weights(weights)
    return model


def _outputs(levels, num_classes, num_convs, num_filters, scope):
    # Every class starts with probability 0.01. With 0.5, the loss of the many negative anchors
    # would drown that of the positive ones in the first steps.
    class_bias = -math.log((1 - 0.01) / 0.01)
    outputs = {}
    for output, kind, depth, bias in (
        ("class_logits", "class", num_classes, class_bias),
        ("box_deltas", "box", 4, 0.0),
    ):
        tower = _Tower(scope.child(f"{kind}_net"), kind, num_convs, num_filters)
        predict = _conv(f"{tower.scope.path}.{kind}-predict", ANCHORS_PER_CELL * depth, 1e-5, bias)
        per_level = [
            # In float32 also with a 16-bit policy: the losses need the precision.
            keras.layers.Reshape((-1, depth), dtype="float32", name=f"{output}_{level}")(
                predict(tower(x, level))
            )
            for level, x in levels.items()
        ]
        outputs[output] = keras.layers.Concatenate(axis=1, dtype="float32", name=output)(per_level)
    return outputs


class _Tower:
    """Convolutions that all levels share, each followed by a batch normalization of the level."""

    def __init__(self, scope, kind, num_convs, num_filters):
        self.scope = scope
        self.names = [f"{scope.path}.{kind}-{i}" for i in range(num_convs)]
        self.convs = [_conv(name, num_filters, 0.01) for name in self.names]

    def __call__(self, x, level):
        for name, conv in zip(self.names, self.convs, strict=True):
            x = batch_norm(self.scope.norm_settings, f"{name}-{level}")(conv(x))
            x = self.scope.activation(x)
        return x


def _conv(name, filters, stddev, bias=0.0):
    return keras.layers.Conv2D(
        filters,
        3,
        padding="same",
        kernel_initializer=keras.initializers.RandomNormal(stddev=stddev),
        bias_initializer=keras.initializers.Constant(bias),
        name=name,
    )

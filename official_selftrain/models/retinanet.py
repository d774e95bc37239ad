"""RetinaNet: a class tower and a box tower shared by all pyramid levels.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, with the released code's batch
normalization per convolution and level.
"""

import math

import keras

from official_selftrain.applications.layers import NormActivation, Scope, batch_norm


def RetinaNet(
    backbone,
    num_classes,
    num_anchors=9,
    num_convs=4,
    num_filters=256,
    norm=None,
    weights=None,
    name="retinanet",
):
    """Puts a RetinaNet head on a pyramid.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels, `{"3": [B, H/8, W/8, D], ...}`
            with one D for all levels.
        num_classes: class channels including the background, which is class 0 and is trained as a
            class that never occurs (released code).
        num_anchors: anchors per cell.
        num_convs: 3x3 convolutions in each tower.
        num_filters: channels of the towers.
        norm: `NormActivation` of the towers.
        weights: path of a `.weights.h5` file to load, or None.
        name: name of the model.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to a dict: `class_logits`
        `[B, R, num_classes]` and `box_deltas` `[B, R, 4]` as (ty, tx, th, tw), float32, where R
        runs over levels, then rows, columns and anchors, as in `ops.anchors.anchor_boxes`.

    Raises:
        ValueError: if `backbone` does not return a dict of levels with equal channels.
    """
    levels = backbone.output
    if not isinstance(levels, dict) or len({x.shape[-1] for x in levels.values()}) != 1:
        raise ValueError(
            "`backbone` must return a dict of levels with one number of channels, such as "
            f'{{"3": [B, H/8, W/8, D], ...}}. Received {levels}. A backbone returns levels with '
            "include_top=False; FPN and NASFPN give them one number of channels."
        )
    levels = {level: levels[level] for level in sorted(levels, key=int)}
    scope = Scope("retinanet", norm or NormActivation())
    class_bias = -math.log((1 - 0.01) / 0.01)  # every class starts at probability 0.01
    outputs = {}
    for output, kind, depth, bias in (
        ("class_logits", "class", num_classes, class_bias),
        ("box_deltas", "box", 4, 0.0),
    ):
        tower = _Tower(scope.child(f"{kind}_net"), kind, num_convs, num_filters)
        predict = _conv(f"{tower.scope.path}.{kind}-predict", num_anchors * depth, 1e-5, bias)
        per_level = [
            keras.layers.Reshape((-1, depth), dtype="float32", name=f"{output}_{level}")(
                predict(tower(x, level))
            )
            for level, x in levels.items()
        ]
        outputs[output] = keras.layers.Concatenate(axis=1, dtype="float32", name=output)(per_level)
    model = keras.Model(backbone.input, outputs, name=name)
    if weights is not None:
        model.load_weights(weights)
    return model


class _Tower:
    """Convolutions shared by all levels, each followed by the level's own batch norm."""

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

"""NAS-FPN: a feature pyramid whose cell was found by search, stacked several times.

Ghiasi et al., "NAS-FPN", CVPR 2019, as released.
"""

import keras

from official_selftrain.applications.layers import NormActivation, Scope, batch_norm
from official_selftrain.models.fpn import input_levels, neck_conv

ATTENTION, SUM = "attention", "sum"

# (level, combination, inputs): nodes 0 to 4 are levels 3 to 7 of the cell before.
CELL = [
    (4, ATTENTION, (1, 3)),
    (4, SUM, (1, 5)),
    (3, SUM, (0, 6)),
    (4, SUM, (6, 7)),
    (5, ATTENTION, (7, 8)),
    (7, ATTENTION, (6, 9)),
    (6, ATTENTION, (9, 10)),
]
OUTPUTS = 5  # the last nodes are the outputs


def NASFPN(
    backbone,
    filters=256,
    repeats=7,
    separable=False,
    sum_only=False,
    drop_block=None,
    norm=None,
    name=None,
):
    """Puts a NAS-FPN of levels 3 to 7 on a backbone.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels from 3 up. Levels that it lacks
            are pooled from its last. Height and width must be divisible by 128.
        filters: channels of every level.
        repeats: cells, each with its own weights.
        separable: depthwise-separable convolutions.
        sum_only: sum where the cell combines by attention.
        drop_block: `(keep_prob, block_size)` of `layers.DropBlock` after each node, or None.
        norm: `NormActivation` of the cells; its activation precedes each convolution.
        name: name of the model.

    Returns:
        A `keras.Model` from the backbone's images to `{"3": ..., ..., "7": ...}`, each
        `[B, H / 2^level, W / 2^level, filters]`.

    Raises:
        ValueError: if the backbone lacks level 3, or its size is not divisible by 128.
    """
    if any(side is not None and side % 128 for side in backbone.input.shape[1:3]):
        raise ValueError(
            "NAS-FPN needs an input height and width divisible by 128 = 2^7. "
            f"Received {backbone.input.shape[1:3]}."
        )
    norm = norm or NormActivation()
    levels = _to_width(input_levels(backbone, 3, 7), filters, separable, norm)
    for index in range(repeats):
        scope = Scope(f"fpn_cells.cell_{index}", norm, drop_block)
        levels = _cell(levels, filters, separable, sum_only, scope)
    outputs = {str(level): x for level, x in levels.items()}
    return keras.Model(backbone.input, outputs, name=name or "nasfpn")


def _to_width(levels, filters, separable, norm):
    """Levels 3 to 7 with `filters` channels."""
    for level, x in levels.items():
        if x.shape[-1] != filters:
            kind = "separable_conv2d" if separable else "conv2d"
            x = neck_conv(x, filters, 1, f"resample_l{level}.{kind}", separable)
            levels[level] = batch_norm(norm, f"resample_l{level}.bn")(x)
    for level in range(max(levels) + 1, 8):
        pool = keras.layers.MaxPooling2D(2, 2, padding="same", name=f"resample_l{level}.max_pool")
        levels[level] = pool(levels[level - 1])
    return levels


def _cell(levels, filters, separable, sum_only, scope):
    nodes = [(level, levels[level]) for level in range(3, 8)]
    unused = set(range(len(nodes)))
    for index, (level, combination, inputs) in enumerate(CELL):
        node_scope = scope.child(f"sub_policy{index}")
        unused -= set(inputs)
        # The coarser input gates the other; the first one where both have the same level.
        gate, other = sorted(inputs, key=lambda i: -nodes[i][0])
        gate, other = (_resample(*nodes[i], level, node_scope) for i in (gate, other))
        if combination == ATTENTION and not sum_only:
            other = _attend(gate, other, node_scope)
        x = keras.layers.Add(name=node_scope.name("add"))([gate, other])
        if index >= len(CELL) - OUTPUTS:
            for orphan in sorted(i for i in unused if nodes[i][0] == level):
                x = keras.layers.Add(name=node_scope.name("add"))([x, nodes[orphan][1]])
                unused.remove(orphan)
        after = node_scope.child(f"op_after_combine{len(nodes)}")
        x = neck_conv(after.activation(x), filters, 3, f"{after.path}.conv", separable)
        x = after.drop_block(batch_norm(scope.norm_settings, f"{after.path}.bn")(x))
        unused.add(len(nodes))
        nodes.append((level, x))
    return dict(sorted(nodes[-OUTPUTS:]))


def _resample(level, x, target, scope):
    if target > level:
        stride = 2 ** (target - level)
        pool = keras.layers.MaxPooling2D
        return pool(stride, stride, padding="same", name=scope.name("max_pool"))(x)
    if target < level:
        return keras.layers.UpSampling2D(2 ** (level - target), name=scope.name("upsample"))(x)
    return x


def _attend(gate, x, scope):
    """`x` times a gate for each channel: the sigmoid of the largest value in the image."""
    gate = keras.layers.GlobalMaxPooling2D(keepdims=True, name=scope.name("global_max_pool"))(gate)
    gate = keras.layers.Activation("sigmoid", name=scope.name("sigmoid"))(gate)
    return keras.layers.Multiply(name=scope.name("attend"))([x, gate])

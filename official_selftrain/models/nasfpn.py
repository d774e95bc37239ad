"""NAS-FPN: a stack of cells, found by search, that combine the levels of a pyramid.

Ghiasi et al., "NAS-FPN", CVPR 2019, as released.
"""

from typing import NamedTuple

import keras

from official_selftrain.applications.layers import NormActivation, Scope, batch_norm
from official_selftrain.models.fpn import input_levels, neck_conv

ATTENTION, SUM = "attention", "sum"


class Node(NamedTuple):
    """A combination of two earlier nodes of a cell.

    Attributes:
        level: level of the result.
        combination: `ATTENTION` or `SUM`.
        inputs: numbers of the nodes combined; 0 to 4 are levels 3 to 7 of the cell before.
    """

    level: int
    combination: str
    inputs: tuple[int, int]


CELL = [
    Node(4, ATTENTION, (1, 3)),
    Node(4, SUM, (1, 5)),
    Node(3, SUM, (0, 6)),
    Node(4, SUM, (6, 7)),
    Node(5, ATTENTION, (7, 8)),
    Node(7, ATTENTION, (6, 9)),
    Node(6, ATTENTION, (9, 10)),
]
OUTPUTS = 5  # the last nodes are the outputs


def NASFPN(
    backbone: keras.Model,
    *,
    filters: int = 256,
    repeats: int = 7,
    separable: bool = False,
    sum_only: bool = False,
    drop_block: tuple[float, int] | None = None,
    norm: NormActivation | None = None,
    name: str = "nasfpn",
) -> keras.Model:
    """Puts a NAS-FPN of levels 3 to 7 on a backbone.

    Args:
        backbone: any `keras.Model` whose output is a dict of levels from 3 up, such as
            `{"3": [B, H / 8, W / 8, C], ...}`. Levels that it lacks are made from its coarsest one
            by max pooling. Height and width must be divisible by 128.
        filters: channels of every level.
        repeats: number of cells, each of which has its own weights.
        separable: use depthwise-separable convolutions.
        sum_only: sum where the cell would combine by attention.
        drop_block: `(keep_prob, block_size)` of `layers.DropBlock` after each node, or None.
        norm: batch-norm settings of the cells, and the activation before each convolution.
        name: name of the model.

    Returns:
        A `keras.Model` from images `[B, H, W, 3]` to `{"3": ..., ..., "7": ...}`, where level `l`
        is `[B, H / 2^l, W / 2^l, filters]`.

    Raises:
        ValueError: if the backbone lacks level 3, or if its input size is not divisible by 128.
    """
    if any(side is not None and side % 128 for side in backbone.input.shape[1:3]):
        raise ValueError(
            "NAS-FPN needs an input height and width divisible by 128 = 2^7, so that each of its "
            f"levels is half the next finer one. Received {backbone.input.shape[1:3]}."
        )
    norm = norm or NormActivation()
    levels = _to_width(input_levels(backbone, 3, 7), filters, separable, norm)
    for index in range(repeats):
        scope = Scope(f"fpn_cells.cell_{index}", norm, drop_block)
        levels = _cell(levels, filters, separable, sum_only, scope)
    outputs = {str(level): x for level, x in levels.items()}
    return keras.Model(backbone.input, outputs, name=name)


def _to_width(levels, filters, separable, norm):
    """Levels 3 to 7 with `filters` channels each, from those that the backbone has."""
    # A level that has the right number of channels is used as it is, as in the release.
    for level, x in levels.items():
        if x.shape[-1] != filters:
            kind = "separable_conv2d" if separable else "conv2d"
            x = neck_conv(x, filters, 1, f"resample_l{level}.{kind}", separable=separable)
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
        # A node that no other has used goes into the output of its level, so that nothing is lost.
        if index >= len(CELL) - OUTPUTS:
            for orphan in sorted(i for i in unused if nodes[i][0] == level):
                x = keras.layers.Add(name=node_scope.name("add"))([x, nodes[orphan][1]])
                unused.remove(orphan)
        after = node_scope.child(f"op_after_combine{len(nodes)}")
        x = neck_conv(after.activation(x), filters, 3, f"{after.path}.conv", separable=separable)
        x = after.drop_block(batch_norm(scope.norm_settings, f"{after.path}.bn")(x))
        unused.add(len(nodes))
        nodes.append((level, x))
    # The outputs were made in another order than that of their levels.
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
    """`x` times a gate per channel: the sigmoid of the largest value of `gate` in the image."""
    gate = keras.layers.GlobalMaxPooling2D(keepdims=True, name=scope.name("global_max_pool"))(gate)
    gate = keras.layers.Activation("sigmoid", name=scope.name("sigmoid"))(gate)
    return keras.layers.Multiply(name=scope.name("attend"))([x, gate])

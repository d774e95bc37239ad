"""SpineNet: a backbone that permutes scales and connects blocks across them.

Du et al., "SpineNet: Learning Scale-Permuted Backbone for Recognition and Localization", CVPR 2020.
The networks equal the released ones of the self-training paper to float precision.
"""

import dataclasses
import math
from typing import NamedTuple

import keras

from official_selftrain.applications import classifier, imagenet
from official_selftrain.applications.blocks import BOTTLENECK, RESIDUAL, residual_block, stem
from official_selftrain.applications.layers import NearestResize, NormActivation, Scope
from official_selftrain.config.networks import SPINENETS as VARIANTS
from official_selftrain.config.networks import SpineNetVariant as Variant
from official_selftrain.utils.types import StrPath, Tensor


class BlockSpec(NamedTuple):
    """A row of the table that the search found.

    Attributes:
        level: the block has stride `2^level`.
        kind: `BOTTLENECK` or `RESIDUAL`.
        parents: numbers of the two blocks that are added; 0 and 1 are the stem's.
        is_output: whether the block is a level of the pyramid.
    """

    level: int
    kind: str
    parents: tuple[int, int]
    is_output: bool


BLOCKS = [
    BlockSpec(2, BOTTLENECK, (0, 1), False),
    BlockSpec(4, RESIDUAL, (0, 1), False),
    BlockSpec(3, BOTTLENECK, (2, 3), False),
    BlockSpec(4, BOTTLENECK, (2, 4), False),
    BlockSpec(6, RESIDUAL, (3, 5), False),
    BlockSpec(4, BOTTLENECK, (3, 5), False),
    BlockSpec(5, RESIDUAL, (6, 7), False),
    BlockSpec(7, RESIDUAL, (6, 8), False),
    BlockSpec(5, BOTTLENECK, (8, 9), False),
    BlockSpec(5, BOTTLENECK, (8, 10), False),
    BlockSpec(4, BOTTLENECK, (5, 10), True),
    BlockSpec(3, BOTTLENECK, (4, 10), True),
    BlockSpec(5, BOTTLENECK, (7, 12), True),
    BlockSpec(7, BOTTLENECK, (5, 14), True),
    BlockSpec(6, BOTTLENECK, (12, 14), True),
]


@dataclasses.dataclass
class _Block:
    """The output of a block, and whether a later block has already used it."""

    tensor: Tensor
    level: int
    kind: str
    used: bool = False


def SpineNet(
    variant: str,
    include_top: bool = True,
    weights: StrPath | None = None,
    input_tensor: Tensor | None = None,
    input_shape: classifier.InputShape | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: classifier.Activation = "softmax",
    name: str | None = None,
    *,
    stochastic_depth: float | None = None,
    norm: NormActivation | None = None,
    sizes: Variant | None = None,
) -> keras.Model:
    """Builds a SpineNet as a classifier or as a pyramid of levels 3 to 7.

    Args:
        variant: a name in `VARIANTS`.
        include_top: end in the classifier.
        weights: None for random weights, or the path of a `.weights.h5` file.
        input_tensor: existing input to build on, normalized images.
        input_shape: `(height, width, 3)` in pixels, divisible by 8. The sides must be known because
            the connections between blocks depend on them. None is 224 with the top, 640 without.
        pooling: without the top, "avg" or "max" for pooled features, None for the pyramid.
        classes, classifier_activation: outputs of the classifier, 1001 in the released ones (the
            background is first); None as activation gives logits.
        stochastic_depth: probability of dropping the last block in training, in (0, 1). Earlier
            blocks are dropped less, in proportion to their position. None never drops.
        norm: batch-norm settings and activation; None takes those of `NormActivation`.
        sizes: sizes that replace those of the variant.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to probabilities `[B, classes]`,
        pooled features `[B, endpoint_filters]`, or `{"3": ..., ..., "7": ...}`, where level `l` is
        `[B, H / 2^l, W / 2^l, endpoint_filters]`, rounded up.

    Raises:
        ValueError: for an unknown variant, bad weights, or a side that 8 does not divide.
    """
    if variant not in VARIANTS:
        raise ValueError(f"SpineNet variant {variant!r} is unknown; choose from {list(VARIANTS)}.")
    classifier.check_weights(weights, f"spinenet{variant}")
    images = _image_input(input_shape, input_tensor, include_top)
    scope = Scope("spinenet", norm or NormActivation())  # as released, for all variants
    levels = _Builder(scope, sizes or VARIANTS[variant]).levels(images, stochastic_depth or 0.0)
    model = classifier.assemble(
        images,
        levels,
        lambda: _mean_of_levels(levels, scope),
        scope,
        include_top=include_top,
        pooling=pooling,
        classes=classes,
        classifier_activation=classifier_activation,
        name=name,
    )
    imagenet.load_weights(model, f"spinenet{variant}", weights)
    return model


def _image_input(input_shape, input_tensor, include_top):
    if input_shape is None and not include_top:
        input_shape = (640, 640, 3)
    images = classifier.image_input(input_shape, input_tensor, 224, include_top)
    if any(side is None or side % 8 for side in images.shape[1:3]):
        raise ValueError(
            "SpineNet needs a fixed height and width divisible by 8. Received "
            f"{images.shape[1:3]}; give `input_shape=(height, width, 3)`."
        )
    return images


def _mean_of_levels(levels, scope):
    """What the classifier pools: each level repeated to the size of level 3 (Du et al., section
    4.4; "aggregation: all" of the released classification configs)."""
    height, width = levels[3].shape[1:3]
    same_size = [
        NearestResize(height, width, name=scope.name("resize"))(x) for x in levels.values()
    ]
    return keras.layers.Average(name=scope.name("average"))(same_size)


class _Builder:
    """The layers of a SpineNet, named as in the released checkpoints."""

    def __init__(self, scope, sizes):
        self.scope = scope
        self.sizes = sizes

    def levels(self, images, stochastic_depth):
        blocks = self._stem(images)
        for index, spec in enumerate(BLOCKS):
            height, width = (math.ceil(side / 2**spec.level) for side in images.shape[1:3])
            drop_rate = stochastic_depth * (index + 1) / len(BLOCKS)
            blocks.append(self._block(index, blocks, (height, width), drop_rate))
        # The last five blocks are the outputs, one for each level. Their convolutions are made in
        # ascending order, because the order numbers them.
        outputs = {block.level: block.tensor for block in blocks[-5:]}
        return {
            level: self.scope.conv_norm(outputs[level], self.sizes.endpoint_filters, 1)
            for level in sorted(outputs)
        }

    def _stem(self, images):
        x = stem(images, self.scope)
        blocks = []
        for _ in range(2):
            for _ in range(self.sizes.block_repeats):
                filters = self.sizes.filters(2)
                # Only the first block of the network changes the number of channels.
                project = x.shape[-1] != 4 * filters
                x = residual_block(BOTTLENECK, x, filters, self.scope, project=project)
            blocks.append(_Block(x, 2, BOTTLENECK))
        return blocks

    def _block(self, index, blocks, size, drop_rate):
        """The sum of two earlier blocks, resampled to `size`, through its convolutions."""
        spec = BLOCKS[index]
        scope = self.scope.child(f"sub_policy{index}")
        filters = self.sizes.filters(spec.level)
        channels = 4 * filters if spec.kind == BOTTLENECK else filters
        merged = []
        for position, parent in enumerate(spec.parents):
            blocks[parent].used = True
            resample_scope = scope.child(f"resample_with_alpha_resample_{index}_{position}")
            merged.append(self._resample(blocks[parent], size, channels, resample_scope))
        x = keras.layers.Add(name=scope.name("add"))(merged)
        if spec.is_output:
            # A block that nothing has used yet feeds the first output of its size.
            for block in blocks:
                if not block.used and block.tensor.shape[1:] == (*size, channels):
                    block.used = True
                    x = keras.layers.Add(name=scope.name("add"))([x, block.tensor])
        x = scope.activation(x)
        # Numbered like the parents, where the stem has 0 and 1.
        block_scope = scope.child(f"scale_permuted_block_{index + 2}")
        for _ in range(self.sizes.block_repeats):
            x = residual_block(spec.kind, x, filters, block_scope, drop_rate=drop_rate)
        return _Block(x, spec.level, spec.kind)

    def _resample(self, block, size, channels, scope):
        """Brings a block to `size` cells and to `channels`, without a last activation."""
        x, width = block.tensor, size[1]
        narrow = x.shape[-1] // 4 if block.kind == BOTTLENECK else x.shape[-1]
        narrow = int(narrow * self.sizes.resample_alpha)
        # As released, only the width decides on the operations; where the height, or a width that
        # that does not divide evenly, does not come out right, the last resize corrects it.
        source = x.shape[2]
        x = scope.conv_norm(x, narrow, 1)
        if source > width:
            x = scope.conv_norm(x, narrow, 3, strides=2)
            # The convolution has halved the size; one pooling does the rest.
            if source // width > 2:
                window = 3 if source / width <= 4 else 5
                strides = source // width // 2 if source % width == 0 else 2
                pool = keras.layers.MaxPooling2D
                x = pool(window, strides, padding="same", name=scope.name("max_pool"))(x)
        elif source < width and width % source == 0:
            x = keras.layers.UpSampling2D(width // source, name=scope.name("upsample"))(x)
        if x.shape[1:3] != size:
            x = NearestResize(*size, name=scope.name("resize"))(x)
        return scope.conv_norm(x, channels, 1, activate=False)


SpineNet49S = classifier.family_member(SpineNet, "49S", "SpineNet49S")
SpineNet49 = classifier.family_member(SpineNet, "49", "SpineNet49")
SpineNet96 = classifier.family_member(SpineNet, "96", "SpineNet96")
SpineNet143 = classifier.family_member(SpineNet, "143", "SpineNet143")
SpineNet143L = classifier.family_member(SpineNet, "143L", "SpineNet143L")
SpineNet190 = classifier.family_member(SpineNet, "190", "SpineNet190")

preprocess_input = classifier.preprocess_input
decode_predictions = classifier.decode_predictions

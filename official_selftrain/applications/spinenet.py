"""SpineNet: a backbone that permutes scales and connects blocks across them.

Du et al., "SpineNet: Learning Scale-Permuted Backbone for Recognition and Localization", CVPR 2020.
The networks equal the released ones of the self-training paper to float precision.
"""

import dataclasses
import math

import keras

from official_selftrain.applications import classifier
from official_selftrain.applications.blocks import BOTTLENECK, RESIDUAL, residual_block, stem
from official_selftrain.applications.layers import NearestResize, NormActivation, Scope
from official_selftrain.config.networks import SPINENETS as VARIANTS
from official_selftrain.config.networks import SpineNetVariant as Variant  # noqa: F401

# (level, block type, parents, is an output); parents 0 and 1 are the two stem blocks.
BLOCKS = [
    (2, BOTTLENECK, (0, 1), False),
    (4, RESIDUAL, (0, 1), False),
    (3, BOTTLENECK, (2, 3), False),
    (4, BOTTLENECK, (2, 4), False),
    (6, RESIDUAL, (3, 5), False),
    (4, BOTTLENECK, (3, 5), False),
    (5, RESIDUAL, (6, 7), False),
    (7, RESIDUAL, (6, 8), False),
    (5, BOTTLENECK, (8, 9), False),
    (5, BOTTLENECK, (8, 10), False),
    (4, BOTTLENECK, (5, 10), True),
    (3, BOTTLENECK, (4, 10), True),
    (5, BOTTLENECK, (7, 12), True),
    (7, BOTTLENECK, (5, 14), True),
    (6, BOTTLENECK, (12, 14), True),
]


@dataclasses.dataclass
class _Block:
    """A built block: its tensor, its level, and whether a later block took it as a parent."""

    tensor: object
    level: int
    kind: str
    connected: bool = False


def SpineNet(
    variant,
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name=None,
    *,
    stochastic_depth=None,
    norm=None,
    sizes=None,
):
    """Builds a SpineNet as a classifier or as a pyramid of levels 3 to 7.

    The classifier pools the mean of all levels, each repeated to the size of level 3 (Du et al.,
    section 4.4; "aggregation: all" of the released classification configs).

    Args:
        variant: a name in `VARIANTS`.
        include_top: end in the classifier.
        weights: None or a `.weights.h5` file.
        input_tensor: existing input to build on, normalized images.
        input_shape: `(height, width, 3)` in pixels, divisible by 8. Sizes are fixed because the
            connections between blocks depend on them. None: 224 with the top, 640 without.
        pooling: without the top, "avg" or "max" for pooled features, None for the pyramid.
        classes: of the classifier; the released ones have 1001, background first.
        classifier_activation: of the classifier, None for logits.
        name: name of the model.
        stochastic_depth: probability of dropping the deepest block in training, in (0, 1); earlier
            blocks are dropped less, in proportion to their index. None never drops.
        norm: `NormActivation`, batch-norm settings and activation.
        sizes: a `Variant` in place of the table's.

    Returns:
        A `keras.Model` from normalized images `[B, H, W, 3]` to probabilities `[B, classes]`,
        pooled features, or `{"3": ..., ..., "7": ...}`, level `l` being
        `[B, H / 2^l, W / 2^l, endpoint_filters]`, rounded up.

    Raises:
        ValueError: for an unknown variant, a size that is not divisible by 8, or unusable weights.
    """
    if variant not in VARIANTS:
        raise ValueError(f"SpineNet variant {variant!r} is unknown; choose from {list(VARIANTS)}.")
    classifier.check_weights(weights)
    sizes = sizes or VARIANTS[variant]
    if input_shape is None and not include_top:
        input_shape = (640, 640, 3)
    images = classifier.image_input(input_shape, input_tensor, 224, include_top)
    image_size = images.shape[1:3]
    if any(side is None or side % 8 for side in image_size):
        raise ValueError(
            f"SpineNet needs a fixed height and width divisible by 8. Received {image_size}."
        )
    scope = Scope("spinenet", norm or NormActivation())
    blocks = _stem(images, sizes, scope)
    for index, (level, kind, parents, is_output) in enumerate(BLOCKS):
        rate = (stochastic_depth or 0.0) * (index + 1) / len(BLOCKS)
        _scale_permuted_block(
            blocks, index, level, kind, parents, is_output, rate, sizes, image_size, scope
        )
    outputs = {block.level: block.tensor for block in blocks[-5:]}
    endpoints = {
        level: scope.conv_norm(outputs[level], sizes.endpoint_filters, 1)
        for level in sorted(outputs)
    }
    model = classifier.assemble(
        images,
        endpoints,
        lambda: _mean_of_levels(endpoints, scope),
        scope,
        include_top,
        pooling,
        classes,
        classifier_activation,
        name,
    )
    if weights is not None:
        model.load_weights(weights)
    return model


def _mean_of_levels(endpoints, scope):
    height, width = endpoints[3].shape[1:3]
    same_size = [
        NearestResize(height, width, name=scope.name("resize"))(x) for x in endpoints.values()
    ]
    return keras.layers.Average(name=scope.name("average"))(same_size)


def _stem(images, sizes, scope):
    x = stem(images, scope)
    blocks = []
    for _ in range(2):
        for _ in range(sizes.block_repeats):
            filters = sizes.filters(2)
            # Only the first block of the network changes the number of channels.
            x = residual_block(BOTTLENECK, x, filters, scope, project=x.shape[-1] != 4 * filters)
        blocks.append(_Block(x, 2, BOTTLENECK))
    return blocks


def _scale_permuted_block(
    blocks, index, level, kind, parents, is_output, rate, sizes, image_size, scope
):
    """Appends block `index + 2`: the sum of its resampled parents, through its convolutions."""
    scope = scope.child(f"sub_policy{index}")
    filters = sizes.filters(level)
    channels = 4 * filters if kind == BOTTLENECK else filters
    size = tuple(math.ceil(side / 2**level) for side in image_size)
    merged = []
    for position, parent in enumerate(parents):
        blocks[parent].connected = True
        resample_scope = scope.child(f"resample_with_alpha_resample_{index}_{position}")
        merged.append(_resample(blocks[parent], size, channels, sizes, resample_scope))
    x = keras.layers.Add(name=scope.name("add"))(merged)
    if is_output:
        # A block that nothing has used yet feeds the first output of its size.
        for block in blocks:
            if not block.connected and block.tensor.shape[1:] == (*size, channels):
                block.connected = True
                x = keras.layers.Add(name=scope.name("add"))([x, block.tensor])
    x = scope.activation(x)
    block_scope = scope.child(f"scale_permuted_block_{index + 2}")
    for _ in range(sizes.block_repeats):
        x = residual_block(kind, x, filters, block_scope, drop_rate=rate)
    blocks.append(_Block(x, level, kind))


def _resample(block, size, channels, sizes, scope):
    """Brings a parent to `size` cells and to `channels`, without a last activation.

    As released, widths alone decide the operations; the last resize makes other shapes fit.
    """
    width = size[1]
    x = block.tensor
    narrow = x.shape[-1] // 4 if block.kind == BOTTLENECK else x.shape[-1]
    narrow = int(narrow * sizes.resample_alpha)
    source = x.shape[2]
    x = scope.conv_norm(x, narrow, 1)
    if source > width:
        x = scope.conv_norm(x, narrow, 3, strides=2)
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

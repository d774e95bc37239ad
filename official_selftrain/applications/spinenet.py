"""SpineNet: a backbone that permutes scales and connects blocks across them.

Du et al., "SpineNet: Learning Scale-Permuted Backbone for Recognition and Localization", CVPR 2020.
The networks equal the released ones of the self-training paper to float precision.
"""

import dataclasses
import math

import keras

from official_selftrain.applications.layers import DropConnect, NearestResize, Norm, Scope

BOTTLENECK, RESIDUAL = "bottleneck", "residual"

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
FILTERS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one SpineNet: a row of the released scale table.

    Attributes:
        endpoint_filters: channels of every pyramid level returned.
        filter_size_scale: factor on `FILTERS`, truncated.
        resample_alpha: factor on the channels inside a resampling.
        block_repeats: copies of each block.
    """

    endpoint_filters: int
    filter_size_scale: float
    resample_alpha: float
    block_repeats: int

    def filters(self, level):
        return int(FILTERS[level] * self.filter_size_scale)


VARIANTS = {
    "49S": Variant(128, 0.65, 0.5, 1),
    "49": Variant(256, 1.0, 0.5, 1),
    "96": Variant(256, 1.0, 0.5, 2),
    "143": Variant(256, 1.0, 1.0, 3),
    "143L": Variant(256, 1.3, 1.0, 3),
    "190": Variant(512, 1.3, 1.0, 4),
}


@dataclasses.dataclass
class _Block:
    """A built block: its tensor, its level, and whether a later block took it as a parent."""

    tensor: object
    level: int
    kind: str
    connected: bool = False


def SpineNet(
    variant,
    input_shape,
    stochastic_depth=None,
    norm=None,
    input_tensor=None,
    name=None,
):
    """Builds a SpineNet as a pyramid of levels 3 to 7.

    Args:
        variant: a name in `VARIANTS` or a `Variant`.
        input_shape: `(height, width, 3)` in pixels, divisible by 8. Sizes are fixed because the
            connections between blocks depend on them.
        stochastic_depth: probability of dropping the deepest block in training, in (0, 1); earlier
            blocks are dropped less, in proportion to their index. None never drops.
        norm: `Norm`, batch-norm settings and activation.
        input_tensor: existing input to build on, normalised images.
        name: name of the model.

    Returns:
        A `keras.Model` from images `[B, H, W, 3]` to `{3: ..., ..., 7: ...}` with keys as strings,
        level `l` being `[B, H / 2^l, W / 2^l, endpoint_filters]`, rounded up.

    Raises:
        ValueError: for an unknown variant or a size that is not divisible by 8.
    """
    sizes = VARIANTS.get(variant, variant)
    if not isinstance(sizes, Variant):
        raise ValueError(f"SpineNet variant {variant!r} is unknown; choose from {list(VARIANTS)}.")
    if input_shape[0] % 8 or input_shape[1] % 8:
        raise ValueError(
            f"SpineNet needs an input height and width divisible by 8. Received {input_shape[:2]}."
        )
    scope = Scope("spinenet", norm or Norm())
    images = keras.Input(input_shape) if input_tensor is None else input_tensor
    blocks = _stem(images, sizes, scope)
    for index, (level, kind, parents, is_output) in enumerate(BLOCKS):
        rate = stochastic_depth * (index + 1) / len(BLOCKS) if stochastic_depth else 0.0
        _scale_permuted_block(
            blocks, index, level, kind, parents, is_output, rate, sizes, input_shape[:2], scope
        )
    outputs = {block.level: block.tensor for block in blocks[-5:]}
    endpoints = {
        str(level): scope.conv_norm(outputs[level], sizes.endpoint_filters, 1)
        for level in sorted(outputs)
    }
    return keras.Model(images, endpoints, name=name or "spinenet")


def _stem(images, sizes, scope):
    x = scope.conv_norm(images, 64, 7, strides=2)
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name=scope.name("max_pool"))(x)
    blocks = []
    for _ in range(2):
        for _ in range(sizes.block_repeats):
            x = _bottleneck(x, sizes.filters(2), scope)
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
    build = _bottleneck if kind == BOTTLENECK else _residual
    block_scope = scope.child(f"scale_permuted_block_{index + 2}")
    for _ in range(sizes.block_repeats):
        x = build(x, filters, block_scope, rate=rate)
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


def _bottleneck(x, filters, scope, rate=0.0):
    shortcut = x
    if x.shape[-1] != 4 * filters:  # only the first block of the stem
        shortcut = scope.conv_norm(x, 4 * filters, 1, activate=False)
    x = scope.conv_norm(x, filters, 1)
    x = scope.conv_norm(x, filters, 3)
    x = scope.conv_norm(x, 4 * filters, 1, activate=False)
    return _add_shortcut(x, shortcut, scope, rate)


def _residual(x, filters, scope, rate=0.0):
    shortcut = x
    x = scope.conv_norm(x, filters, 3)
    x = scope.conv_norm(x, filters, 3, activate=False)
    return _add_shortcut(x, shortcut, scope, rate)


def _add_shortcut(x, shortcut, scope, rate):
    if rate:
        x = DropConnect(rate, name=scope.name("drop_connect"))(x)
    x = keras.layers.Add(name=scope.name("add"))([x, shortcut])
    return scope.activation(x)


def _family_member(variant):
    def build(input_shape=(640, 640, 3), **kwargs):
        return SpineNet(variant, input_shape, **kwargs)

    build.__name__ = build.__qualname__ = f"SpineNet{variant}"
    build.__doc__ = f"SpineNet-{variant} as a pyramid of levels 3 to 7; arguments of `SpineNet`."
    return build


SpineNet49S = _family_member("49S")
SpineNet49 = _family_member("49")
SpineNet96 = _family_member("96")
SpineNet143 = _family_member("143")
SpineNet143L = _family_member("143L")
SpineNet190 = _family_member("190")


def preprocess_input(images):
    """Normalises RGB images `[..., 3]` from 0..255 to zero mean and unit variance (ImageNet)."""
    return keras.applications.imagenet_utils.preprocess_input(images, mode="torch")

"""Names and sizes of the backbones, and which of them have public weights.

`applications` builds the networks of these tables. They are here because a config is checked
without importing Keras.
"""

import dataclasses
import math
from typing import Literal

# Channels of the 3x3 convolutions by level. They stop growing at level 4, as in the paper, so that
# the coarse levels, where most blocks are, stay small.
SPINENET_FILTERS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}


@dataclasses.dataclass(frozen=True)
class SpineNetVariant:
    """Sizes of one SpineNet: a row of the released scale table.

    Attributes:
        endpoint_filters: channels of every level of the pyramid.
        filter_size_scale: factor on `SPINENET_FILTERS`, truncated.
        resample_alpha: factor on the channels inside a resampling.
        block_repeats: copies of each block.
    """

    endpoint_filters: int
    filter_size_scale: float
    resample_alpha: float
    block_repeats: int

    def filters(self, level: int) -> int:
        """Channels of the 3x3 convolutions at a level, 2 to 7, truncated to a whole number."""
        return int(SPINENET_FILTERS[level] * self.filter_size_scale)


SPINENETS = {
    "49S": SpineNetVariant(128, 0.65, 0.5, 1),
    "49": SpineNetVariant(256, 1.0, 0.5, 1),
    "96": SpineNetVariant(256, 1.0, 0.5, 2),
    "143": SpineNetVariant(256, 1.0, 1.0, 3),
    "143L": SpineNetVariant(256, 1.3, 1.0, 3),
    "190": SpineNetVariant(512, 1.3, 1.0, 4),
}


@dataclasses.dataclass(frozen=True)
class EfficientNetVariant:
    """Sizes of one EfficientNet: a row of the published scaling table.

    Attributes:
        width: factor on the channels, which are rounded to a multiple of 8.
        depth: factor on the repeats of a block, which are rounded up.
        size: side in pixels of the images that the published weights were trained on.
        dropout: dropout rate before the classifier.
        lite: whether it is an EfficientNet-Lite.
    """

    width: float
    depth: float
    size: int = 224
    dropout: float = 0.2
    lite: bool = False

    def channels(self, base: int) -> int:
        """Channels where EfficientNet-B0 has `base`."""
        scaled = base * self.width
        # Half of the multiple is added before the division, which rounds to the nearest one.
        rounded = max(8, int(scaled + 4) // 8 * 8)
        # Rounding must not take away more than a tenth.
        return rounded + 8 if rounded < 0.9 * scaled else rounded

    def repeats(self, base: int) -> int:
        """Repeats of a block that EfficientNet-B0 has `base` times."""
        return math.ceil(self.depth * base)


EFFICIENTNETS = {
    "b0": EfficientNetVariant(1.0, 1.0, 224, 0.2),
    "b1": EfficientNetVariant(1.0, 1.1, 240, 0.2),
    "b2": EfficientNetVariant(1.1, 1.2, 260, 0.3),
    "b3": EfficientNetVariant(1.2, 1.4, 300, 0.3),
    "b4": EfficientNetVariant(1.4, 1.8, 380, 0.4),
    "b5": EfficientNetVariant(1.6, 2.2, 456, 0.4),
    "b6": EfficientNetVariant(1.8, 2.6, 528, 0.5),
    "b7": EfficientNetVariant(2.0, 3.1, 600, 0.5),
    "b8": EfficientNetVariant(2.2, 3.6, 672, 0.5),
    "l2": EfficientNetVariant(4.3, 5.3, 800, 0.5),
    "lite0": EfficientNetVariant(1.0, 1.0, 224, 0.2, lite=True),
    "lite1": EfficientNetVariant(1.0, 1.1, 240, 0.2, lite=True),
    "lite2": EfficientNetVariant(1.1, 1.2, 260, 0.3, lite=True),
    "lite3": EfficientNetVariant(1.2, 1.4, 280, 0.3, lite=True),
    "lite4": EfficientNetVariant(1.4, 1.8, 300, 0.3, lite=True),
}

# depth: (kind of the blocks, blocks of each group)
RESNETS = {
    10: ("residual", (1, 1, 1, 1)),
    14: ("bottleneck", (1, 1, 1, 1)),
    18: ("residual", (2, 2, 2, 2)),
    26: ("bottleneck", (2, 2, 2, 2)),
    34: ("residual", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}

BACKBONES = (
    *(f"spinenet{variant}" for variant in SPINENETS),
    *(f"efficientnet-{variant}" for variant in EFFICIENTNETS),
    *(f"resnet{depth}" for depth in RESNETS),
)
BackboneName = Literal[BACKBONES]  # type: ignore[valid-type]
WITH_IMAGENET = (*(f"efficientnet-b{number}" for number in range(8)), "efficientnet-lite0")

"""Names and sizes of the backbones, and which of them have public weights.

`applications` builds the networks of these tables. They are here because a config is checked
without importing Keras.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from official_selftrain.utils.types import StrPath

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


class Stage(NamedTuple):
    """A row of the table of EfficientNet-B0.

    Attributes:
        channels: of the output.
        repeats: number of blocks.
        kernel_size: of the depthwise convolutions.
        strides: of the first block.
        expansion: factor on the channels inside a block.
    """

    channels: int
    repeats: int
    kernel_size: int
    strides: int
    expansion: int


STAGES = [
    Stage(16, 1, 3, 1, 1),
    Stage(24, 2, 3, 2, 6),
    Stage(40, 2, 5, 2, 6),
    Stage(80, 3, 3, 2, 6),
    Stage(112, 3, 5, 1, 6),
    Stage(192, 4, 5, 2, 6),
    Stage(320, 1, 3, 1, 6),
]


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

    def stem_channels(self) -> int:
        """Channels of the first convolution, which a Lite variant does not widen."""
        return 32 if self.lite else self.channels(32)

    def repeats(self) -> list[int]:
        """Number of blocks of each row of `STAGES`."""
        repeats = [math.ceil(self.depth * stage.repeats) for stage in STAGES]
        # The stem, the head and these two stages of a Lite variant have the size of B0's, because
        # they take the largest part of a small network.
        if self.lite:
            repeats[0] = repeats[-1] = 1
        return repeats

    def block_channels(self) -> list[int]:
        """Output channels of the stem and of each block, which tell all variants apart."""
        found = [self.stem_channels()]
        for stage, repeats in zip(STAGES, self.repeats(), strict=True):
            found += [self.channels(stage.channels)] * repeats
        return found


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

# name of a start: {backbone: where its weights are}, which is "keras" for `keras.applications`,
# "lite" for a package of the extra [lite], or a model of timm on the Hugging Face hub.
PUBLIC_WEIGHTS = {
    "imagenet": {
        **{f"efficientnet-b{number}": "keras" for number in range(8)},
        "efficientnet-b8": "timm/tf_efficientnet_b8.ra_in1k",
        **{f"efficientnet-lite{number}": "lite" for number in range(3)},
        **{f"efficientnet-lite{n}": f"timm/tf_efficientnet_lite{n}.in1k" for n in (3, 4)},
        **{f"resnet{depth}": f"timm/resnet{depth}.a1_in1k" for depth in (18, 34, 50)},
        **{f"resnet{depth}": f"timm/resnet{depth}.a1h_in1k" for depth in (101, 152)},
        "resnet26": "timm/resnet26.bt_in1k",
    },
    # ImageNet and 300 million unlabeled images, by Noisy Student.
    "imagenet++": {
        f"efficientnet-{size}": f"timm/tf_efficientnet_{size}.ns_jft_in1k"
        for size in (*(f"b{number}" for number in range(8)), "l2")
    },
}


def is_named(init: StrPath) -> bool:
    """Whether initial weights are named: a key of `PUBLIC_WEIGHTS`, or `timm/NAME` of the hub."""
    name = str(init)
    hub = name.startswith("timm/") and not name.endswith(".safetensors")
    return name in PUBLIC_WEIGHTS or hub


def is_public(init: StrPath) -> bool:
    """Whether initial weights are a public classifier's, by name or in a `.safetensors` file.

    They start only a backbone.
    """
    return is_named(init) or str(init).endswith(".safetensors")

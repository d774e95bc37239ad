"""The names of the backbones, and which of them have public weights."""

from typing import Literal

BACKBONES = (
    *(f"spinenet{variant}" for variant in ("49S", "49", "96", "143", "143L", "190")),
    *(f"efficientnet-b{number}" for number in range(9)),
    "efficientnet-l2",
    *(f"efficientnet-lite{number}" for number in range(5)),
    *(f"resnet{depth}" for depth in (10, 14, 18, 26, 34, 50, 101, 152, 200)),
)
BackboneName = Literal[BACKBONES]
WITH_IMAGENET = (*(f"efficientnet-b{number}" for number in range(8)), "efficientnet-lite0")

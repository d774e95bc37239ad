"""Recognizes the network of a released checkpoint by the names and shapes of its variables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from official_selftrain.config import networks
from official_selftrain.utils.errors import UserError

Shapes = Mapping[str, Sequence[int]]


def detect(shapes: Shapes) -> dict[str, Any]:
    """Recognizes an architecture.

    Args:
        shapes: `{variable name: shape}`.

    Returns:
        Fields of `config.NetworkConfig`, and the `kind` of the task.

    Raises:
        UserError: if the names contain no head or no backbone of the released code, or a shape does
            not occur in any network.
    """
    try:
        return _architecture(shapes)
    except (IndexError, KeyError, StopIteration, TypeError, ZeroDivisionError):
        raise UserError(
            "the variables of the checkpoint have shapes that no released network has; the file "
            "may be damaged, or written by another program"
        ) from None


def _architecture(shapes: Shapes) -> dict[str, Any]:
    kind = _first(shapes, {"retinanet/": "detection", "segmentation/": "segmentation"})
    backbone = _first(shapes, {"spinenet/": "spinenet", "resnet": "resnet", "efficientnet-": "e"})
    if kind is None or backbone is None:
        raise UserError(
            "the checkpoint is not a released detector or segmenter: expected variables under "
            "spinenet/, resnet50/, or efficientnet-b7/, and under retinanet/ or segmentation/; "
            "found "
            f"{', '.join(sorted({name.split('/')[0] for name in shapes})[:8])}"
        )
    found: dict[str, Any] = {"kind": kind, "neck": "none"}
    if any(name.startswith("fpn_cells/") for name in shapes):
        found |= _nasfpn(shapes)
    elif any(name.startswith("fpn/") for name in shapes):
        filters = shapes.get("fpn/p3-bn/beta", (256,))[0]
        separable = "fpn/l3/pointwise_kernel" in shapes
        found |= {"neck": "fpn", "neck_filters": filters, "neck_separable": separable}
    found |= {"spinenet": _spinenet, "resnet": _resnet, "e": _efficientnet}[backbone](shapes)
    return found | (_retinanet(shapes) if kind == "detection" else _segmenter(shapes))


def _first(shapes: Shapes, prefixes: dict[str, str]) -> str | None:
    """The meaning of the first prefix that some variable has."""
    for prefix, meaning in prefixes.items():
        if any(name.startswith(prefix) for name in shapes):
            return meaning
    return None


def _count(shapes: Shapes, pattern: str) -> int:
    """Number of variables whose names match a regular expression."""
    return len([name for name in shapes if re.fullmatch(pattern, name)])


def _retinanet(shapes: Shapes) -> dict[str, Any]:
    # The last layer has one output per class and anchor, and 9 anchors per position.
    # A name that is missing gets a default here; `assign` reports it later.
    predict = shapes.get("retinanet/class_net/class-predict/bias", (0,))[0]
    return {
        "num_classes": predict // 9,
        "head_convs": _count(shapes, r"retinanet/class_net/class-\d+/kernel"),
        "head_filters": shapes.get("retinanet/class_net/class-0/bias", (256,))[0],
    }


def _segmenter(shapes: Shapes) -> dict[str, Any]:
    return {
        "num_classes": shapes.get("segmentation/conv2d/bias", (21,))[0],
        "head_convs": _count(shapes, r"segmentation/conv-\d+/kernel"),
        "aspp": any(name.startswith("aspp/") for name in shapes),
    }


def _nasfpn(shapes: Shapes) -> dict[str, Any]:
    first = "sub_policy0/op_after_combine5/bn/beta"
    return {
        "neck": "nasfpn",
        "neck_filters": shapes.get(f"fpn_cells/cell_0/{first}", (256,))[0],
        "neck_repeats": _count(shapes, rf"fpn_cells/cell_\d+/{first}"),
        "neck_separable": _count(shapes, r"fpn_cells/.*/pointwise_kernel") > 0,
    }


def _spinenet(shapes: Shapes) -> dict[str, Any]:
    # Outside of the scale-permuted blocks there are 7 convolutions (the first one, a projection,
    # and five endpoints), and for each repeat two bottlenecks of 3.
    repeats = max(1, round((_count(shapes, r"spinenet/conv2d(_\d+)?/kernel") - 7) / 6))
    endpoints = shapes.get(f"spinenet/conv2d_{6 * repeats + 2}/kernel", (0,))[-1]
    block = "spinenet/sub_policy{}/scale_permuted_block_{}/conv2d/kernel"
    filters = {
        base: shapes.get(block.format(index, index + 2), (0,))[-1]
        for base, index in ((64, 0), (128, 2), (256, 3))
    }
    # Filters are rounded down, so the largest quotient is the closest to the scale.
    scale = max(count / base for base, count in filters.items())
    resampled = shapes.get(
        "spinenet/sub_policy0/resample_with_alpha_resample_0_0/conv2d/kernel", (1, 1, 1, 0)
    )
    sizes = networks.SpineNetVariant(
        endpoints, scale, 0.5 if resampled[-1] < filters[64] else 1.0, repeats
    )
    for name, known in networks.SPINENETS.items():
        # By the filters, because the exact scale cannot be recovered from rounded numbers.
        same = all(
            known.filters(level) == sizes.filters(level) for level in networks.SPINENET_FILTERS
        )
        rest = ("endpoint_filters", "resample_alpha", "block_repeats")
        if same and all(getattr(known, key) == getattr(sizes, key) for key in rest):
            return {"backbone": f"spinenet{name}"}
    return {"backbone": "spinenet49S", "backbone_sizes": dataclasses.asdict(sizes)}


def _resnet(shapes: Shapes) -> dict[str, Any]:
    name = next(name for name in shapes if name.startswith("resnet"))
    return {"backbone": name.split("/")[0]}


def _efficientnet(shapes: Shapes) -> dict[str, Any]:
    scope = next(name for name in shapes if name.startswith("efficientnet-")).split("/")[0]
    blocks = _count(shapes, rf"{scope}/blocks_\d+/depthwise_conv2d/depthwise_kernel")
    # Output channels block by block, which tell all sizes apart.
    channels = [shapes.get(f"{scope}/stem/conv2d/kernel", (0,))[-1]]
    for index in range(blocks):
        path = f"{scope}/blocks_{index}"
        project = shapes.get(f"{path}/conv2d_1/kernel") or shapes.get(f"{path}/conv2d/kernel", (0,))
        channels.append(project[-1])

    known = networks.EFFICIENTNETS.get(scope.removeprefix("efficientnet-"))
    if known is None or known.block_channels() == channels:
        return {"backbone": scope}
    # A variant with other sizes: the grid is that of the published multipliers.
    for depth in (known.depth, *(step / 10 for step in range(10, 60))):
        for width in (step / 20 for step in range(1, 100)):
            if networks.EfficientNetVariant(width, depth).block_channels() == channels:
                return {"backbone": scope, "backbone_sizes": {"width": width, "depth": depth}}
    return {"backbone": scope}


def describe(found: dict[str, Any]) -> str:
    """The result of `detect` as text for a message."""
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)

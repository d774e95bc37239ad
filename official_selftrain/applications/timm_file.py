"""Classifiers of timm (PyTorch Image Models) in safetensors files, from a path or from the hub.

A safetensors file holds numbers and their names, so that reading one executes nothing.
"""

import dataclasses
import logging
import pathlib
import statistics

import numpy as np

from official_selftrain.applications.public_names import (
    TIMM,
    Arrays,
    describe,
    from_torch,
    layer_names,
)
from official_selftrain.config.networks import PUBLIC_WEIGHTS, is_named
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.extras import import_extra
from official_selftrain.utils.files import read_json

WEIGHTS, SETTINGS = "model.safetensors", "config.json"  # the files of a model in the hub
# The nine neighbors under a max pooling are so much alike that they count as this number of
# independent ones: of 1 to 4, it brings the outputs in training nearest to timm's.
POOLED = 2


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a classifier, and what its training did otherwise than ours.

    Attributes:
        arrays: of the layers, by our names.
        mean, std: of the three colors in 0 to 1, by which images were normalized.
        epsilon: of the batch normalizations.
    """

    arrays: Arrays
    mean: list[float]
    std: list[float]
    epsilon: float


def read(backbone: str, source: str) -> Weights:
    """Reads the weights of a timm model.

    Args:
        backbone: the network that they must belong to, such as "resnet50".
        source: `timm/NAME`, which is downloaded once, or the path of a `.safetensors` file. A
            `config.json` beside it, as in the hub, tells how images were normalized.

    Raises:
        UserError: if the file cannot be had, is damaged, or holds another network.
    """
    file = _file(source)
    _check(backbone, source, file)
    tensors = _read(file, lambda tensors, name: tensors.get_tensor(name))
    tensors = {name: array for name, array in tensors.items() if array.dtype.kind == "f"}
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise UserError(f"{file} holds weights that are not finite; download it again")
    if backbone.startswith("resnet"):
        tensors |= _shortcut(tensors)
    tensors = {name: array.astype("float32") for name, array in tensors.items()}
    return Weights(from_torch(layer_names(backbone, TIMM), tensors), *_training(backbone, file))


def check(backbone: str, source: str) -> None:
    """Checks by names and shapes that `read` will find the weights of a backbone.

    Raises:
        UserError: see `read`.
    """
    _check(backbone, source, _file(source))


def _check(backbone, source, file):
    seems = describe(_read(file, lambda tensors, name: tensors.get_slice(name).get_shape()))
    if seems != backbone:
        public = [starts[backbone] for starts in PUBLIC_WEIGHTS.values() if backbone in starts]
        usual = [name for name in public if name.startswith("timm/")]
        raise UserError(
            f"{source} does not hold the weights of {backbone}: it seems to be {seems}; take a "
            f"file of {backbone}" + "".join(f", such as {name}" for name in usual[:1]) + ", or set "
            "task.backbone"
        )


def _read(file, take):
    """`{name: take(tensors, name)}` of a safetensors file."""
    library = import_extra("safetensors", "hub", f"reading {file}")
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(4)
        if beginning.startswith((b"PK\x03\x04", b"\x80")):  # of a zip archive, of a pickle
            raise UserError(
                f"{file} is a pickle of PyTorch under another name. A pickle can run code, so it "
                f"was not opened; give the {WEIGHTS} of a timm model on https://huggingface.co/timm"
            )
        with library.safe_open(file, "numpy") as tensors:
            return {name: take(tensors, name) for name in tensors.keys()}  # noqa: SIM118
    except UserError:
        raise
    except Exception as error:  # of the library, of the operating system, of NumPy
        raise UserError(
            f"{file} is not a safetensors file, or is damaged ({one_line(error)}); download it "
            "again"
        ) from None


def _training(backbone, file):
    """Mean, standard deviation and epsilon of a training."""
    settings = file.with_name(SETTINGS)
    values = read_json(settings) if settings.exists() else {}
    try:
        pixels = values.get("pretrained_cfg", {})
        mean, std = (
            [float(x) for x in pixels.get(k, v)] for k, v in (("mean", MEAN), ("std", STDDEV))
        )
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise ValueError
        architecture = str(values.get("architecture", "tf_"))
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{settings} is not the {SETTINGS} of a timm model; delete it") from None
    if not values:
        logging.info(
            "no %s beside %s: its images are taken to be normalized as those of ImageNet",
            SETTINGS,
            file,
        )
    if backbone.startswith("resnet"):
        return mean, std, 1e-5
    if architecture.startswith("tf_"):
        return mean, std, 1e-3
    logging.warning(
        "%s was trained with another padding than ours, which shifts its features by up to one "
        "cell; weights of tf_%s need no such shift",
        architecture,
        architecture,
    )
    return mean, std, 1e-5


def _shortcut(tensors):
    """The projection in the first level, which timm has only in blocks of three convolutions.

    It is the identity: by its moving averages exactly, and in training as far as they equal the
    statistics of the batch. These are estimated from the batch normalization before it.
    """
    if "layer1.0.downsample.0.weight" in tensors:
        return {}
    beta, gamma = tensors["bn1.bias"], np.abs(tensors["bn1.weight"])
    # Max pooling and ReLU of normal numbers, from evenly spaced quantiles.
    levels = ((np.arange(256) + 0.5) / 256) ** (1 / POOLED)
    normal = np.array([statistics.NormalDist().inv_cdf(level) for level in levels])
    values = np.maximum(beta + gamma * normal[:, None], 0)
    mean, variance = values.mean(0), values.var(0)
    parts = {"weight": np.sqrt(variance + 1e-5), "bias": mean}
    parts |= {"running_mean": mean, "running_var": variance}
    found = {f"layer1.0.downsample.1.{part}": value for part, value in parts.items()}
    return found | {"layer1.0.downsample.0.weight": np.eye(len(beta))[:, :, None, None]}


# --- The hub ---------------------------------------------------------------------------------


def _file(source):
    """The path of the weights; a model of the hub is downloaded, once."""
    if not is_named(source):
        return pathlib.Path(source)
    _download(source, SETTINGS)
    return _download(source, WEIGHTS)


def _download(name, file):
    hub = import_extra("huggingface_hub", "hub", f"downloading {name}")
    cached = hub.try_to_load_from_cache(name, file)
    if isinstance(cached, str):
        return pathlib.Path(cached)
    logging.info("downloading %s of %s from the Hugging Face hub", file, name)
    try:
        return pathlib.Path(hub.hf_hub_download(name, file))
    except Exception as error:  # of the library, its HTTP client and the operating system
        url = f"https://huggingface.co/{name}/resolve/main"
        raise UserError(
            f"{name} could not be downloaded ({one_line(error)}); connect to the internet "
            f"once, or download {url}/{WEIGHTS} and {url}/{SETTINGS} into one folder and set "
            f"trainer.init to the path of {WEIGHTS}"
        ) from None

"""Compares our networks with those of timm, by the same random weights.

    VENV/bin/python benchmarks/timm_parity.py make FOLDER [MODEL ...]
    python benchmarks/timm_parity.py compare FOLDER

`make` needs torch and timm (of torchvision only names, which are made up if it is absent). It
writes each model with weights made of the names of its tensors as in the hub, and its outputs for
one image. `compare`, with the extra [hub], loads each as `trainer.init` does and prints a Markdown
table of the largest differences, in standard deviations of each level. `compare FOLDER
--golden` also writes the few numbers of timm that the tests compare with.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
import timm_weights  # noqa: E402

MODELS = (
    *(f"resnet{depth}" for depth in (18, 26, 34, 50, 101, 152)),
    *(f"tf_efficientnet_b{number}" for number in range(9)),
    "tf_efficientnet_l2",
    *(f"tf_efficientnet_lite{number}" for number in range(5)),
    "efficientnet_b0",
)
GOLDEN = ROOT / "tests/golden/timm.json"
IN_TESTS = "resnet18", "resnet50", "tf_efficientnet_b0", "tf_efficientnet_b1"


# --- With timm -------------------------------------------------------------------------------


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty torchvision, of which timm takes names for what is not used here."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _made_up
        return module

    def exec_module(self, module):
        pass


class _Names(type):
    def __getattr__(cls, name):
        return _made_up(name)


def _made_up(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (), {})


def make(folder, name):
    """Writes a model of timm, its settings and its outputs to `folder/name`."""
    import safetensors.torch
    import timm
    import torch

    model = timm.create_model(name).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                value = timm_weights.hashed_tensor(key, tuple(tensor.shape))
                tensor.copy_(torch.from_numpy(value))
        x = torch.from_numpy(timm_weights.image().transpose(0, 3, 1, 2).copy())
        _, levels = model.forward_intermediates(x)
        outputs = {str(5 - i): level for i, level in enumerate(reversed(levels)) if i < 4}
        outputs["logits"] = model(x)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps({"architecture": name}))
    arrays = {key: value.numpy() for key, value in outputs.items()}
    arrays |= {k: v.transpose(0, 2, 3, 1) for k, v in arrays.items() if v.ndim == 4}
    np.savez(place / "outputs.npz", **arrays)
    print(name, {key: value.shape for key, value in arrays.items()}, flush=True)


# --- With ours -------------------------------------------------------------------------------


def outputs(backbone, file, pooling=None):
    """Our logits and levels with the weights of a file."""
    import keras

    from official_selftrain.applications import blocks, efficientnet, resnet

    original = blocks.keras.layers.MaxPooling2D
    blocks.keras.layers.MaxPooling2D = pooling or original
    try:
        family = resnet.ResNet if backbone.startswith("resnet") else efficientnet.EfficientNet
        variant = backbone.removeprefix("efficientnet-").removeprefix("resnet")
        variant = int(variant) if variant.isdigit() else variant
        shape, stage = timm_weights.image().shape[1:], {"stochastic_depth": None}
        found = {}
        for top in (True, False):
            model = family(
                variant, include_top=top, input_shape=shape, classifier_activation=None,
                weights=str(file), **stage,
            )  # fmt: skip
            out = model(timm_weights.image(), training=False)
            found |= {"logits": out} if top else out
            del model
            keras.backend.clear_session()
        return {key: np.asarray(value) for key, value in found.items()}
    finally:
        blocks.keras.layers.MaxPooling2D = original


def compare(folder, golden):
    """Prints the table of all models in a folder."""
    print("| model | levels 2 to 5 | logits | levels with our pooling |")
    print("| --- | --- | --- | --- |")
    stored = {}
    for name in MODELS:
        if not (folder / name / "outputs.npz").exists():
            continue
        with np.load(folder / name / "outputs.npz") as archive:
            theirs = dict(archive)
        backbone = name.removeprefix("tf_").replace("efficientnet_", "efficientnet-")
        file = folder / name / "model.safetensors"
        resnet = backbone.startswith("resnet")
        ours = outputs(backbone, file, _pool_class() if resnet else None)
        text = _worst(ours, theirs)
        released = _worst(outputs(backbone, file), theirs)[0] if resnet else "the same"
        print(f"| {name} | {text[0]} | {text[1]} | {released} |", flush=True)
        if name in IN_TESTS:
            stored[name] = timm_weights.probes({k: theirs[k] for k in "2345"})
    if golden:
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")


def _pool_class():
    import keras

    class Symmetric(keras.layers.MaxPooling2D):
        """Pads as PyTorch does; after ReLU, no number is smaller than the 0 of the padding."""

        def __init__(self, size, strides, padding, name):
            super().__init__(size, strides, "valid", name=name)

        def call(self, x):
            return super().call(keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))

        def compute_output_shape(self, shape):
            return (shape[0], -(-shape[1] // 2), -(-shape[2] // 2), shape[3])

    return Symmetric


def _worst(ours, theirs):
    """The largest difference of the levels, and of the logits, in standard deviations."""
    worst = {k: np.abs(ours[k] - v).max() / v.std() for k, v in theirs.items()}
    return f"{max(worst[k] for k in '2345'):.0e} σ", f"{worst['logits']:.0e} σ"


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    if what == "make":
        if importlib.util.find_spec("torchvision") is None:
            sys.meta_path.insert(0, _Torchvision())
        for model_name in rest or MODELS:
            make(pathlib.Path(place), model_name)
    else:
        compare(pathlib.Path(place), "--golden" in rest)

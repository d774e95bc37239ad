"""Compares our networks with those of timm, by the same random weights.

    VENV/bin/python benchmarks/timm_parity.py make FOLDER [MODEL ...]
    python benchmarks/timm_parity.py compare FOLDER

`make` needs torch and timm (of torchvision only names, which are made up if it is absent). It
writes each model with weights made of the names of its tensors as in the hub, and its outputs for
one image. `compare`, with the extras [hub,demo], loads each as `trainer.init` does and prints the
largest differences, in standard deviations of each level; here the max pooling of a ResNet pads as
timm's, and a second table says how much ours differs. With `--golden` after FOLDER it also writes
the few numbers of timm that the tests compare with.
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
GOLDEN = ROOT / "tests/applications/timm.json"
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


def outputs(backbone, file, images, symmetric=False):
    """Our logits and levels of `images` with the weights of a file.

    With `symmetric`, the max pooling of a ResNet pads as in PyTorch.
    """
    import keras

    from official_selftrain.applications import blocks, efficientnet, resnet

    original = blocks.keras.layers.MaxPooling2D
    blocks.keras.layers.MaxPooling2D = symmetric_pooling() if symmetric else original
    family = resnet.ResNet if backbone.startswith("resnet") else efficientnet.EfficientNet
    variant = backbone.removeprefix("efficientnet-").removeprefix("resnet")
    variant = int(variant) if variant.isdigit() else variant
    options = {"input_shape": images.shape[1:], "weights": str(file), "stochastic_depth": None}
    found = {}
    try:
        for top in (True, False):
            model = family(variant, include_top=top, classifier_activation=None, **options)
            out = model(images, training=False)
            found |= {"logits": out} if top else out
            del model
            keras.backend.clear_session()
    finally:
        blocks.keras.layers.MaxPooling2D = original
    return {key: np.asarray(value) for key, value in found.items()}


def symmetric_pooling():
    """A class of layers that pads as PyTorch; after ReLU, no number is smaller than the zeros."""
    import keras

    class Symmetric(keras.layers.MaxPooling2D):
        def __init__(self, size, strides, padding, name):
            super().__init__(size, strides, "valid", name=name)

        def call(self, x):
            return super().call(keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))

        def compute_output_shape(self, shape):
            return (shape[0], -(-shape[1] // 2), -(-shape[2] // 2), shape[3])

    return Symmetric


def compare(folder, golden):
    """Prints the tables of all models in a folder."""
    import safetensors

    print("| model | levels 2 to 5 | logits |")
    print("| --- | --- | --- |")
    stored, resnets = {}, []
    for name in MODELS:
        file = folder / name / "model.safetensors"
        if not file.with_name("outputs.npz").exists():
            continue
        with np.load(file.with_name("outputs.npz")) as archive:
            theirs = dict(archive)
        backbone = name.removeprefix("tf_").replace("efficientnet_", "efficientnet-")
        resnets += [(name, file)] if name == backbone else []
        ours = outputs(backbone, file, timm_weights.image(), name == backbone)
        worst = {k: np.abs(ours[k] - v).max() / v.std() for k, v in theirs.items()}
        print(f"| {name} | {max(worst[k] for k in '2345'):.0e} σ | {worst['logits']:.0e} σ |")
        if name in IN_TESTS:
            with safetensors.safe_open(file, "numpy") as tensors:
                shapes = {k: tensors.get_slice(k).get_shape() for k in tensors.keys()}  # noqa: SIM118
            shapes = {k: v for k, v in shapes.items() if "num_batches" not in k}
            levels = timm_weights.probes({k: theirs[k] for k in "2345"})
            stored[name] = {"checksum": timm_weights.checksum(shapes), "levels": levels}
        sys.stdout.flush()
    compare_pooling(resnets)
    if golden:
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")


def compare_pooling(files):
    """Prints how much the released max pooling changes a ResNet, on a photograph."""
    import skimage.data

    from official_selftrain.applications import resnet

    photo = resnet.preprocess_input(skimage.data.coffee().astype("float32"))[None]
    here, moved = photo[:, 100:324, 200:424], photo[:, 102:326, 202:426]
    print("\n| model | levels 2 and 3, inside, moved by 2 px | level 5, RMS | logits, RMS |")
    print("| --- | --- | --- | --- |")
    for name, file in files:
        ours, theirs = outputs(name, file, here), outputs(name, file, here, True)
        shifted = outputs(name, file, moved, True)
        inside = []
        # So far from the border that no block of the level sees its padding.
        for level, border in (("2", 8), ("3", 12)):
            difference = np.abs(ours[level] - shifted[level])[:, border:-border, border:-border]
            inside.append(difference.max() / theirs[level].std())
        rms = [np.std(ours[k] - theirs[k]) / theirs[k].std() for k in ("5", "logits")]
        print(f"| {name} | {max(inside):.0e} σ | {rms[0]:.2f} σ | {rms[1]:.3f} σ |", flush=True)


if __name__ == "__main__":
    what, place, *rest = sys.argv[1:]
    if what == "make":
        if importlib.util.find_spec("torchvision") is None:
            sys.meta_path.insert(0, _Torchvision())
        for model_name in rest or MODELS:
            make(pathlib.Path(place), model_name)
    else:
        compare(pathlib.Path(place), "--golden" in rest)

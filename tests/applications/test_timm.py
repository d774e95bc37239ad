"""Weights of timm: its outputs, and what is refused.

`benchmarks/timm_parity.py` has computed the numbers with timm itself. The same weights are made
here of the names of their tensors.
"""

import json
import pathlib
import pickle
import sys
import types

import keras
import numpy as np
import pytest
import timm_weights
from safetensors.numpy import save_file

from official_selftrain.applications import blocks, efficientnet, imagenet, resnet, timm_file
from official_selftrain.applications.public_names import TIMM, describe, layer_names, tensor_names
from official_selftrain.utils.errors import UserError

GOLDEN = json.loads((pathlib.Path(__file__).with_name("timm.json")).read_text())


def build(backbone, size=128, **options):
    options |= {"input_shape": (size, size, 3), "stochastic_depth": None}
    if backbone.startswith("resnet"):
        return resnet.ResNet(int(backbone.removeprefix("resnet")), **options)
    return efficientnet.EfficientNet(backbone.removeprefix("efficientnet-"), **options)


def shapes_of(backbone):
    """`{name: shape}` of the tensors of the timm model."""
    found, names = {}, layer_names(backbone, TIMM)
    model = build(backbone)
    for layer, prefix in names.items():
        if backbone in ("resnet18", "resnet34") and prefix.startswith("layer1.0.downsample"):
            continue  # the shortcut of this block is the identity
        shapes = [tuple(weight.shape) for weight in model.get_layer(f"{backbone}.{layer}").weights]
        if len(shapes[0]) == 4:
            order = (2, 3, 0, 1) if layer.endswith("depthwise_conv2d") else (3, 2, 0, 1)
            shapes[0] = tuple(shapes[0][axis] for axis in order)
        elif len(shapes[0]) == 2:
            shapes[0] = shapes[0][::-1]
        found |= dict(zip(tensor_names(layer, prefix), shapes, strict=True))
    return found


def tensors_of(backbone):
    return {k: timm_weights.hashed_tensor(k, shape) for k, shape in shapes_of(backbone).items()}


@pytest.fixture(scope="module")
def resnet18():
    return tensors_of("resnet18")


def write(folder, tensors, **settings):
    path = folder / "model.safetensors"
    save_file({**tensors, "bn1.num_batches_tracked": np.array(7)}, path)
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return str(path)


class SymmetricPooling(keras.layers.MaxPooling2D):
    """Pads by one on both sides, as PyTorch; after ReLU no number is smaller than these zeros."""

    def __init__(self, size, strides, padding, name):
        super().__init__(size, strides, "valid", name=name)

    def call(self, x):
        return super().call(keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))

    def compute_output_shape(self, shape):
        return (shape[0], -(-shape[1] // 2), -(-shape[2] // 2), shape[3])


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_are_those_of_timm(name, tmp_path, monkeypatch):
    """At the pooling, where ours differs, the padding of PyTorch."""
    backbone = name.removeprefix("tf_").replace("efficientnet_", "efficientnet-")
    shapes = shapes_of(backbone)
    assert timm_weights.checksum(shapes) == GOLDEN[name]["checksum"]
    file = write(tmp_path, {k: timm_weights.hashed_tensor(k, s) for k, s in shapes.items()})
    monkeypatch.setattr(blocks.keras.layers, "MaxPooling2D", SymmetricPooling)
    model = build(backbone, include_top=False, weights=file)
    found = timm_weights.probes(model(timm_weights.image(), training=False))
    for level, expected in GOLDEN[name]["levels"].items():
        deviation = expected[1]
        np.testing.assert_allclose(found[level], expected, rtol=0, atol=1e-4 * deviation)


def test_our_pooling_moves_the_image_by_two_pixels(resnet18, tmp_path, monkeypatch):
    file, image = write(tmp_path, resnet18), timm_weights.image(130)
    ours = build("resnet18", include_top=False, weights=file)(image[:, :128, :128])
    monkeypatch.setattr(blocks.keras.layers, "MaxPooling2D", SymmetricPooling)
    theirs = build("resnet18", include_top=False, weights=file)(image[:, 2:, 2:])
    a, b = (np.asarray(levels["2"])[:, 6:-6, 6:-6] for levels in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * b.std())


def test_epsilon_is_folded_into_the_weights(resnet18, tmp_path):
    file = write(tmp_path, resnet18)
    usual = build("resnet18", include_top=False, weights=file)
    norm = resnet.NormActivation("relu", epsilon=0.1)
    other = build("resnet18", include_top=False, weights=file, norm=norm)
    a, b = (np.asarray(model(timm_weights.image())["5"]) for model in (usual, other))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * a.std())


def test_normalization_of_pixels_is_folded_into_the_stem(resnet18, tmp_path):
    """Pixels in -1..1 by their own network are pixels by ours, but for the color of the border."""
    plain = build("resnet18", include_top=False, weights=write(tmp_path, resnet18))
    (tmp_path / "half").mkdir()
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    file = write(tmp_path / "half", resnet18, architecture="resnet18", pretrained_cfg=half)
    folded = build("resnet18", include_top=False, weights=file)
    pixels = np.random.default_rng(1).uniform(0, 255, (1, 128, 128, 3)).astype("float32")
    theirs = np.asarray(plain(pixels / 127.5 - 1)["2"])
    ours = np.asarray(folded(resnet.preprocess_input(pixels.copy()))["2"])
    inside = np.s_[:, 6:-6, 6:-6]
    np.testing.assert_allclose(ours[inside], theirs[inside], rtol=0, atol=1e-4 * theirs.std())


def test_shortcut_in_training_keeps_the_scale(resnet18):
    """The projection that timm lacks is meant to change nothing, also by batch statistics."""
    found = timm_file._shortcut(resnet18)
    mean, variance = (found[f"layer1.0.downsample.1.running_{k}"] for k in ("mean", "var"))
    np.testing.assert_allclose(found["layer1.0.downsample.1.bias"], mean)
    np.testing.assert_allclose(found["layer1.0.downsample.1.weight"] ** 2, variance + 1e-5)
    # max(0, z) of a standard normal z has mean 0.399; the larger of two has 0.564 + ...: between.
    at = np.argmin(np.abs(resnet18["bn1.bias"]))
    assert 0.399 < mean[at] / resnet18["bn1.weight"][at] < 0.85
    assert timm_file._shortcut({"layer1.0.downsample.0.weight": 0}) == {}


def test_a_file_is_recognized_by_names_and_shapes(resnet18):
    shapes = {name: tensor.shape for name, tensor in resnet18.items()}
    assert describe(shapes) == "resnet18"
    assert describe({k: v for k, v in shapes.items() if not k.startswith("fc")}) == "resnet18"
    assert "layer1" in describe({**shapes, "layer1.0.se.fc1.weight": (4, 64, 1, 1)})
    wide = {**shapes, "layer1.0.conv2.weight": (128, 128, 3, 3)}
    assert "another network" in describe(wide)
    assert "another network (its tensors are called head" in describe({"head.weight": ()})
    for backbone in ("efficientnet-b1", "efficientnet-lite1", "resnet50"):
        assert describe(shapes_of(backbone)) == backbone
    one = shapes_of("efficientnet-b1")
    assert layer_names("efficientnet-b2", TIMM) == layer_names("efficientnet-b1", TIMM)
    assert describe({**one, "conv_stem.weight": (40, 3, 3, 3)}) != "efficientnet-b1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "damaged .*No such file"),
        (b"", "not a safetensors file, or is damaged"),
        (b"<html>log in</html>", "not a safetensors file, or is damaged"),
        (pickle.dumps(print, 2), "is a pickle of PyTorch .* was not opened"),
        (b"PK\x03\x04" + bytes(100), "is a pickle of PyTorch .* was not opened"),
        ("half", "damaged .*; download it again"),
        ("nan", "not finite"),
        ("narrow", "resnet18.conv2d_7 has the shapes .*3, 3, 32, 128.* in the network"),
        ("other", "does not hold the weights of resnet18: it seems to be another network .*a "),
    ],
)
def test_files_that_are_no_weights_are_refused_in_one_line(resnet18, tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        tensors = dict(resnet18)
        if content == "nan":
            tensors["fc.bias"] = tensors["fc.bias"] * np.nan
        if content == "narrow":
            narrow = tensors["layer2.0.conv1.weight"][:, :32]
            tensors["layer2.0.conv1.weight"] = np.ascontiguousarray(narrow)
        write(tmp_path, {"a": np.zeros(3)} if content == "other" else tensors)
        if content == "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=message) as told:
        imagenet.load_backbone(build("resnet18"), "resnet18", str(path))
    assert "\n" not in str(told.value)


def test_the_model_that_is_found_and_the_one_that_is_expected_are_named(resnet18, tmp_path):
    file = write(tmp_path, resnet18)
    imagenet.check_available("resnet18", file)
    with pytest.raises(UserError, match=r"of resnet50: it seems to be resnet18; .*resnet50.a1"):
        imagenet.check_available("resnet50", file)


@pytest.mark.parametrize("text", ["{", "[1]", '{"pretrained_cfg": {"mean": [1, 2]}}',
                                  '{"pretrained_cfg": {"std": [0, 1, 1]}}'])  # fmt: skip
def test_damaged_settings_beside_the_weights_are_told(resnet18, tmp_path, text):
    file = write(tmp_path, resnet18)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is not"):
        timm_file.read("resnet18", file)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has nothing in its cache and cannot be reached."""

    def fail(name, file):
        raise OSError("no route to host")

    fake = types.SimpleNamespace(hf_hub_download=fail, try_to_load_from_cache=lambda *_: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_names_are_looked_up_in_the_hub(resnet18, tmp_path, hub):
    file = write(tmp_path, resnet18, architecture="resnet18")
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / file)

    hub.hf_hub_download = download
    model = build("resnet18", include_top=False, weights="imagenet")
    assert asked == [("timm/resnet18.a1_in1k", name) for name in ("config.json", file[-17:])]
    hub.hf_hub_download = None  # not asked for what it has given once
    hub.try_to_load_from_cache = lambda name, file: str(tmp_path / file)
    again = build("resnet18", include_top=False, weights="timm/resnet18.tv_in1k")
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_network_says_what_to_download(hub):
    url = (
        "https://huggingface.co/timm/tf_efficientnet_l2.ns_jft_in1k/resolve/main/model.safetensors"
    )
    with pytest.raises(UserError, match=rf"\(no route to host\).* {url} .*path of model.safet"):
        imagenet.check_available("efficientnet-l2", "imagenet++")


@pytest.mark.parametrize(("module", "start"), [("huggingface_hub", "imagenet"),
                                               ("safetensors", "model.safetensors")])  # fmt: skip
def test_a_missing_extra_is_named(monkeypatch, module, start):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"needs the extra: pip install .*\[hub\]"):
        imagenet.check_available("resnet50", start)


def test_symmetric_padding_of_other_efficientnets_is_warned_of(tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"architecture": "efficientnet_b0"}')
    mean, std, epsilon = timm_file._training("efficientnet-b0", tmp_path / "model.safetensors")
    assert epsilon == 1e-5 and "another padding than ours" in caplog.text
    assert (mean, std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

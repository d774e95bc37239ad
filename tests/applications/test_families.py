"""What all families share, in the manner of `keras.applications`."""

import inspect

import keras
import numpy as np
import pytest

from official_selftrain import applications, config
from official_selftrain.applications import efficientnet, resnet, spinenet
from official_selftrain.applications.layers import BilinearUpsample, DropBlock

SMALL = {
    "spinenet": lambda **k: spinenet.SpineNet("49S", sizes=spinenet.Variant(8, 0.125, 0.5, 1), **k),
    "efficientnet": lambda **k: efficientnet.EfficientNet(
        "b0", sizes=efficientnet.Variant(0.1, 1.0), **k
    ),
    "lite": lambda **k: efficientnet.EfficientNet(
        "lite0", sizes=efficientnet.Variant(0.1, 1.0, lite=True), **k
    ),
    "resnet": lambda **k: resnet.ResNet(10, **k),
}


def images(batch=2, side=64):
    return np.random.default_rng(0).standard_normal((batch, side, side, 3)).astype("float32")


@pytest.mark.parametrize("name", applications.__all__)
def test_signature_is_that_of_keras_applications(name):
    theirs = inspect.signature(keras.applications.EfficientNetB0).parameters
    ours = inspect.signature(getattr(applications, name)).parameters
    assert getattr(applications, name).__name__ == name
    own = [key for key, parameter in ours.items() if parameter.kind == parameter.KEYWORD_ONLY]
    assert list(ours) == [*theirs, *own]
    assert {"stochastic_depth", "norm"} <= set(own)
    for key, parameter in ours.items():
        if key not in ("weights", "name", *own):
            assert parameter.default == theirs[key].default, key


@pytest.mark.parametrize("family", SMALL)
def test_top_pooling_and_pyramid(family):
    build = SMALL[family]
    shape = {"input_shape": (64, 64, 3)}
    probabilities = np.asarray(build(classes=7, **shape)(images()))
    assert probabilities.shape == (2, 7)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    logits = build(classes=7, classifier_activation=None, **shape)
    assert logits.layers[-1].activation is keras.activations.linear
    for pooling in ("avg", "max"):
        pooled = build(include_top=False, pooling=pooling, **shape).output
        assert len(pooled.shape) == 2
    for level, x in build(include_top=False, **shape).output.items():
        assert x.shape[1:3] == (-(-64 // 2 ** int(level)),) * 2
    tensor = keras.Input((64, 64, 3))
    assert build(input_tensor=tensor, name="mine").name == "mine"


@pytest.mark.parametrize("family", SMALL)
def test_saving_keeps_config_and_outputs(family, tmp_path):
    model = SMALL[family](classes=5, input_shape=(64, 64, 3), stochastic_depth=0.2)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(restored(images()), model(images()))
    assert [x.get_config() for x in restored.layers] == [x.get_config() for x in model.layers]
    model.save_weights(tmp_path / "model.weights.h5")
    again = SMALL[family](
        classes=5, input_shape=(64, 64, 3), weights=str(tmp_path / "model.weights.h5")
    )
    np.testing.assert_array_equal(again(images()), model(images()))


def test_wrong_arguments_are_refused_before_building(tmp_path):
    with pytest.raises(ValueError, match=r"existing file. Received 'nowhere.weights.h5'"):
        applications.SpineNet190(weights="nowhere.weights.h5")
    with pytest.raises(ValueError, match=r"Received 'mean'"):
        SMALL["resnet"](include_top=False, pooling="mean")
    with pytest.raises(ValueError, match=r"\(height, width, 3\)"):
        SMALL["resnet"](input_shape=(64, 64, 1))
    with pytest.raises(ValueError, match="'b9' is unknown"):
        efficientnet.EfficientNet("b9")
    with pytest.raises(ValueError, match="depth 51 is unknown"):
        resnet.ResNet(51)
    with pytest.raises(ValueError, match="published sizes and `classes=1000`"):
        applications.EfficientNetLite0(weights="imagenet", classes=10)


def test_config_knows_every_family_member():
    names = {f"spinenet{variant}" for variant in spinenet.VARIANTS}
    names |= {f"efficientnet-{variant}" for variant in efficientnet.VARIANTS}
    names |= {f"resnet{depth}" for depth in resnet.VARIANTS}
    assert set(config.BACKBONES) == names


def test_published_sizes_of_efficientnets():
    # Parameters of keras.applications' (B0 to B7) and of the EfficientNet-Lite model card.
    for variant, millions in (("b0", 5.33), ("lite0", 4.65), ("lite4", 13.0)):
        model = efficientnet.EfficientNet(variant, input_shape=(64, 64, 3))
        assert model.count_params() / 1e6 == pytest.approx(millions, rel=0.01)


def test_background_of_1001_classes_is_left_out(monkeypatch):
    utils = keras.applications.imagenet_utils
    monkeypatch.setattr(utils, "decode_predictions", lambda p, top: (p.shape[-1], top))
    assert spinenet.decode_predictions(np.zeros((1, 1001)), top=3) == (1000, 3)
    assert spinenet.decode_predictions(np.zeros((1, 1000))) == (1000, 5)


def test_drop_block_drops_squares_and_keeps_the_sum():
    layer = DropBlock(0.9, 3, seed=1)
    x = np.ones((64, 12, 12, 4), "float32")
    y = np.asarray(layer(x, training=True))
    np.testing.assert_array_equal(layer(x, training=False), x)
    dropped = y == 0
    assert 0.05 < dropped.mean() < 0.12
    assert y.mean() == pytest.approx(1, abs=1e-4)
    # Every dropped cell lies in a dropped 3x3 square.
    inside = np.zeros_like(dropped)
    for i in range(10):
        for j in range(10):
            square = dropped[:, i : i + 3, j : j + 3].all(axis=(1, 2))
            inside[:, i : i + 3, j : j + 3] |= square[:, None, None]
    np.testing.assert_array_equal(inside, dropped)


def test_bilinear_upsample_has_no_half_pixel_shift():
    x = np.array([0.0, 4.0, 6.0], "float32").reshape(1, 1, 3, 1)
    y = np.asarray(BilinearUpsample(2)(x))
    np.testing.assert_allclose(y[0, :, :, 0], [[0, 2, 4, 5, 6, 6]] * 2)

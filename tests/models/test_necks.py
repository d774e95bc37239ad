import keras
import numpy as np
import pytest

from official_selftrain.applications import efficientnet, resnet
from official_selftrain.applications.layers import DropBlock
from official_selftrain.models import ASPP, FPN, NASFPN, RetinaNet, Segmenter

SIZES = efficientnet.Variant(0.1, 1.0)


def backbone(side=128):
    shape = (side, side, 3)
    return efficientnet.EfficientNet("b0", include_top=False, input_shape=shape, sizes=SIZES)


def images(*shape):
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype("float32")


@pytest.mark.parametrize("neck", [FPN, NASFPN])
def test_any_backbone_any_neck(neck):
    pyramid = neck(backbone(), filters=8, separable=True)
    sides = {level: x.shape[1:] for level, x in pyramid.output.items()}
    assert sides == {str(level): (128 >> level, 128 >> level, 8) for level in range(3, 8)}
    model = RetinaNet(pyramid, 3, num_convs=1, num_filters=8)
    anchors = 9 * sum((128 >> level) ** 2 for level in range(3, 8))
    assert model(images(1, 128, 128))["box_deltas"].shape == (1, anchors, 4)


def test_a_model_of_keras_applications_is_a_backbone():
    base = keras.applications.MobileNetV2((128, 128, 3), include_top=False, weights=None)
    names = {"3": "block_6_expand_relu", "4": "block_13_expand_relu", "5": "out_relu"}
    levels = {level: base.get_layer(name).output for level, name in names.items()}
    pyramid = FPN(keras.Model(base.input, levels), filters=16)
    model = RetinaNet(pyramid, 3, num_filters=16)
    outputs = model(images(1, 128, 128))
    anchors = 9 * sum((128 >> level) ** 2 for level in range(3, 8))
    assert outputs["class_logits"].shape == (1, anchors, 3)
    # The images reach every level.
    assert min(np.asarray(x).std() for x in pyramid(images(1, 128, 128)).values()) > 0


def test_nasfpn_without_attention_has_the_same_weights():
    attention, plain = (
        NASFPN(backbone(), filters=8, repeats=1, sum_only=flag) for flag in (False, True)
    )
    shapes = [w.shape for w in attention.weights]
    assert shapes == [w.shape for w in plain.weights]
    plain.set_weights(attention.get_weights())
    x = images(1, 128, 128)
    assert np.abs(np.asarray(attention(x)["4"]) - np.asarray(plain(x)["4"])).max() > 1e-3


def test_drop_block_is_where_the_release_has_it():
    pyramid = NASFPN(
        resnet.ResNet(10, include_top=False, input_shape=(128, 128, 3), drop_block=(0.9, 3)),
        filters=8,
        repeats=2,
        drop_block=(0.9, 3),
    )
    found = [layer.name for layer in pyramid.layers if isinstance(layer, DropBlock)]
    assert sum(name.startswith("fpn_cells") for name in found) == 2 * 7
    # Ten-layer network: per group a projection and two convolutions.
    assert sum(name.startswith("resnet10") for name in found) == 4 * 3
    x = images(1, 128, 128)
    a, b = (np.asarray(pyramid(x, training=True)["3"]) for _ in range(2))
    assert np.abs(a - b).max() > 0
    assert np.isfinite(a).all()


@pytest.mark.parametrize("aspp", [False, True])
def test_segmenter_of_any_size_saves_and_loads(aspp, tmp_path):
    base = efficientnet.EfficientNet(
        "b0", include_top=False, input_shape=(None, None, 3), sizes=SIZES
    )
    base = ASPP(base, filters=8) if aspp else base
    model = Segmenter(NASFPN(base, filters=8, repeats=1), 4, num_convs=1)
    for side in ((128, 128), (128, 256)):
        assert model(images(2, *side))["logits"].shape == (2, side[0] // 4, side[1] // 4, 4)
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    x = images(1, 128, 128)
    np.testing.assert_array_equal(restored(x)["logits"], model(x)["logits"])


def test_head_level_and_fusion_are_optional():
    pyramid = NASFPN(backbone(), filters=8, repeats=1)
    assert Segmenter(pyramid, 4, level=4, num_convs=0).output["logits"].shape[1:3] == (8, 8)
    assert Segmenter(pyramid, 4, level=3, fusion=False).output["logits"].shape[1:3] == (16, 16)
    with pytest.raises(ValueError, match="without fusion, level 2"):
        Segmenter(pyramid, 4, level=2, fusion=False)


def test_wrong_sizes_and_levels_are_refused():
    with pytest.raises(ValueError, match="divisible by 128"):
        NASFPN(backbone(96))
    with pytest.raises(ValueError, match="divisible by 32"):
        FPN(backbone(72))
    whole = backbone()
    only = keras.Model(whole.input, {"5": whole.output["5"]})
    with pytest.raises(ValueError, match="from 3 up without a gap"):
        FPN(only)
    with pytest.raises(ValueError, match="include_top=False"):
        NASFPN(resnet.ResNet(10, input_shape=(128, 128, 3)))

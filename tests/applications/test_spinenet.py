import numpy as np
import pytest

from official_selftrain.applications import spinenet
from official_selftrain.applications.layers import DropConnect, NearestResize

TINY = spinenet.Variant(8, 0.125, 0.5, 1)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (200, 136)])
def test_levels_have_their_strides(size):
    model = spinenet.SpineNet("49S", include_top=False, input_shape=(*size, 3), sizes=TINY)
    levels = model.output
    assert sorted(levels) == ["3", "4", "5", "6", "7"]
    for level, x in levels.items():
        stride = 2 ** int(level)
        assert x.shape[1:] == (-(-size[0] // stride), -(-size[1] // stride), 8)


def test_unknown_variant_and_odd_size_are_refused():
    with pytest.raises(ValueError, match="'50' is unknown"):
        spinenet.SpineNet("50")
    with pytest.raises(ValueError, match="divisible by 8"):
        spinenet.SpineNet("49", input_shape=(60, 64, 3))


def test_nearest_resize_uses_legacy_indices():
    x = np.arange(5, dtype="float32").reshape(1, 1, 5, 1)
    # floor(target * 5 / 3): 0, 1.67, 3.33
    np.testing.assert_array_equal(np.asarray(NearestResize(1, 3)(x)).ravel(), [0, 1, 3])


def test_drop_connect_keeps_the_mean_and_drops_whole_examples():
    layer = DropConnect(0.25, seed=1)
    x = np.ones((4000, 1, 1, 2), "float32")
    y = np.asarray(layer(x, training=True))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_array_equal(y[..., 0], y[..., 1])
    assert abs(y.mean() - 1) < 0.03
    np.testing.assert_array_equal(layer(x, training=False), x)


def test_preprocess_input_is_imagenet_normalization():
    black, white = np.zeros((1, 1, 3)), np.full((1, 1, 3), 255.0)
    np.testing.assert_allclose(
        spinenet.preprocess_input(black)[0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    )
    np.testing.assert_allclose(
        spinenet.preprocess_input(white)[0, 0],
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225],
    )

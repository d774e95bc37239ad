import numpy as np
import pytest
import tensorflow as tf
from conftest import load

from official_selftrain.ops import resize
from official_selftrain.ops.colors import MEAN, STDDEV


def bilinear(image, size):
    for axis, target in enumerate(size):
        low, high, weight = resize.bilinear_weights(image.shape[axis], target)
        below, above = np.take(image, low, axis), np.take(image, high, axis)
        image = below + (above - below) * weight.reshape(-1, *[1] * (2 - axis))
    return image


def nearest(mask, size):
    rows, columns = map(resize.nearest_indices, mask.shape, size)
    return mask[rows[:, None], columns]


def released(golden, index):
    """A golden case, the size before it was cropped, and the part of it that the crop kept."""
    case = load(golden / f"resize/resize_{index}.npz")
    size, target, scale, offset = case["image_info"]
    scaled = tuple(np.rint(size * scale).astype(int))
    (top, left), (height, width) = offset.astype(int), target.astype(int)
    return case, scaled, np.s_[top : top + height, left : left + width]


@pytest.mark.parametrize("index", range(5))
def test_bilinear_equals_release(index, golden):
    case, size, kept = released(golden, index)
    image = bilinear(case["image"].astype("float32"), size)[kept]
    height, width = image.shape[:2]
    expected = case["output_image"]
    normalized = (image / 255 - np.array(MEAN)) / np.array(STDDEV)
    np.testing.assert_allclose(normalized, expected[:height, :width], atol=1e-5)
    # What lies beyond is padding, so that nothing of the image was left out of the comparison.
    assert not expected[height:].any() and not expected[:, width:].any()


@pytest.mark.parametrize("index", range(5))
def test_nearest_equals_release(index, golden):
    case, size, kept = released(golden, index)
    mask = nearest(case["label"], size)[kept]
    height, width = mask.shape
    expected = case["label_out"][..., 0]
    np.testing.assert_array_equal(mask, expected[:height, :width])
    assert (expected[height:] == 255).all() and (expected[:, width:] == 255).all()


def test_both_rules_by_hand():
    # 5 pixels become 3: source coordinates 0, 5/3 and 10/3.
    np.testing.assert_array_equal(resize.nearest_indices(5, 3), [0, 1, 3])
    low, high, weight = resize.bilinear_weights(5, 3)
    np.testing.assert_array_equal(low, [0, 1, 3])
    np.testing.assert_array_equal(high, [1, 2, 4])
    np.testing.assert_allclose(weight, [0, 2 / 3, 1 / 3], rtol=1e-6)
    # 2 pixels become 4: the last one has nothing to mix with.
    low, high, weight = resize.bilinear_weights(2, 4)
    np.testing.assert_array_equal([low, high], [[0, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(weight, [0, 0.5, 0, 0.5])


@pytest.mark.parametrize("sizes", [(1, 7), (7, 1), (33, 47), (375, 512), (513, 129)])
def test_indices_are_those_of_tensorflow(sizes):
    source, target = sizes
    pixels = tf.range(source, dtype=tf.float32)[None, :, None, None]
    expected = tf.raw_ops.ResizeNearestNeighbor(images=pixels, size=[target, 1])
    np.testing.assert_array_equal(resize.nearest_indices(source, target), np.ravel(expected))
    expected = tf.raw_ops.ResizeBilinear(images=pixels**2, size=[target, 1])
    ours = bilinear(np.asarray(pixels[0] ** 2), (target, 1))
    np.testing.assert_allclose(ours[..., 0], expected[0, ..., 0], rtol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_upsampling_is_the_bilinear_rule(factor):
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype("float32")
    y = np.asarray(resize.upsample(x, factor))
    expected = [bilinear(image, (3 * factor, 5 * factor)) for image in x]
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)

import numpy as np
import tensorflow as tf
from scipy import ndimage

from official_selftrain.data.augmentation import simclr


def place(index):
    return tf.stack([tf.constant(3, tf.int64), tf.cast(index, tf.int64)])


def photograph(height=60, width=80):
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.random((height, width, 3)) * 255, (3, 3, 0)).astype("uint8")


def test_two_views_are_reproducible_and_differ():
    image = photograph()
    data = tf.data.Dataset.range(6).map(lambda i: simclr.two_views(image, 32, place(i // 2)))
    found = [views.numpy() for views in data]
    for views in found:
        assert views.shape == (2, 32, 32, 3)
        assert views.min() >= 0 and views.max() <= 1
        assert np.abs(views[0] - views[1]).max() > 0.02
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.02


def test_a_fifth_of_the_views_is_gray_and_half_are_mirrored():
    """The image brightens from left to right, red more than blue."""
    ramp = np.linspace(40, 200, 80)
    image = np.repeat(np.stack([ramp, ramp * 0.7, ramp * 0.3], axis=-1)[None], 60, axis=0)
    image = image.astype("uint8")
    views = list(tf.data.Dataset.range(400).map(lambda i: simclr.view(image, 16, place(i), 0.0)))
    gray = np.mean([np.ptp(v.numpy(), axis=-1).max() < 1e-3 for v in views])
    mirrored = np.mean([v.numpy()[8, 0, 0] > v.numpy()[8, -1, 0] for v in views])
    assert abs(gray - simclr.GRAY) < 5 * np.sqrt(0.2 * 0.8 / 400)
    assert abs(mirrored - 0.5) < 5 * np.sqrt(0.25 / 400)


def test_crops_are_between_eight_and_a_hundred_percent():
    """Colors tell the place: red is the row, green the column."""
    y, x = np.mgrid[:200, :200]
    image = np.stack([y, x, 0 * x], axis=-1).astype("uint8")
    areas, shapes = [], []
    for view in tf.data.Dataset.range(200).map(lambda i: simclr.crop(image, 64, place(i))):
        sides = [np.ptp(view.numpy()[..., c]) * 255 + 200 / 64 for c in (0, 1)]
        areas.append(sides[0] * sides[1] / 200**2)
        shapes.append(sides[1] / sides[0])
    assert 0.05 < min(areas) < 0.15 and 0.85 < max(areas) <= 1.05
    assert min(shapes) > 0.65 and max(shapes) < 1.55


def test_blur_equals_scipy():
    image = photograph(32, 32).astype("float32") / 255
    found = simclr.blur(tf.constant(image), tf.constant(1.5), 16)
    expected = ndimage.gaussian_filter(image, (1.5, 1.5, 0), radius=(8, 8, 0), mode="reflect")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_colors_of_strength_zero_stay():
    image = photograph().astype("float32") / 255
    found = simclr.jitter_colors(tf.constant(image), place(0), 0.0)
    np.testing.assert_allclose(found, image, atol=1e-5)

"""Two views of an image for contrastive pre-training, as in SimCLR.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", appendix
A: crop to a random size and shape, flip, color distortion of strength s, blur. The paper on
self-training compares with a SimCLR checkpoint (section 4.3).
"""

import functools

import tensorflow as tf

from official_selftrain.utils.types import Tensor

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop: fraction of the image, width / height
GRAY, JITTER, BLUR = 0.2, 0.8, 0.5  # probabilities
SIGMA = (0.1, 2.0)  # of the blur, in pixels


def two_views(image: Tensor, size: int, seed: Tensor, strength: float = 1.0) -> Tensor:
    """Two independent draws of one image.

    Args:
        image: uint8 `[H, W, 3]`.
        size: side of a view in pixels.
        seed: int64 `[2]`; equal seeds give equal views.
        strength: s of the color distortion; the SimCLR paper uses 1 on ImageNet.

    Returns:
        float32 `[2, size, size, 3]` in 0 to 1.
    """
    return tf.stack(
        [view(image, size, tf.random.fold_in(seed, number), strength) for number in (0, 1)]
    )


def view(image: Tensor, size: int, seed: Tensor, strength: float = 1.0) -> Tensor:
    """One draw, float32 `[size, size, 3]` in 0 to 1; see `two_views`."""
    # Every random number has its own seed, so that adding one does not change the others.
    image = crop(image, size, tf.random.fold_in(seed, 0))
    numbers = tf.random.stateless_uniform([4], tf.random.fold_in(seed, 1))
    image = tf.cond(numbers[0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    image = tf.cond(
        numbers[1] < JITTER,
        lambda: jitter_colors(image, tf.random.fold_in(seed, 2), strength),
        lambda: image,
    )
    image = tf.cond(
        numbers[2] < GRAY,
        lambda: tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)),
        lambda: image,
    )
    sigma = tf.random.stateless_uniform([], tf.random.fold_in(seed, 3), *SIGMA)
    return tf.cond(numbers[3] < BLUR, lambda: blur(image, sigma, size // 10), lambda: image)


def crop(image: Tensor, size: int, seed: Tensor) -> Tensor:
    """A random part of an image, resized to a square.

    Args:
        image: uint8 `[H, W, 3]`.
        size: side of the square in pixels.
        seed: int64 `[2]`.

    Returns:
        float32 `[size, size, 3]` in 0 to 1, from a part with 8 to 100 % of the area and sides in a
        ratio between 3:4 and 4:3.
    """
    begin, shape, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=ASPECT,
        area_range=AREA,
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    part = tf.slice(image, begin, shape)
    resized = tf.image.resize(part, [size, size], "bicubic")
    # Bicubic resizing overshoots at edges.
    return tf.ensure_shape(tf.clip_by_value(resized / 255.0, 0.0, 1.0), [size, size, 3])


def jitter_colors(image: Tensor, seed: Tensor, strength: float = 1.0) -> Tensor:
    """Changes brightness, contrast, saturation and hue in random order, each clipped to 0 to 1.

    Args:
        image: float32 `[S, S, 3]` in 0 to 1.
        seed: int64 `[2]`.
        strength: s of the SimCLR paper; 0 changes nothing.
    """
    if not strength:
        return image
    spread = 0.8 * strength
    low, high = max(1.0 - spread, 0.0), 1.0 + spread

    def brightness(image):
        return image * tf.random.stateless_uniform([], tf.random.fold_in(seed, 0), low, high)

    steps = [
        brightness,
        lambda x: tf.image.stateless_random_contrast(x, low, high, tf.random.fold_in(seed, 1)),
        lambda x: tf.image.stateless_random_saturation(x, low, high, tf.random.fold_in(seed, 2)),
        lambda x: tf.image.stateless_random_hue(
            x, min(0.2 * strength, 0.5), tf.random.fold_in(seed, 3)
        ),
    ]
    order = tf.argsort(tf.random.stateless_uniform([len(steps)], tf.random.fold_in(seed, 4)))
    for position in range(len(steps)):
        branches = [functools.partial(step, image) for step in steps]
        image = tf.clip_by_value(tf.switch_case(order[position], branches), 0.0, 1.0)
    return image


def blur(image: Tensor, sigma: Tensor, side: int) -> Tensor:
    """Gaussian blur.

    Args:
        image: float32 `[S, S, 3]` in 0 to 1; it is mirrored at the border.
        sigma: standard deviation in pixels.
        side: of the kernel in pixels, rounded to an odd number.
    """
    radius = max(side // 2, 1)
    distances = tf.range(-radius, radius + 1, dtype=tf.float32)
    kernel = tf.exp(-(distances**2) / (2.0 * sigma**2))
    # A Gaussian is separable: a column and then a row cost less than a square.
    kernel = tf.tile((kernel / tf.reduce_sum(kernel))[:, None, None, None], [1, 1, 3, 1])
    border = [[0, 0], [radius, radius], [radius, radius], [0, 0]]
    batch = tf.pad(image[None], border, "SYMMETRIC")
    batch = tf.nn.depthwise_conv2d(batch, kernel, [1, 1, 1, 1], "VALID")
    kernel = tf.transpose(kernel, [1, 0, 2, 3])
    batch = tf.nn.depthwise_conv2d(batch, kernel, [1, 1, 1, 1], "VALID")
    return tf.clip_by_value(batch[0], 0.0, 1.0)

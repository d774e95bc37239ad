"""Two views of an image for contrastive pre-training, as SimCLR makes them.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", appendix
A: crop to a random size and shape, flip, color distortion of strength s, blur. The paper compares
its self-training with a SimCLR checkpoint (section 4.3).
"""

import functools

import tensorflow as tf

from official_selftrain.data.augmentation.policies import fold

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
GRAY, JITTER, BLUR = 0.2, 0.8, 0.5  # probabilities
SIGMA = (0.1, 2.0)  # of the blur, in pixels


def two_views(image, size, seed, strength=1.0):
    """Two independent draws of one image.

    Args:
        image: uint8 `[H, W, 3]`.
        size: side of a view in pixels.
        seed: int64 `[2]`; equal seeds give equal views.
        strength: s of the color distortion; the paper of SimCLR takes 1 on ImageNet.

    Returns:
        float32 `[2, size, size, 3]`, 0..1.
    """
    return tf.stack([view(image, size, fold(seed, number), strength) for number in (0, 1)])


def view(image, size, seed, strength=1.0):
    """One draw, float32 `[size, size, 3]` in 0..1; see `two_views`."""
    image = crop(image, size, fold(seed, 0))
    numbers = tf.random.stateless_uniform([4], fold(seed, 1))
    image = tf.cond(numbers[0] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    image = tf.cond(
        numbers[1] < JITTER, lambda: jitter_colors(image, fold(seed, 2), strength), lambda: image
    )
    image = tf.cond(
        numbers[2] < GRAY,
        lambda: tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)),
        lambda: image,
    )
    sigma = tf.random.stateless_uniform([], fold(seed, 3), *SIGMA)
    return tf.cond(numbers[3] < BLUR, lambda: blur(image, sigma, size // 10), lambda: image)


def crop(image, size, seed):
    """A part of 8 to 100 % of the area with sides 3:4 to 4:3, resized to a square, 0..1."""
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
    return tf.ensure_shape(tf.clip_by_value(resized / 255.0, 0.0, 1.0), [size, size, 3])


def jitter_colors(image, seed, strength=1.0):
    """Brightness, contrast, saturation and hue in random order, each clipped to 0..1."""
    if not strength:
        return image
    spread = 0.8 * strength
    low, high = max(1.0 - spread, 0.0), 1.0 + spread

    def brightness(image):
        return image * tf.random.stateless_uniform([], fold(seed, 0), low, high)

    steps = [
        brightness,
        lambda x: tf.image.stateless_random_contrast(x, low, high, fold(seed, 1)),
        lambda x: tf.image.stateless_random_saturation(x, low, high, fold(seed, 2)),
        lambda x: tf.image.stateless_random_hue(x, min(0.2 * strength, 0.5), fold(seed, 3)),
    ]
    order = tf.argsort(tf.random.stateless_uniform([len(steps)], fold(seed, 4)))
    for position in range(len(steps)):
        branches = [functools.partial(step, image) for step in steps]
        image = tf.clip_by_value(tf.switch_case(order[position], branches), 0.0, 1.0)
    return image


def blur(image, sigma, side):
    """Gaussian blur of an image `[S, S, 3]` by about `side` pixels, mirrored at the border."""
    radius = max(side // 2, 1)
    places = tf.range(-radius, radius + 1, dtype=tf.float32)
    kernel = tf.exp(-(places**2) / (2.0 * sigma**2))
    kernel = tf.tile((kernel / tf.reduce_sum(kernel))[:, None, None, None], [1, 1, 3, 1])
    border = [[0, 0], [radius, radius], [radius, radius], [0, 0]]
    batch = tf.pad(image[None], border, "SYMMETRIC")
    batch = tf.nn.depthwise_conv2d(batch, kernel, [1, 1, 1, 1], "VALID")
    kernel = tf.transpose(kernel, [1, 0, 2, 3])
    batch = tf.nn.depthwise_conv2d(batch, kernel, [1, 1, 1, 1], "VALID")
    return tf.clip_by_value(batch[0], 0.0, 1.0)

"""Policy S1 of the paper: horizontal flip, scale jitter and crop (paper section 3.1).

Image, boxes and mask move together by one draw. Geometry as released (reference section 16):
legacy bilinear resize without half-pixel centres, padding at the bottom and right by the mean
colour.
"""

import tensorflow as tf

MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)
IGNORE_LABEL = 255


def normalize(image):
    """RGB image 0..255, any dtype, to float32 with ImageNet's mean 0 and deviation 1."""
    image = tf.cast(image, tf.float32) / 255.0
    return (image - tf.constant(MEAN)) / tf.constant(STDDEV)


def flip(image, boxes, mask=None):
    """Mirrors left to right: image `[H, W, C]`, boxes `[N, 4]` as fractions, mask `[H, W]`."""
    ymin, xmin, ymax, xmax = tf.unstack(boxes, axis=-1)
    boxes = tf.stack([ymin, 1.0 - xmax, ymax, 1.0 - xmin], axis=-1)
    return image[:, ::-1], boxes, None if mask is None else mask[:, ::-1]


def draw(seed, jitter):
    """The random numbers of S1: flip (bool), scale in `jitter`, crop position `[2]` in [0, 1).

    Args:
        seed: int64 tensor `[2]`; equal seeds give equal draws.
        jitter: (smallest, largest) scale relative to the target size, drawn uniformly.
    """
    numbers = tf.random.stateless_uniform([4], seed)
    return numbers[0] < 0.5, jitter[0] + numbers[1] * (jitter[1] - jitter[0]), numbers[2:]


def plan_resize(image_size, target_size, scale=None, position=(0.0, 0.0)):
    """The released `image_info` of fitting an image into a target.

    Args:
        image_size: int `[2]`, height and width.
        target_size: (height, width) of the network input.
        scale: of the jitter; None fits exactly.
        position: where to crop what is too large, `[2]` in [0, 1).

    Returns:
        float32 `[4, 2]`: image size, target size, scale per axis, crop offset in pixels.
    """
    size = tf.cast(image_size, tf.float32)
    target = tf.constant(target_size, tf.float32)
    box = target if scale is None else tf.round(scale * target)
    factor = tf.reduce_min(box / size)
    scaled = tf.round(size * factor)
    offset = tf.floor(tf.maximum(scaled - target, 0.0) * position)
    return tf.stack([size, target, scaled / size, offset])


def resize_image(image, info, padded_size=None):
    """Normalised, resized, cropped and padded image `[h, w, 3]` float32, from uint8."""
    scaled, offset, target = _geometry(info)
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=scaled)[0]
    return _crop_and_pad(normalize(image), offset, target, padded_size)


def resize_mask(mask, info):
    """Mask `[H, W]` of class ids by nearest neighbour to `[h, w]`; the padding is ignored."""
    scaled, offset, target = _geometry(info)
    # Class ids are raised by one, so that the padding by zeros becomes -1, which is ignored.
    raised = tf.cast(mask, tf.int32)[None, ..., None] + 1
    raised = tf.raw_ops.ResizeNearestNeighbor(images=raised, size=scaled)[0]
    mask = _crop_and_pad(raised, offset, target)[..., 0] - 1
    return tf.where(mask == -1, IGNORE_LABEL, mask)


def resize_boxes(boxes, info):
    """Boxes `[N, 4]` as fractions of the image to pixels of the network input, clipped to it.

    Boxes that were cropped away become empty; `non_empty` finds the others.
    """
    size, target, scale, offset = tf.unstack(info)
    boxes = boxes * tf.tile(size * scale, [2]) - tf.tile(offset, [2])
    return tf.clip_by_value(boxes, 0.0, tf.tile(target, [2]) - 1.0)


def non_empty(boxes):
    """Bool `[N]`: boxes with a positive height and width."""
    return tf.logical_and(boxes[:, 2] > boxes[:, 0], boxes[:, 3] > boxes[:, 1])


def _geometry(info):
    size, target, scale, offset = tf.unstack(info)
    to_int = lambda x: tf.cast(tf.round(x), tf.int32)  # noqa: E731
    return to_int(size * scale), to_int(offset), to_int(target)


def _crop_and_pad(image, offset, target, padded_size=None):
    image = image[offset[0] : offset[0] + target[0], offset[1] : offset[1] + target[1]]
    height, width = (target[0], target[1]) if padded_size is None else padded_size
    return tf.image.pad_to_bounding_box(image, 0, 0, height, width)

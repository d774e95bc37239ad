"""Policies S1 to S4 of the paper: image operations, then flip, scale jitter and crop (section 3.1).

Image, boxes and mask move together by one draw. Geometry as released (reference section 16):
legacy bilinear resize without half-pixel centers, padding at the bottom and right by the mean
color.
"""

import numpy as np
import tensorflow as tf

from official_selftrain.data.augmentation import policies
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.extras import import_extra


class Augmentation:
    """The augmentation of a training source.

    Args:
        source: `config.InputConfig`, of which `policy`, `jitter`, `flip` and what sets up the
            operations are read.
        size: (height, width) of the network input.

    Calling it with a decoded example (`image` uint8 `[H, W, 3]`, `boxes` `[N, 4]` as fractions and,
    optionally, `mask` uint8 `[H, W]` or `[H, W, C]`) and a seed int64 `[2]` returns what `fit`
    returns. Equal seeds give equal results, with the exception of policy "keras_cv".
    """

    def __init__(self, source, size):
        self.size, self.flip, self.jitter = size, source.flip, source.scale_jitter
        self.policy, self.as_released = make_policy(source), source.as_released

    def __call__(self, example, seed):
        scene = {key: example[key] for key in ("image", "boxes", "mask") if key in example}
        if self.policy is not None:
            scene = self.policy(scene, seed)
        mirrored, scale, position = draw(seed, self.jitter)
        if self.flip:
            scene = tf.cond(mirrored, lambda: flip(scene), lambda: scene)
        exact = self.jitter == (1.0, 1.0)
        shape = tf.shape(scene["image"])[:2]
        info = plan_resize(shape, self.size, None if exact else scale, position)
        return fit(scene, info, self.as_released)


def make_policy(source):
    """The image operations of a source, a function (scene, seed) -> scene; None for S1.

    Raises:
        UserError: for "keras_cv" without the extra.
    """
    if source.policy == "S1":
        return None
    if source.policy == "S4":
        return policies.rand_augment(source.magnitude, source.num_ops, source.as_released)
    if source.policy == "keras_cv":
        return keras_cv_policy(source.magnitude, source.num_ops)
    return policies.auto_augment(source.auto_augment, source.as_released)


def keras_cv_policy(magnitude=10.0, num_ops=2):
    """KerasCV's RandAugment without its geometric operations, so that labels stay true.

    Its layers draw from a generator of their own: neither reproducible by position nor resumable.

    Args:
        magnitude: 0..10, a tenth of it is what KerasCV calls magnitude.
        num_ops: operations for an image.

    Raises:
        UserError: without the extra `[keras-cv]`.
    """
    keras_cv = import_extra("keras_cv", "keras-cv", "the policy keras_cv")
    layer = keras_cv.layers.RandAugment(
        value_range=(0, 255),
        augmentations_per_image=num_ops,
        magnitude=min(magnitude / policies.MAX_LEVEL, 1.0),
        geometric=False,
    )

    def apply(scene, seed):
        image = layer(tf.cast(scene["image"], tf.float32), training=True)
        return scene | {"image": tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)}

    return apply


def normalize(image):
    """RGB image `[..., W, 3]` of 0..255 to float32 with ImageNet's mean 0 and deviation 1."""
    image = tf.convert_to_tensor(image)
    width = tf.shape(image)[-2]
    # Rows of 3 W numbers, because broadcasting over three channels takes three times as long.
    scale = tf.tile(tf.constant(1.0 / (255.0 * np.array(STDDEV)), tf.float32), [width])
    offset = tf.tile(tf.constant(-np.array(MEAN) / np.array(STDDEV), tf.float32), [width])
    rows = tf.reshape(tf.cast(image, tf.float32), [-1, 3 * width])
    return tf.ensure_shape(tf.reshape(rows * scale + offset, tf.shape(image)), image.shape)


def flip(scene):
    """Mirrors left to right: a dict of image `[H, W, C]`, boxes `[N, 4]` and perhaps a mask."""
    ymin, xmin, ymax, xmax = tf.unstack(scene["boxes"], axis=-1)
    mirrored = {key: tf.reverse(scene[key], [1]) for key in ("image", "mask") if key in scene}
    return mirrored | {"boxes": tf.stack([ymin, 1.0 - xmax, ymax, 1.0 - xmin], axis=-1)}


def fit(scene, info, as_released=False):
    """A scene resized, cropped and padded to the network input.

    Args:
        scene: dict of `image` uint8 `[H, W, 3]`, `boxes` `[N, 4]` as fractions and perhaps `mask`.
        info: what `plan_resize` or `plan_pad` returned.
        as_released: see `resize_mask`.

    Returns:
        dict: `image` float32 `[h, w, 3]`, normalized; `boxes` in pixels of it, those cropped away
        empty; `mask` int32 `[h, w]` or `[h, w, C]`, 255 where padded; `image_info`.
    """
    fitted = {
        "image": resize_image(scene["image"], info),
        "boxes": resize_boxes(scene["boxes"], info),
        "image_info": info,
    }
    if "mask" in scene:
        fitted["mask"] = resize_mask(scene["mask"], info, as_released)
    return fitted


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
    scaled = tf.maximum(tf.round(size * factor), 1.0)
    offset = tf.floor(tf.maximum(scaled - target, 0.0) * position)
    return tf.stack([size, target, scaled / size, offset])


def plan_pad(image_size, target_size):
    """`image_info` of an image that is padded to a target without being resized.

    An image larger than the target loses what is outside; check before.
    """
    size = tf.cast(image_size, tf.float32)
    return tf.stack([size, tf.constant(target_size, tf.float32), tf.ones(2), tf.zeros(2)])


def resize_image(image, info, padded_size=None):
    """Normalized, resized, cropped and padded image `[h, w, 3]` float32, from uint8."""
    scaled, offset, target = _geometry(info)
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=scaled)[0]
    return _crop_and_pad(normalize(image), offset, target, padded_size)


def resize_mask(mask, info, as_released=False):
    """Mask `[H, W]` or `[H, W, C]` by nearest neighbor to `[h, w, ...]`; the padding is 255.

    As released, the scaled size is cut off to whole pixels after rounding errors, so that a mask is
    now and then a pixel narrower than its image.
    """
    scaled, offset, target = _geometry(info)
    if as_released:
        scaled = tf.cast(info[0] * info[2], tf.int32)
    # Class ids are raised by one, so that the padding by zeros becomes -1, which is ignored.
    flat = len(mask.shape) == 2
    raised = tf.cast(mask[..., None] if flat else mask, tf.int32)[None] + 1
    raised = tf.raw_ops.ResizeNearestNeighbor(images=raised, size=scaled)[0]
    fitted = _crop_and_pad(raised, offset, target) - 1
    fitted = tf.where(fitted == -1, IGNORE_LABEL, fitted)
    return fitted[..., 0] if flat else fitted


def resize_boxes(boxes, info):
    """Boxes `[N, 4]` as fractions of the image to pixels of the network input, clipped to it.

    Boxes that were cropped away become empty; `image_ops.non_empty` finds the others.
    """
    size, target, scale, offset = tf.unstack(info)
    boxes = boxes * tf.tile(size * scale, [2]) - tf.tile(offset, [2])
    return tf.clip_by_value(boxes, 0.0, tf.tile(target, [2]) - 1.0)


def _geometry(info):
    size, target, scale, offset = tf.unstack(info)
    to_int = lambda x: tf.cast(tf.round(x), tf.int32)  # noqa: E731
    return to_int(size * scale), to_int(offset), to_int(target)


def _crop_and_pad(image, offset, target, padded_size=None):
    image = image[offset[0] : offset[0] + target[0], offset[1] : offset[1] + target[1]]
    height, width = (target[0], target[1]) if padded_size is None else padded_size
    return tf.image.pad_to_bounding_box(image, 0, 0, height, width)

"""Policies S1 to S4 of the paper: image operations, then flip, scale jitter and crop.

One draw moves image, boxes and mask together. The geometry is that of the released code: bilinear
resizing as in TensorFlow 1, without half-pixel centers, and padding at the bottom and at the right
by the mean color.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from official_selftrain.config import InputConfig
from official_selftrain.data.augmentation import policies
from official_selftrain.data.augmentation.policies import Scene
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.extras import import_extra
from official_selftrain.utils.types import Tensor


class Augmentation:
    """The augmentation of a training source.

    Args:
        source: its policy, scale jitter and flip are applied.
        size: (height, width) of the network input.
    """

    def __init__(self, source: InputConfig, size: tuple[int, int]) -> None:
        self.size, self.flip, self.jitter = size, source.flip, source.scale_jitter
        self.policy, self.as_released = make_policy(source), source.as_released

    def __call__(self, example: Scene, seed: Tensor) -> Scene:
        """Augments one decoded example.

        Args:
            example: `image` uint8 `[H, W, 3]`, `boxes` `[N, 4]` as fractions and, optionally,
                `mask` uint8 `[H, W]` or `[H, W, C]`; other entries are ignored.
            seed: int64 `[2]`; equal seeds give equal results, except for policy "keras_cv".

        Returns:
            The dict that `fit` returns.
        """
        scene: Scene = {key: example[key] for key in ("image", "boxes", "mask") if key in example}
        if self.policy is not None:
            scene = self.policy(scene, seed)
        mirrored, scale, position = draw(seed, self.jitter)
        if self.flip:
            scene = tf.cond(mirrored, lambda: flip(scene), lambda: scene)
        # Without jitter nothing is rounded twice, so that the image fits the input exactly.
        exact = self.jitter == (1.0, 1.0)
        shape = tf.shape(scene["image"])[:2]
        info = plan_resize(shape, self.size, None if exact else scale, position)
        return fit(scene, info, self.as_released)


def make_policy(source: InputConfig) -> Callable[[Scene, Tensor], Scene] | None:
    """The image operations of a source as a function (scene, seed) -> scene; None for S1.

    Raises:
        UserError: if the policy is "keras_cv" and its extra is not installed.
    """
    if source.policy == "S1":
        return None
    if source.policy == "S4":
        return policies.rand_augment(source.magnitude, source.num_ops, source.as_released)
    if source.policy == "keras_cv":
        return keras_cv_policy(source.magnitude, source.num_ops)
    return policies.auto_augment(source.auto_augment, source.as_released)


def keras_cv_policy(magnitude: float = 10.0, num_ops: int = 2) -> Callable[[Scene, Tensor], Scene]:
    """KerasCV's RandAugment without its geometric operations, so that the labels stay correct.

    Its layers draw from their own random generator, so a resumed training sees other draws.

    Args:
        magnitude: 0 to 10; a tenth of it is what KerasCV calls magnitude.
        num_ops: number of operations per image.

    Raises:
        UserError: if the extra `[keras-cv]` is not installed.
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


def normalize(image: Tensor) -> Tensor:
    """An RGB image `[..., W, 3]` of 0 to 255 as float32 with ImageNet's mean 0 and deviation 1."""
    image = tf.convert_to_tensor(image)
    width = tf.shape(image)[-2]
    # In rows of 3 W numbers, because broadcasting over three channels takes three times as long.
    scale = tf.tile(tf.constant(1.0 / (255.0 * np.array(STDDEV)), tf.float32), [width])
    offset = tf.tile(tf.constant(-np.array(MEAN) / np.array(STDDEV), tf.float32), [width])
    rows = tf.reshape(tf.cast(image, tf.float32), [-1, 3 * width])
    return tf.ensure_shape(tf.reshape(rows * scale + offset, tf.shape(image)), image.shape)


def flip(scene: Scene) -> Scene:
    """Flips `image` `[H, W, C]`, `boxes` `[N, 4]` as fractions and, if present, `mask` sideways."""
    ymin, xmin, ymax, xmax = tf.unstack(scene["boxes"], axis=-1)
    mirrored = {key: tf.reverse(scene[key], [1]) for key in ("image", "mask") if key in scene}
    return mirrored | {"boxes": tf.stack([ymin, 1.0 - xmax, ymax, 1.0 - xmin], axis=-1)}


def fit(scene: Scene, info: Tensor, as_released: bool = False) -> Scene:
    """Resizes, crops and pads a scene to the network input.

    Args:
        scene: dict of `image` uint8 `[H, W, 3]`, `boxes` `[N, 4]` as fractions and, optionally,
            `mask` uint8 `[H, W]` or `[H, W, C]`.
        info: `image_info` `[4, 2]` from `plan_resize` or `plan_pad`.
        as_released: see `resize_mask`.

    Returns:
        dict: `image` float32 `[h, w, 3]`, normalized; `boxes` `[N, 4]` in its pixels, empty if they
        were cropped away; `mask` int32 `[h, w]` or `[h, w, C]`, 255 where padded; `image_info`.
    """
    fitted = {
        "image": resize_image(scene["image"], info),
        "boxes": resize_boxes(scene["boxes"], info),
        "image_info": info,
    }
    if "mask" in scene:
        fitted["mask"] = resize_mask(scene["mask"], info, as_released)
    return fitted


def draw(seed: Tensor, jitter: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the random numbers of policy S1.

    Args:
        seed: int64 `[2]`; equal seeds give equal draws.
        jitter: smallest and largest scale relative to the target size.

    Returns:
        Whether to flip, bool `[]`; the scale, float32 `[]`, uniform in `jitter`; and the crop
        position (y, x), float32 `[2]`, uniform in [0, 1).
    """
    numbers = tf.random.stateless_uniform([4], seed)
    return numbers[0] < 0.5, jitter[0] + numbers[1] * (jitter[1] - jitter[0]), numbers[2:]


def plan_resize(
    image_size: Tensor,
    target_size: tuple[int, int],
    scale: Tensor | None = None,
    position: Tensor = (0.0, 0.0),
) -> Tensor:
    """How an image is resized and cropped to the network input, as `image_info`.

    Args:
        image_size: (height, width) of the image, `[2]`.
        target_size: (height, width) of the network input.
        scale: size of the image relative to the one that just fits into the input; None is 1.
        position: (y, x) in [0, 1), where to crop an image that is too large.

    Returns:
        float32 `[4, 2]` with rows (y, x) as in the released code: image size, target size, scale
        per axis, crop offset in pixels.
    """
    size = tf.cast(image_size, tf.float32)
    target = tf.constant(target_size, tf.float32)
    box = target if scale is None else tf.round(scale * target)
    factor = tf.reduce_min(box / size)
    scaled = tf.maximum(tf.round(size * factor), 1.0)  # a long, narrow image keeps a pixel
    offset = tf.floor(tf.maximum(scaled - target, 0.0) * position)
    return tf.stack([size, target, scaled / size, offset])


def plan_pad(image_size: Tensor, target_size: tuple[int, int]) -> Tensor:
    """`image_info` `[4, 2]` of an image that is padded to the network input without resizing.

    A larger image is cropped without notice; check its size before.

    Args:
        image_size: (height, width) of the image, `[2]`.
        target_size: (height, width) of the network input.
    """
    size = tf.cast(image_size, tf.float32)
    return tf.stack([size, tf.constant(target_size, tf.float32), tf.ones(2), tf.zeros(2)])


def resize_image(image: Tensor, info: Tensor, padded_size: tuple[int, int] | None = None) -> Tensor:
    """Resizes, normalizes, crops and pads an image.

    Args:
        image: uint8 `[H, W, 3]`.
        info: `image_info` `[4, 2]`.
        padded_size: (height, width) of the result; None is the target size of `info`.

    Returns:
        float32 `[h, w, 3]`, 0 where padded, which is the mean color.
    """
    scaled, offset, target = _geometry(info)
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=scaled)[0]
    return _crop_and_pad(normalize(image), offset, target, padded_size)


def resize_mask(mask: Tensor, info: Tensor, as_released: bool = False) -> Tensor:
    """Resizes a mask by nearest neighbor, crops it and pads it.

    Args:
        mask: uint8 `[H, W]` or `[H, W, C]`.
        info: `image_info` `[4, 2]`.
        as_released: truncate the scaled size instead of rounding it. Because of rounding errors a
            mask is then sometimes one pixel narrower than its image.

    Returns:
        int32 `[h, w]` or `[h, w, C]`, 255 where padded.
    """
    scaled, offset, target = _geometry(info)
    if as_released:
        scaled = tf.cast(info[0] * info[2], tf.int32)
    # Class ids are increased by one until the mask is padded, to tell class 0 from the zeros of the
    # padding.
    flat = len(mask.shape) == 2
    raised = tf.cast(mask[..., None] if flat else mask, tf.int32)[None] + 1
    raised = tf.raw_ops.ResizeNearestNeighbor(images=raised, size=scaled)[0]
    fitted = _crop_and_pad(raised, offset, target) - 1
    fitted = tf.where(fitted == -1, IGNORE_LABEL, fitted)
    return fitted[..., 0] if flat else fitted


def resize_boxes(boxes: Tensor, info: Tensor) -> Tensor:
    """Moves boxes `[N, 4]` from fractions of the image to pixels of the network input.

    They are clipped to [0, h - 1] and [0, w - 1]. Boxes that were cropped away become empty; see
    `image_ops.non_empty`.
    """
    size, target, scale, offset = tf.unstack(info)
    boxes = boxes * tf.tile(size * scale, [2]) - tf.tile(offset, [2])
    return tf.clip_by_value(boxes, 0.0, tf.tile(target, [2]) - 1.0)


def _geometry(info: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled size, crop offset and target size of an `image_info`, int32 `[2]` each."""
    size, target, scale, offset = tf.unstack(info)
    # The scale is scaled size / size, so the product is whole only up to rounding errors.
    scaled, offset, target = (
        tf.cast(tf.round(x), tf.int32) for x in (size * scale, offset, target)
    )
    return scaled, offset, target


def _crop_and_pad(
    image: Tensor, offset: Tensor, target: Tensor, padded_size: tuple[int, int] | None = None
) -> Tensor:
    # Slices may end beyond the image, so one that is smaller than the target is not cut.
    image = image[offset[0] : offset[0] + target[0], offset[1] : offset[1] + target[1]]
    height, width = (target[0], target[1]) if padded_size is None else padded_size
    return tf.image.pad_to_bounding_box(image, 0, 0, height, width)

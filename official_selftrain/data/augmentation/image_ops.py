"""Image operations of AutoAugment and RandAugment, each a plain function of image and argument.

Every function takes an image uint8 `[H, W, 3]`, a tensor or a NumPy array, inside `tf.data` or
eagerly, and returns a tensor of the same shape and type. The geometric ones also take masks
`[H, W]`. Each has a counterpart that moves boxes `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of
the image. Sampling is nearest neighbor; uncovered pixels get a fill value.

The operations equal those of the released code. `as_released=True` also keeps what look like its
mistakes: `contrast` blends with the number of pixels instead of the mean gray, `solarize` at 256
inverts everything instead of nothing, boxes are truncated to whole pixels, and a box that has left
the image stays as a strip at its edge.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from official_selftrain.utils.types import Tensor

FILL = 128  # gray of uncovered pixels
EDGE_STRIP = 0.05  # width that the released code gives to a box without area at the image's edge


# --- Color ----------------------------------------------------------------------------------


def blend(degenerate: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """`degenerate + factor * (image - degenerate)`, clipped to 0 to 255 and truncated.

    Args:
        degenerate: the result for a factor of 0, an image or a gray value.
        image: the result for a factor of 1.
        factor: larger ones extrapolate.
    """
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    mixed = degenerate + factor * (image - degenerate)
    return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def autocontrast(image: Tensor) -> Tensor:
    """Stretches every channel to 0 to 255; a channel with a single value stays as it is."""
    low = tf.cast(tf.reduce_min(image, axis=[0, 1]), tf.float32)
    high = tf.cast(tf.reduce_max(image, axis=[0, 1]), tf.float32)
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.where(flat, 1.0, high - low))
    offset = tf.where(flat, 0.0, -low * scale)
    stretched = tf.cast(image, tf.float32) * scale + offset
    return tf.cast(tf.clip_by_value(stretched, 0.0, 255.0), tf.uint8)


def equalize(image: Tensor) -> Tensor:
    """Makes the histogram of every channel as flat as a lookup table of 256 values can."""
    # Channels get ranges of their own, so that one histogram serves all three.
    bins = tf.cast(image, tf.int32) + tf.constant([0, 256, 512])
    histogram = tf.math.bincount(tf.reshape(bins, [-1]), minlength=768, maxlength=768)
    histogram = tf.reshape(histogram, [3, 256])
    last = tf.reduce_max(tf.where(histogram > 0, tf.range(256), 0), axis=1)
    in_last = tf.gather(histogram, last, axis=1, batch_dims=1)[:, None]
    step = (tf.reduce_sum(histogram, axis=1, keepdims=True) - in_last) // 255
    table = (tf.cumsum(histogram, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    table = tf.where(step == 0, tf.range(256), tf.clip_by_value(table, 0, 255))
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [768]), bins)


def invert(image: Tensor) -> Tensor:
    """The negative of an image."""
    return 255 - tf.convert_to_tensor(image)


def posterize(image: Tensor, bits: Tensor) -> Tensor:
    """Keeps only the highest `bits` of every value, at least one and at most eight."""
    shift = tf.cast(tf.clip_by_value(8 - tf.cast(bits, tf.int32), 0, 7), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def solarize(image: Tensor, threshold: Tensor = 128, as_released: bool = False) -> Tensor:
    """Inverts all values that are at least `threshold`; 256 changes nothing.

    As released, the threshold is a byte: 256 wraps to 0 and inverts everything.
    """
    threshold = threshold % 256 if as_released else threshold
    bright = tf.cast(tf.cast(image, tf.int32) >= tf.cast(threshold, tf.int32), tf.uint8)
    return tf.bitwise.bitwise_xor(image, 255 * bright)


def solarize_add(image: Tensor, addition: Tensor, threshold: Tensor = 128) -> Tensor:
    """Adds `addition` to all values below `threshold`, clipped to 0 to 255."""
    values = tf.cast(image, tf.int32)
    dark = tf.cast(values < threshold, tf.int32)
    added = values + tf.cast(addition, tf.int32) * dark
    return tf.cast(tf.clip_by_value(added, 0, 255), tf.uint8)


def color(image: Tensor, factor: Tensor) -> Tensor:
    """Changes the saturation: the factor 0 gives a gray image, 1 the image itself."""
    image = tf.convert_to_tensor(image)
    return blend(tf.image.rgb_to_grayscale(image), image, factor)


def contrast(image: Tensor, factor: Tensor, as_released: bool = False) -> Tensor:
    """Changes the contrast: the factor 0 gives the mean gray, 1 the image itself.

    As released, the number of pixels / 256, at most 255, replaces the mean: white for an image
    of 65,536 pixels or more, so that a factor below 1 brightens photographs and one above darkens.
    """
    image = tf.convert_to_tensor(image)
    if as_released:
        mean = tf.minimum(tf.cast(tf.size(image) // 3, tf.float32) / 256.0, 255.0)
        mean = tf.floor(mean)
    else:
        gray = tf.cast(tf.image.rgb_to_grayscale(image), tf.float32)
        mean = tf.floor(tf.reduce_mean(gray) + 0.5)
    return blend(mean, image, factor)


def brightness(image: Tensor, factor: Tensor) -> Tensor:
    """Changes the brightness: the factor 0 gives black, 1 the image itself."""
    return blend(0.0, image, factor)


def sharpness(image: Tensor, factor: Tensor) -> Tensor:
    """Changes the sharpness: the factor 0 smooths with a 3 x 3 kernel, 1 gives the image itself.

    The pixels at the border are not smoothed.
    """
    image = tf.convert_to_tensor(image)
    height, width = tf.shape(image)[0], tf.shape(image)[1]

    def smoothed():
        # Summed tap by tap: a convolution kernel may add in another order, and truncation then
        # turns the last bit into a gray level.
        outer = tf.cast(image, tf.float32) * np.float32(1 / 13)
        center = tf.cast(image, tf.float32) * np.float32(5 / 13)
        inner = tf.zeros([height - 2, width - 2, 3])
        for y, x in itertools.product(range(3), range(3)):
            tap = center if y == x == 1 else outer
            inner += tap[y : height - 2 + y, x : width - 2 + x]
        return paste(image, tf.cast(tf.clip_by_value(inner, 0.0, 255.0), tf.uint8), 1, 1)

    return tf.cond(
        tf.minimum(height, width) > 2, lambda: blend(smoothed(), image, factor), lambda: image
    )


# --- Rectangles ------------------------------------------------------------------------------


def paste(image: Tensor, region: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """The image with `region` at (top, left) in pixels; the region must lie inside the image."""
    # By slices, because TensorFlow cannot assign to a part of a tensor in a graph.
    bottom, right = top + tf.shape(region)[0], left + tf.shape(region)[1]
    middle = image[top:bottom]
    middle = tf.concat([middle[:, :left], region, middle[:, right:]], axis=1)
    return tf.concat([image[:top], middle, image[bottom:]], axis=0)


def cutout(image: Tensor, center: Tensor, half_size: Tensor) -> Tensor:
    """Paints a gray rectangle, clipped to the image.

    Args:
        image: uint8 `[H, W, 3]`.
        center: int32 (y, x) in pixels, `[2]`.
        half_size: int32 `[]` or `[2]`; rows y - half_size to y + half_size - 1 are painted.
    """
    image = tf.convert_to_tensor(image)
    size, center = tf.shape(image)[:2], tf.convert_to_tensor(center)
    first = tf.clip_by_value(center - half_size, 0, size)
    last = tf.clip_by_value(center + half_size, first, size)
    shape = tf.concat([last - first, [3]], axis=0)
    return paste(image, tf.fill(shape, tf.constant(FILL, tf.uint8)), first[0], first[1])


def box_region(box: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of a box.

    Args:
        box: `[4]`, (ymin, xmin, ymax, xmax) as fractions of the image.
        size: (height, width) of the image, int32 `[2]`.

    Returns:
        First (row, column) and number of (rows, columns), int32 `[2]` each. The row and the column
        at the end of the box belong to it, so there is at least one of each.
    """
    size = tf.convert_to_tensor(size)
    corners = tf.cast(tf.tile(tf.cast(size, tf.float32), [2]) * box, tf.int32)
    first = tf.minimum(corners[:2], size - 1)
    return first, tf.minimum(corners[2:], size - 1) - first + 1


def inside_box(image: Tensor, box: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies `function` to the pixels of a box as if they were an image."""
    image = tf.convert_to_tensor(image)
    (top, left), (rows, columns) = map(tf.unstack, box_region(box, tf.shape(image)[:2]))
    region = function(image[top : top + rows, left : left + columns])
    return paste(image, region, top, left)


# --- Geometry --------------------------------------------------------------------------------


def translate(image: Tensor, shift: Tensor, fill: int = FILL) -> Tensor:
    """Moves the content of an image: `output[y, x] = image[y + shift[0], x + shift[1]]`.

    Args:
        image: image `[H, W, C]` or mask `[H, W]`.
        shift: int32 (y, x) in pixels, `[2]`; positive values move the content up and to the left.
        fill: value of the uncovered pixels.
    """
    image = tf.convert_to_tensor(image)
    size = tf.shape(image)[:2]
    shift = tf.clip_by_value(shift, -size, size)
    forward, back = tf.maximum(shift, 0), tf.maximum(-shift, 0)
    kept = image[forward[0] : size[0] - back[0], forward[1] : size[1] - back[1]]
    padding = tf.stack([back, forward], axis=1)
    if len(image.shape) == 3:
        padding = tf.pad(padding, [[0, 1], [0, 0]])
    return tf.pad(kept, padding, constant_values=tf.cast(fill, image.dtype))


def warp(image: Tensor, matrix: Tensor, fill: int = FILL) -> Tensor:
    """Affine transformation: `output[p] = image[round(A p + b)]` for pixel indices p = (x, y).

    Args:
        image: image `[H, W, C]` or mask `[H, W]`.
        matrix: float32 `[6]`, the two rows of A | b.
        fill: value of the uncovered pixels.
    """
    image = tf.convert_to_tensor(image)
    batch = image[None, ..., None] if len(image.shape) == 2 else image[None]
    output = tf.raw_ops.ImageProjectiveTransformV3(
        images=batch,
        transforms=tf.concat([matrix, [0.0, 0.0]], axis=0)[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(fill),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )
    return tf.reshape(output, tf.shape(image))


def rotation(size: Tensor, degrees: Tensor) -> Tensor:
    """The `warp` matrix `[6]` that rotates an image of `size` (height, width) about its center."""
    angle = tf.cast(degrees, tf.float32) * (math.pi / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    last = tf.cast(size, tf.float32) - 1.0
    x = (last[1] - (cos * last[1] - sin * last[0])) / 2.0
    y = (last[0] - (sin * last[1] + cos * last[0])) / 2.0
    return tf.stack([cos, -sin, x, sin, cos, y])


def shearing(level: Tensor, axis: int) -> Tensor:
    """The `warp` matrix `[6]` of a shear along `axis` (0: y, 1: x) by `level` pixels per pixel."""
    level = tf.cast(level, tf.float32)
    one, zero = tf.ones_like(level), tf.zeros_like(level)
    if axis == 1:
        return tf.stack([one, level, zero, zero, one, zero])
    return tf.stack([one, zero, zero, level, one, zero])


def rotate_boxes(boxes: Tensor, size: Tensor, degrees: Tensor, as_released: bool = False) -> Tensor:
    """Upright boxes `[N, 4]` around the boxes rotated by `rotation`.

    Args:
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image.
        size: (height, width) of the image, `[2]`.
        degrees: as of `rotation`.
        as_released: truncate corners to whole pixels and keep strips of boxes that have left.
    """
    angle = tf.cast(degrees, tf.float32) * (math.pi / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    center = tf.cast(size, tf.float32) / 2.0
    return _move_boxes(boxes, size, [[cos, -sin], [sin, cos]], center, as_released)


def shear_boxes(
    boxes: Tensor, size: Tensor, level: Tensor, axis: int, as_released: bool = False
) -> Tensor:
    """Upright boxes `[N, 4]` around the boxes moved by `shearing`; see `rotate_boxes`."""
    level = tf.cast(level, tf.float32)
    matrix = [[1.0, 0.0], [-level, 1.0]] if axis == 1 else [[1.0, -level], [0.0, 1.0]]
    # Pixels are sheared about the center of the first one; the released code moves boxes about its
    # corner.
    return _move_boxes(boxes, size, matrix, 0.0 if as_released else 0.5, as_released)


def translate_boxes(
    boxes: Tensor, size: Tensor, shift: Tensor, as_released: bool = False
) -> Tensor:
    """Boxes `[N, 4]` moved by `translate`; see `rotate_boxes`."""
    unmoved = [[1.0, 0.0], [0.0, 1.0]]
    return _move_boxes(boxes, size, unmoved, 0.0, as_released, tf.cast(shift, tf.float32))


def _move_boxes(
    boxes: Tensor,
    size: Tensor,
    matrix: Tensor,
    origin: Tensor,
    as_released: bool,
    shift: Tensor = 0.0,
) -> Tensor:
    """Boxes around the corners `matrix @ (corner - origin) + origin - shift`, (y, x) in pixels.

    A box that has left the image becomes (0, 0, 0, 0), and a box without area stays one, so that it
    does not come back in a later operation.
    """
    boxes = tf.convert_to_tensor(boxes)
    size = tf.cast(size, tf.float32)
    ymin, xmin, ymax, xmax = tf.unstack(boxes, axis=-1)
    corners = [tf.stack([y, x], axis=-1) for y in (ymin, ymax) for x in (xmin, xmax)]
    corners = tf.stack(corners, axis=1) * size - origin  # [N, 4, 2]
    whole = _truncate if as_released else tf.identity
    corners = whole(tf.linalg.matvec(tf.convert_to_tensor(matrix), whole(corners)))
    corners = (corners + origin - shift) / size
    low, high = tf.reduce_min(corners, axis=1), tf.reduce_max(corners, axis=1)
    low, high = tf.clip_by_value(low, 0.0, 1.0), tf.clip_by_value(high, 0.0, 1.0)
    if as_released:
        flat = high == low
        low = tf.where(flat, tf.minimum(low, 1.0 - EDGE_STRIP), low)
        high = tf.where(flat, tf.maximum(high, EDGE_STRIP), high)
        return tf.concat([low, high], axis=-1)
    present = non_empty(boxes) & tf.reduce_all(high > low, axis=-1)
    return tf.where(present[:, None], tf.concat([low, high], axis=-1), 0.0)


def _truncate(values: Tensor) -> Tensor:
    return tf.cast(tf.cast(values, tf.int32), tf.float32)


def non_empty(boxes: Tensor) -> Tensor:
    """Which of boxes `[N, 4]` have a positive height and width, bool `[N]`."""
    return tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=-1)

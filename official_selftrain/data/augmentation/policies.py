"""Random sequences of image operations: AutoAugment for detection, and RandAugment.

A policy is a list of rows; a row is a list of steps (operation, probability, level 0 to 10). For
every image it draws rows and applies their steps in order. Image, boxes and mask see the same draw,
which depends only on the seed. Names and tables are those of the released code. RandAugment for
boxes was not released with the paper; this is the one that the same group published later.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from official_selftrain.data.augmentation import image_ops
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import Tensor

Scene = dict[str, Tensor]  # image, boxes and perhaps a mask, which move together

# One row per line, as steps "operation probability level"; one row is drawn for each image.
AUTO_AUGMENT = {
    "v0": """
        TranslateX_BBox 0.6 4, Equalize 0.8 10
        TranslateY_Only_BBoxes 0.2 2, Cutout 0.8 8
        Sharpness 0.0 8, ShearX_BBox 0.4 0
        ShearY_BBox 1.0 2, TranslateY_Only_BBoxes 0.6 6
        Rotate_BBox 0.6 10, Color 1.0 6""",
    "v1": """
        TranslateX_BBox 0.6 4, Equalize 0.8 10
        TranslateY_Only_BBoxes 0.2 2, Cutout 0.8 8
        Sharpness 0.0 8, ShearX_BBox 0.4 0
        ShearY_BBox 1.0 2, TranslateY_Only_BBoxes 0.6 6
        Rotate_BBox 0.6 10, Color 1.0 6
        Color 0.0 0, ShearX_Only_BBoxes 0.8 4
        ShearY_Only_BBoxes 0.8 2, Flip_Only_BBoxes 0.0 10
        Equalize 0.6 10, TranslateX_BBox 0.2 2
        Color 1.0 10, TranslateY_Only_BBoxes 0.4 6
        Rotate_BBox 0.8 10, Contrast 0.0 10
        Cutout 0.2 2, Brightness 0.8 10
        Color 1.0 6, Equalize 1.0 2
        Cutout_Only_BBoxes 0.4 6, TranslateY_Only_BBoxes 0.8 2
        Color 0.2 8, Rotate_BBox 0.8 10
        Sharpness 0.4 4, TranslateY_Only_BBoxes 0.0 4
        Sharpness 1.0 4, SolarizeAdd 0.4 4
        Rotate_BBox 1.0 8, Sharpness 0.2 8
        ShearY_BBox 0.6 10, Equalize_Only_BBoxes 0.6 8
        ShearX_BBox 0.2 6, TranslateY_Only_BBoxes 0.2 10
        SolarizeAdd 0.6 8, Brightness 0.8 10""",
    "v2": """
        Color 0.0 6, Cutout 0.6 8, Sharpness 0.4 8
        Rotate_BBox 0.4 8, Sharpness 0.4 2, Rotate_BBox 0.8 10
        TranslateY_BBox 1.0 8, AutoContrast 0.8 2
        AutoContrast 0.4 6, ShearX_BBox 0.8 8, Brightness 0.0 10
        SolarizeAdd 0.2 6, Contrast 0.0 10, AutoContrast 0.6 0
        Cutout 0.2 0, Solarize 0.8 8, Color 1.0 4
        TranslateY_BBox 0.0 4, Equalize 0.6 8, Solarize 0.0 10
        TranslateY_BBox 0.2 2, ShearY_BBox 0.8 8, Rotate_BBox 0.8 8
        Cutout 0.8 8, Brightness 0.8 8, Cutout 0.2 2
        Color 0.8 4, TranslateY_BBox 1.0 6, Rotate_BBox 0.6 6
        Rotate_BBox 0.6 10, BBox_Cutout 1.0 4, Cutout 0.2 8
        Rotate_BBox 0.0 0, Equalize 0.6 6, ShearY_BBox 0.6 8
        Brightness 0.8 8, AutoContrast 0.4 2, Brightness 0.2 2
        TranslateY_BBox 0.4 8, Solarize 0.4 6, SolarizeAdd 0.2 10
        Contrast 1.0 10, SolarizeAdd 0.2 8, Equalize 0.2 4""",
    "v3": """
        Posterize 0.8 2, TranslateX_BBox 1.0 8
        BBox_Cutout 0.2 10, Sharpness 1.0 8
        Rotate_BBox 0.6 8, Rotate_BBox 0.8 10
        Equalize 0.8 10, AutoContrast 0.2 10
        SolarizeAdd 0.2 2, TranslateY_BBox 0.2 8
        Sharpness 0.0 2, Color 0.4 8
        Equalize 1.0 8, TranslateY_BBox 1.0 8
        Posterize 0.6 2, Rotate_BBox 0.0 10
        AutoContrast 0.6 0, Rotate_BBox 1.0 6
        Equalize 0.0 4, Cutout 0.8 10
        Brightness 1.0 2, TranslateY_BBox 1.0 6
        Contrast 0.0 2, ShearY_BBox 0.8 0
        AutoContrast 0.8 10, Contrast 0.2 10
        Rotate_BBox 1.0 10, Cutout 1.0 10
        SolarizeAdd 0.8 6, Equalize 0.8 8""",
    "test": "TranslateX_BBox 1.0 4, Equalize 1.0 10",
}

RAND_AUGMENT = (
    "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "Color", "Contrast",
    "Brightness", "Sharpness", "Cutout", "SolarizeAdd", "Rotate_BBox", "ShearX_BBox",
    "ShearY_BBox", "TranslateX_BBox", "TranslateY_BBox",
)  # fmt: skip

MAX_LEVEL = 10

# The released distances in pixels are made for images of COCO, whose longer side has 640.
REFERENCE = 640
IN_PIXELS = ("TranslateX", "TranslateY", "Cutout")


# --- Operations on a scene -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on a scene, a dict of `image`, `boxes` and, optionally, `mask`.

    Attributes:
        apply: function (scene, argument, seed, chance) -> scene. `chance` is the probability with
            which an operation on the content of boxes is applied to each box.
        per_box: whether it acts inside boxes, each drawn independently.
        signed: whether its argument gets a random sign.
    """

    apply: Callable[[Scene, Tensor, Tensor, Any], Scene]
    per_box: bool = False
    signed: bool = False


def _size(pixels: Tensor) -> Tensor:
    return tf.shape(pixels)[:2]


def _shift(argument: Tensor, axis: int) -> Tensor:
    """A distance in pixels as the int32 `[2]` (y, x) that `image_ops.translate` takes."""
    # Rounded half away from zero, as nearest neighbor sampling does in the released code.
    pixels = tf.cast(tf.sign(argument) * tf.floor(tf.abs(argument) + 0.5), tf.int32)
    return tf.stack([pixels, 0] if axis == 0 else [0, pixels])


def _moves(as_released: bool) -> dict[str, tuple[Callable, Callable]]:
    """How geometric operations move pixels and boxes.

    Returns:
        `{name: (function (pixels, argument, fill) -> pixels, function (boxes, size, argument) ->
        boxes)}`.
    """

    def shear(axis):
        return (
            lambda x, level, fill: image_ops.warp(x, image_ops.shearing(level, axis), fill),
            lambda boxes, size, level: image_ops.shear_boxes(boxes, size, level, axis, as_released),
        )

    def translate(axis):
        return (
            lambda x, pixels, fill: image_ops.translate(x, _shift(pixels, axis), fill),
            lambda boxes, size, pixels: image_ops.translate_boxes(
                boxes, size, _shift(pixels, axis), as_released
            ),
        )

    rotate = (
        lambda x, degrees, fill: image_ops.warp(x, image_ops.rotation(_size(x), degrees), fill),
        lambda boxes, size, degrees: image_ops.rotate_boxes(boxes, size, degrees, as_released),
    )
    return {
        "Rotate": rotate,
        "ShearX": shear(1),
        "ShearY": shear(0),
        "TranslateX": translate(1),
        "TranslateY": translate(0),
    }


def _flip(pixels: Tensor, argument: Tensor, fill: int) -> Tensor:
    """Flips sideways; takes the arguments of the other moves, and needs neither."""
    return tf.reverse(pixels, [1])


def operations(as_released: bool = False) -> dict[str, Operation]:
    """`{name: Operation}` of all operations; for `as_released` see `image_ops`."""
    colors = {
        "AutoContrast": lambda x, _: image_ops.autocontrast(x),
        "Equalize": lambda x, _: image_ops.equalize(x),
        "Invert": lambda x, _: image_ops.invert(x),
        "Posterize": image_ops.posterize,
        "Solarize": lambda x, threshold: image_ops.solarize(
            x, tf.cast(threshold, tf.int32), as_released
        ),
        "SolarizeAdd": image_ops.solarize_add,
        "Color": image_ops.color,
        "Contrast": lambda x, factor: image_ops.contrast(x, factor, as_released),
        "Brightness": image_ops.brightness,
        "Sharpness": image_ops.sharpness,
    }
    table = {name: Operation(_color(function)) for name, function in colors.items()}
    table["Cutout"] = Operation(_cutout)
    table["BBox_Cutout"] = Operation(_box_cutout)
    for name, (pixels, boxes) in _moves(as_released).items():
        table[f"{name}_BBox"] = Operation(_geometric(pixels, boxes), signed=True)
        table[f"{name}_Only_BBoxes"] = Operation(_inside_boxes(pixels), per_box=True, signed=True)
    table["Flip_Only_BBoxes"] = Operation(_inside_boxes(_flip), per_box=True)
    for name in ("Solarize", "Equalize", "Cutout"):
        table[f"{name}_Only_BBoxes"] = Operation(_repeat_in_boxes(table[name]), per_box=True)
    return table


def _color(function: Callable) -> Callable:
    """A function (image, argument) -> image as an operation that leaves boxes and mask alone."""

    def apply(scene, argument, seed, chance):
        return scene | {"image": function(scene["image"], argument)}

    return apply


def _geometric(move_pixels: Callable, move_boxes: Callable) -> Callable:
    """A move of pixels and boxes as an operation on whole scenes; see `_moves`."""

    def apply(scene, argument, seed, chance):
        moved = {
            "image": move_pixels(scene["image"], argument, image_ops.FILL),
            "boxes": move_boxes(scene["boxes"], _size(scene["image"]), argument),
        }
        if "mask" in scene:
            moved["mask"] = move_pixels(scene["mask"], argument, IGNORE_LABEL)
        return scene | moved

    return apply


def _point(seed: Tensor, size: Tensor) -> Tensor:
    """A random pixel (y, x), int32 `[2]`, of an image with `size` (height, width)."""
    numbers = tf.random.stateless_uniform([2], seed)
    # The product of a number below 1 and a large size may round up to the size.
    return tf.minimum(tf.cast(numbers * tf.cast(size, tf.float32), tf.int32), size - 1)


def _cutout(scene: Scene, argument: Tensor, seed: Tensor, chance: Any) -> Scene:
    """Paints over a square with sides of 2 `argument` pixels at a random place."""
    image = scene["image"]
    half = tf.cast(argument, tf.int32)
    return scene | {"image": image_ops.cutout(image, _point(seed, _size(image)), half)}


def _box_cutout(scene: Scene, argument: Tensor, seed: Tensor, chance: Any) -> Scene:
    """Paints over a part of one random box, whose sides are `argument` times those of the box."""
    image = scene["image"]
    boxes = tf.boolean_mask(scene["boxes"], image_ops.non_empty(scene["boxes"]))
    count = tf.shape(boxes)[0]

    def paint():
        which = tf.random.stateless_uniform([], tf.random.fold_in(seed, 1), 0, count, tf.int32)
        first, size = image_ops.box_region(boxes[which], _size(image))
        half = tf.cast(argument * tf.cast(size, tf.float32) / 2.0, tf.int32)
        return image_ops.cutout(image, first + _point(seed, size), half)

    return scene | {"image": tf.cond(count > 0, paint, lambda: image)}


def _inside_boxes(move_pixels: Callable) -> Callable:
    """An operation that moves the content of random boxes, but not the boxes themselves."""

    def change(scene, box, argument, seed):
        def moved(pixels, fill):
            return image_ops.inside_box(pixels, box, lambda x: move_pixels(x, argument, fill))

        changed = {"image": moved(scene["image"], image_ops.FILL)}
        if "mask" in scene:
            changed["mask"] = moved(scene["mask"], IGNORE_LABEL)
        return scene | changed

    return _for_drawn_boxes(change)


def _repeat_in_boxes(operation: Operation) -> Callable:
    """Applies an operation that changes only the image to the pixels of random boxes."""

    def change(scene, box, argument, seed):
        def painted(region):
            return operation.apply({"image": region}, argument, seed, 1.0)["image"]

        return scene | {"image": image_ops.inside_box(scene["image"], box, painted)}

    return _for_drawn_boxes(change)


def _for_drawn_boxes(change: Callable) -> Callable:
    """An operation that calls `change(scene, box, argument, seed)` for random boxes.

    Each box is drawn with probability `chance`. The order is random, because boxes that overlap
    change the same pixels.
    """

    def apply(scene, argument, seed, chance):
        boxes = scene["boxes"]
        numbers = tf.random.stateless_uniform([2, tf.shape(boxes)[0]], seed)
        order = tf.argsort(numbers[0])
        drawn = (numbers[1] < chance) & image_ops.non_empty(boxes)
        chosen = tf.boolean_mask(tf.gather(boxes, order), tf.gather(drawn, order))

        def body(index, scene):
            return index + 1, change(
                scene, chosen[index], argument, tf.random.fold_in(seed, index + 1)
            )

        return _loop(tf.shape(chosen)[0], body, scene)

    return apply


def _loop(count: Tensor, body: Callable, scene: Scene) -> Scene:
    """Calls `body(index, scene) -> (index + 1, scene)` `count` times; returns the last scene."""
    # The loop must allow heights, widths and numbers of boxes that a trace does not know.
    shapes = {"image": [None, None, 3], "boxes": [None, 4]}
    if "mask" in scene:
        shapes["mask"] = [None, None, *scene["mask"].shape[2:]]
    invariants = {key: tf.TensorShape(shapes[key]) for key in scene}

    def checked(index, scene):
        index, scene = body(index, scene)
        return index, {key: tf.ensure_shape(scene[key], shapes[key]) for key in scene}

    return tf.while_loop(
        lambda index, scene: index < count,
        checked,
        (0, scene),
        shape_invariants=(tf.TensorShape([]), invariants),
    )[1]


# --- Levels ----------------------------------------------------------------------------------


def level_to_argument(
    name: str, level: float, *, cutout: float = 100, translate: float = 250
) -> float:
    """The argument that a level stands for, before the random sign.

    Args:
        name: name of the operation.
        level: 0 to 10; higher levels extrapolate up to the limit of the operation.
        cutout: half side of the cutout of a whole image at level 10, in pixels.
        translate: distance of the translation of a whole image at level 10, in pixels.

    Returns:
        Degrees, pixels, a factor, a threshold, ..., depending on the operation; 0 if it takes none.
    """
    fraction = level / MAX_LEVEL
    inside = name.endswith("_Only_BBoxes")
    name = _kind(name)
    arguments = {
        "Rotate": 30 * fraction,
        "ShearX": 0.3 * fraction,
        "ShearY": 0.3 * fraction,
        "TranslateX": (120 if inside else translate) * fraction,
        "TranslateY": (120 if inside else translate) * fraction,
        "Posterize": min(int(4 * fraction), 8),
        "Solarize": min(int(256 * fraction), 256),
        "SolarizeAdd": int(110 * fraction),
        "Cutout": int((50 if inside else cutout) * fraction),
        "BBox_Cutout": 0.75 * fraction,
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.8 * fraction + 0.1),
    }
    return float(arguments.get(name, 0.0))


def _kind(name: str) -> str:
    """The name of an operation without what it acts on: "Rotate" of "Rotate_BBox"."""
    return name.removesuffix("_Only_BBoxes").removesuffix("_BBox")


def _shrinking(operation: Operation) -> Operation:
    """The operation with its argument, a distance in pixels, reduced on small images."""

    def apply(scene, argument, seed, chance):
        longer = tf.cast(tf.reduce_max(_size(scene["image"])), tf.float32)
        scale = tf.minimum(longer / REFERENCE, 1.0)
        return operation.apply(scene, argument * scale, seed, chance)

    return dataclasses.replace(operation, apply=apply)


# --- Policies --------------------------------------------------------------------------------


class Policy:
    """Draws rows of steps for each image and applies them.

    Args:
        rows: lists of steps (operation name, probability, level).
        draws: number of rows per image, drawn uniformly with replacement.
        cutout: half side of a cutout at level 10, in pixels of an image whose longer side has 640
            or more. On smaller images distances shrink in proportion.
        translate: distance of a translation at level 10, likewise.
        as_released: see `image_ops`; distances do not depend on the size of the image.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[tuple[str, float, float]]],
        draws: int = 1,
        *,
        cutout: float = 100,
        translate: float = 250,
        as_released: bool = False,
    ) -> None:
        known = operations(as_released)
        names = sorted({name for row in rows for name, _, _ in row})
        self.operations = [
            _shrinking(known[name]) if _kind(name) in IN_PIXELS and not as_released else known[name]
            for name in names
        ]
        self.draws = draws
        # Tables instead of Python branches: a graph draws a row by its number.
        shape = (len(rows), max(len(row) for row in rows))
        self._index = np.zeros(shape, "int32")  # 0 does nothing, 1 is the first operation
        self._probability = np.zeros(shape, "float32")
        self._argument = np.zeros(shape, "float32")
        for i, row in enumerate(rows):
            for j, (name, probability, level) in enumerate(row):
                self._index[i, j] = 1 + names.index(name)
                self._probability[i, j] = probability
                self._argument[i, j] = level_to_argument(
                    name, level, cutout=cutout, translate=translate
                )
        self._per_box = np.array([False, *(o.per_box for o in self.operations)])
        self._signed = np.array([False, *(o.signed for o in self.operations)])

    def __call__(self, scene: Scene, seed: Tensor) -> Scene:
        """Applies the drawn operations to a scene.

        Args:
            scene: dict of `image` uint8 `[H, W, 3]`, `boxes` `[N, 4]` as fractions and, optionally,
                `mask` uint8 `[H, W]` or `[H, W, C]`, whose channels move together.
            seed: int64 `[2]`; equal seeds give equal results.

        Returns:
            A scene of the same size and types.
        """
        rows = tf.random.stateless_uniform(
            [self.draws], tf.random.fold_in(seed, 0), 0, len(self._index), tf.int32
        )
        index, probability, argument = (
            tf.reshape(tf.gather(table, rows), [-1])
            for table in (self._index, self._probability, self._argument)
        )

        def body(step, scene):
            numbers = tf.random.stateless_uniform([2], tf.random.fold_in(seed, 2 * step + 1))
            # The probability of an operation inside boxes is spent on each box instead.
            happens = (numbers[0] < probability[step]) | tf.gather(self._per_box, index[step])
            minus = (numbers[1] < 0.5) & tf.gather(self._signed, index[step])
            value = tf.where(minus, -argument[step], argument[step])
            # The released code takes a third of the probability for each box.
            arguments = (
                scene,
                value,
                tf.random.fold_in(seed, 2 * step + 2),
                probability[step] / 3.0,
            )
            branches = [lambda: scene] + [
                functools.partial(operation.apply, *arguments) for operation in self.operations
            ]
            return step + 1, tf.switch_case(tf.where(happens, index[step], 0), branches)

        return _loop(tf.size(index), body, scene)


def auto_augment(version: str = "v0", as_released: bool = False) -> Policy:
    """AutoAugment for detection.

    Args:
        version: "v0" (the paper's S2 and S3), "v1", "v2", "v3" or "test".
        as_released: see `image_ops`.
    """
    rows = []
    for line in AUTO_AUGMENT[version].strip().splitlines():
        steps = [step.split() for step in line.split(",")]
        rows.append([(name, float(chance), float(level)) for name, chance, level in steps])
    return Policy(rows, as_released=as_released)


def rand_augment(magnitude: float = 10.0, num_ops: int = 2, as_released: bool = False) -> Policy:
    """RandAugment (the paper's S4): draws from 16 operations and "nothing", at one magnitude.

    The paper does not state the number of operations. Two is the default of the code that the same
    group published; RandAugment's own experiment on detection used one.

    Args:
        magnitude: 0 to 10 or more; the paper uses 10, and 15 for ResNet-101.
        num_ops: number of draws per image.
        as_released: see `image_ops`.
    """
    rows = [[(name, 1.0, magnitude)] for name in RAND_AUGMENT] + [[]]
    return Policy(rows, num_ops, cutout=40, translate=100, as_released=as_released)


def apply(
    name: str,
    image: np.ndarray,
    boxes: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    *,
    level: float = 10,
    argument: float | None = None,
    seed: int = 0,
    chance: float = 1.0,
    as_released: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Applies one operation to NumPy arrays, eagerly.

    Args:
        name: such as "Equalize", "Rotate_BBox" or "TranslateY_Only_BBoxes".
        image: uint8 `[H, W, 3]`.
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image, or None.
        mask: uint8 class ids `[H, W]`, 255 where ignored, or None.
        level: 0 to 10; see `level_to_argument`.
        argument: used instead of the level: degrees, pixels, a factor, a threshold, ...
        seed: seed of what the operation draws, such as where to cut out.
        chance: probability with which an operation on the content of boxes is applied to each box.
        as_released: see `image_ops`.

    Returns:
        (image, boxes, mask) as NumPy arrays; the mask is None if none was given.

    Raises:
        UserError: for an unknown operation, or an image or mask of another shape or type.
    """
    known = operations(as_released)
    if name not in known:
        raise UserError(f"no operation is called {name!r}; known: {', '.join(sorted(known))}")
    scene = make_scene(image, boxes, mask)
    if argument is None:
        argument = level_to_argument(name, level)
    result = known[name].apply(
        scene, tf.constant(argument, tf.float32), tf.constant([0, seed], tf.int64), chance
    )
    mask = result["mask"].numpy() if "mask" in result else None
    return result["image"].numpy(), result["boxes"].numpy(), mask


def make_scene(
    image: np.ndarray, boxes: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Scene:
    """The scene that policies take, as tensors of arrays; see `apply` for shapes and errors."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise UserError(
            f"an image is [height, width, 3] of type uint8; given {list(image.shape)} of type "
            f"{image.dtype}"
        )
    boxes = np.zeros((0, 4)) if boxes is None else boxes
    scene = {
        "image": tf.constant(image),
        "boxes": tf.constant(np.asarray(boxes, "float32").reshape(-1, 4)),
    }
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != image.shape[:2] or mask.dtype != np.uint8:
            raise UserError(
                f"the mask of this image is {list(image.shape[:2])} of type uint8; given "
                f"{list(mask.shape)} of type {mask.dtype}"
            )
        scene["mask"] = tf.constant(mask)
    return scene

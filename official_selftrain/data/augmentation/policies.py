"""Random sequences of image operations: AutoAugment for detection, and RandAugment.

A policy is a list of rows; a row is a list of steps (operation, probability, level 0..10). For
every image it draws rows and applies their steps in order. Image, boxes and mask see the same draw,
which is a function of the seed alone. Names and tables are those of the released code (reference
section 17); RandAugment is the one the same group published for boxes (paper.md section 1).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from official_selftrain.data.augmentation import image_ops
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.utils.errors import UserError

# Sub-policies as "operation probability level" steps; one is drawn for each image.
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

# Longer side of the images that the released distances in pixels are made for, COCO's.
REFERENCE = 640
IN_PIXELS = ("TranslateX", "TranslateY", "Cutout")


# --- Operations on a scene -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on a scene: a dict of `image`, `boxes` and, where there is one, `mask`.

    Attributes:
        apply: function (scene, argument, seed, chance) -> scene. `chance` is the probability with
            which an operation on the content of boxes takes each box.
        per_box: it acts inside boxes, each drawn by itself.
        signed: its argument has a random sign.
    """

    apply: Callable
    per_box: bool = False
    signed: bool = False


def _size(pixels):
    return tf.shape(pixels)[:2]


def _shift(argument, axis):
    # Nearest sampling rounds half a pixel away from zero; so does this, to whole pixels.
    pixels = tf.cast(tf.sign(argument) * tf.floor(tf.abs(argument) + 0.5), tf.int32)
    return tf.stack([pixels, 0] if axis == 0 else [0, pixels])


def _moves(as_released):
    """`{name: (function of pixels, argument, fill; function of boxes, size, argument)}`."""

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


def operations(as_released=False):
    """`{name: Operation}` of all operations."""
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
        table[f"{name}_Only_BBoxes"] = Operation(_inside_boxes(pixels), True, signed=True)
    flip = lambda x, argument, fill: tf.reverse(x, [1])  # noqa: E731
    table["Flip_Only_BBoxes"] = Operation(_inside_boxes(flip), per_box=True)
    for name in ("Solarize", "Equalize", "Cutout"):
        table[f"{name}_Only_BBoxes"] = Operation(_repeat_in_boxes(table[name]), per_box=True)
    return table


def _color(function):
    def apply(scene, argument, seed, chance):
        return scene | {"image": function(scene["image"], argument)}

    return apply


def _geometric(move_pixels, move_boxes):
    def apply(scene, argument, seed, chance):
        moved = {
            "image": move_pixels(scene["image"], argument, image_ops.FILL),
            "boxes": move_boxes(scene["boxes"], _size(scene["image"]), argument),
        }
        if "mask" in scene:
            moved["mask"] = move_pixels(scene["mask"], argument, IGNORE_LABEL)
        return scene | moved

    return apply


def _point(seed, size):
    """A random pixel `[2]` of an image of `size`."""
    numbers = tf.random.stateless_uniform([2], seed)
    return tf.minimum(tf.cast(numbers * tf.cast(size, tf.float32), tf.int32), size - 1)


def _cutout(scene, argument, seed, chance):
    image = scene["image"]
    half = tf.cast(argument, tf.int32)
    return scene | {"image": image_ops.cutout(image, _point(seed, _size(image)), half)}


def _box_cutout(scene, argument, seed, chance):
    """Paints over a share `argument` of the sides of one box, drawn among those with area."""
    image = scene["image"]
    boxes = tf.boolean_mask(scene["boxes"], image_ops.non_empty(scene["boxes"]))
    count = tf.shape(boxes)[0]

    def paint():
        which = tf.random.stateless_uniform([], fold(seed, 1), 0, count, tf.int32)
        first, size = image_ops.box_region(boxes[which], _size(image))
        half = tf.cast(argument * tf.cast(size, tf.float32) / 2.0, tf.int32)
        return image_ops.cutout(image, first + _point(seed, size), half)

    return scene | {"image": tf.cond(count > 0, paint, lambda: image)}


def _inside_boxes(move_pixels):
    """The content of drawn boxes moves, the boxes themselves stay."""

    def change(scene, box, argument, seed):
        def moved(pixels, fill):
            return image_ops.inside_box(pixels, box, lambda x: move_pixels(x, argument, fill))

        changed = {"image": moved(scene["image"], image_ops.FILL)}
        if "mask" in scene:
            changed["mask"] = moved(scene["mask"], IGNORE_LABEL)
        return scene | changed

    return _for_drawn_boxes(change)


def _repeat_in_boxes(operation):
    """An operation that changes nothing but the image, on the pixels of drawn boxes."""

    def change(scene, box, argument, seed):
        def painted(region):
            return operation.apply({"image": region}, argument, seed, 1.0)["image"]

        return scene | {"image": image_ops.inside_box(scene["image"], box, painted)}

    return _for_drawn_boxes(change)


def _for_drawn_boxes(change):
    """`change(scene, box, argument, seed)` for every box drawn, in random order."""

    def apply(scene, argument, seed, chance):
        boxes = scene["boxes"]
        numbers = tf.random.stateless_uniform([2, tf.shape(boxes)[0]], seed)
        order = tf.argsort(numbers[0])
        drawn = (numbers[1] < chance) & image_ops.non_empty(boxes)
        chosen = tf.boolean_mask(tf.gather(boxes, order), tf.gather(drawn, order))

        def body(index, scene):
            return index + 1, change(scene, chosen[index], argument, fold(seed, index + 1))

        return _loop(tf.shape(chosen)[0], body, scene)

    return apply


def _loop(count, body, scene):
    """`body(index, scene) -> (index + 1, scene)`, `count` times."""
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


fold = tf.random.experimental.stateless_fold_in


# --- Levels ----------------------------------------------------------------------------------


def level_to_argument(name, level, cutout=100, translate=250):
    """What a level means to an operation, before the random sign.

    Args:
        name: of the operation.
        level: 0..10, more extrapolates up to the limit of the operation.
        cutout, translate: pixels at level 10, of whole images.
    """
    share = level / MAX_LEVEL
    inside = name.endswith("_Only_BBoxes")
    name = _kind(name)
    arguments = {
        "Rotate": 30 * share,
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": (120 if inside else translate) * share,
        "TranslateY": (120 if inside else translate) * share,
        "Posterize": min(int(4 * share), 8),
        "Solarize": min(int(256 * share), 256),
        "SolarizeAdd": int(110 * share),
        "Cutout": int((50 if inside else cutout) * share),
        "BBox_Cutout": 0.75 * share,
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.8 * share + 0.1),
    }
    return float(arguments.get(name, 0.0))


def _kind(name):
    return name.removesuffix("_Only_BBoxes").removesuffix("_BBox")


def _shrinking(operation):
    """The same on small images: its argument, a distance in pixels, shrinks with them."""

    def apply(scene, argument, seed, chance):
        longer = tf.cast(tf.reduce_max(_size(scene["image"])), tf.float32)
        share = tf.minimum(longer / REFERENCE, 1.0)
        return operation.apply(scene, argument * share, seed, chance)

    return dataclasses.replace(operation, apply=apply)


# --- Policies --------------------------------------------------------------------------------


class Policy:
    """Draws rows of steps for each image and applies them.

    Args:
        rows: lists of steps (operation name, probability, level).
        draws: rows per image, drawn uniformly, with replacement.
        cutout, translate: pixels at level 10, of images whose longer side has 640 or more. On
            smaller ones distances shrink with the image.
        as_released: see `image_ops`; distances are pixels whatever the size.

    Calling it with a scene and a seed int64 `[2]` returns the changed scene. A scene is a dict of
    `image` `[H, W, 3]` uint8, `boxes` `[N, 4]` as fractions and, optionally, `mask` `[H, W]` uint8,
    or `[H, W, C]`, whose channels move together.
    """

    def __init__(self, rows, draws=1, cutout=100, translate=250, as_released=False):
        known = operations(as_released)
        names = sorted({name for row in rows for name, _, _ in row})
        self.operations = [
            _shrinking(known[name]) if _kind(name) in IN_PIXELS and not as_released else known[name]
            for name in names
        ]
        self.draws = draws
        shape = (len(rows), max(len(row) for row in rows))
        self._index = np.zeros(shape, "int32")  # 0 does nothing, 1 is the first operation
        self._probability = np.zeros(shape, "float32")
        self._argument = np.zeros(shape, "float32")
        for i, row in enumerate(rows):
            for j, (name, probability, level) in enumerate(row):
                self._index[i, j] = 1 + names.index(name)
                self._probability[i, j] = probability
                self._argument[i, j] = level_to_argument(name, level, cutout, translate)
        self._per_box = np.array([False, *(o.per_box for o in self.operations)])
        self._signed = np.array([False, *(o.signed for o in self.operations)])

    def __call__(self, scene, seed):
        rows = tf.random.stateless_uniform(
            [self.draws], fold(seed, 0), 0, len(self._index), tf.int32
        )
        index, probability, argument = (
            tf.reshape(tf.gather(table, rows), [-1])
            for table in (self._index, self._probability, self._argument)
        )

        def body(step, scene):
            numbers = tf.random.stateless_uniform([2], fold(seed, 2 * step + 1))
            happens = (numbers[0] < probability[step]) | tf.gather(self._per_box, index[step])
            minus = (numbers[1] < 0.5) & tf.gather(self._signed, index[step])
            value = tf.where(minus, -argument[step], argument[step])
            # The released code takes a third of the probability for each box.
            arguments = (scene, value, fold(seed, 2 * step + 2), probability[step] / 3.0)
            branches = [lambda: scene] + [
                functools.partial(operation.apply, *arguments) for operation in self.operations
            ]
            return step + 1, tf.switch_case(tf.where(happens, index[step], 0), branches)

        return _loop(tf.size(index), body, scene)


def auto_augment(version="v0", as_released=False):
    """AutoAugment for detection: v0 (the paper's S2 and S3), v1, v2, v3 or test."""
    rows = []
    for line in AUTO_AUGMENT[version].strip().splitlines():
        steps = [step.split() for step in line.split(",")]
        rows.append([(name, float(chance), float(level)) for name, chance, level in steps])
    return Policy(rows, as_released=as_released)


def rand_augment(magnitude=10.0, num_ops=2, as_released=False):
    """RandAugment (the paper's S4): `num_ops` of 16 operations or nothing, all at one magnitude.

    The paper does not state the number of operations; two is the default of the code that the same
    group published, one was used in RandAugment's own experiment on detection.

    Args:
        magnitude: 0..10 and more; the paper takes 10, and 15 for ResNet-101.
        num_ops: draws for an image.
        as_released: see `image_ops`.
    """
    rows = [[(name, 1.0, magnitude)] for name in RAND_AUGMENT] + [[]]
    return Policy(rows, num_ops, cutout=40, translate=100, as_released=as_released)


def apply(
    name, image, boxes=None, mask=None, level=10, argument=None, seed=0, chance=1.0,
    as_released=False,
):  # fmt: skip
    """One operation, now, on NumPy arrays.

    Args:
        name: such as "Equalize", "Rotate_BBox" or "TranslateY_Only_BBoxes".
        image: `[H, W, 3]` uint8.
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image, or None.
        mask: `[H, W]` uint8 class ids, 255 is ignored; or None.
        level: 0..10, as `level_to_argument` translates it.
        argument: in place of the level: degrees, pixels, factor, threshold, ...
        seed: of what the operation draws (where to cut out, which boxes).
        chance: probability with which an operation on the content of boxes takes each box.
        as_released: see `image_ops`.

    Returns:
        (image, boxes, mask) as NumPy arrays; the mask is None where none was given.

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


def make_scene(image, boxes=None, mask=None):
    """The dict that policies take, from arrays; see `apply` for shapes and errors."""
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

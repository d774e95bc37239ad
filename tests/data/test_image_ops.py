"""Every deterministic operation against the numbers of the released implementation."""

import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import load

from official_selftrain.data.augmentation import image_ops, policies

COLORS = (
    "AutoContrast", "Equalize", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness",
)  # fmt: skip
MOVES = ("Rotate_BBox", "ShearX_BBox", "ShearY_BBox", "TranslateX_BBox", "TranslateY_BBox")


@pytest.fixture(scope="module")
def cases(golden):
    return load(golden / "augment/operations.npz")


@pytest.fixture(scope="module")
def levels(golden):
    table = json.loads((golden / "augment/level_to_argument.json").read_text())["table"]
    return {name: [row[0] if row else 0.0 for row in rows] for name, rows in table.items()}


def run(inside_tf_data, name, *arguments, **settings):
    """One operation, eagerly or in a `tf.data` pipeline."""
    if not inside_tf_data:
        return policies.apply(name, *arguments, as_released=True, **settings)
    image, boxes = arguments
    apply = policies.operations(as_released=True)[name].apply
    data = tf.data.Dataset.from_tensors({"image": image, "boxes": boxes}).map(
        lambda scene: apply(
            scene, tf.constant(settings["argument"], tf.float32), tf.zeros([2], tf.int64), 1.0
        )
    )
    scene = next(iter(data))
    return scene["image"].numpy(), scene["boxes"].numpy(), None


@pytest.mark.parametrize("inside_tf_data", [False, True])
@pytest.mark.parametrize("name", COLORS)
def test_colors_equal_the_release(name, inside_tf_data, cases, levels):
    magnitudes = [int(k.split("__")[1]) for k in cases if k.startswith(f"{name}__")]
    assert magnitudes
    for magnitude in magnitudes:
        found, boxes, _ = run(
            inside_tf_data, name, cases["image"], cases["bboxes"],
            argument=levels[name][magnitude],
        )  # fmt: skip
        # The tolerance would be one gray level in 0.1 % of the values.
        np.testing.assert_array_equal(found, cases[f"{name}__{magnitude}__image"])
        np.testing.assert_array_equal(boxes, cases["bboxes"])


@pytest.mark.parametrize("inside_tf_data", [False, True])
@pytest.mark.parametrize("sign", ["pos", "neg"])
@pytest.mark.parametrize("name", MOVES)
def test_moves_equal_the_release(name, sign, inside_tf_data, cases, levels):
    for magnitude in (0, 2, 4, 8, 10):
        # The golden picture is small: a fifth of the pixels.
        argument = levels[name][magnitude] * (0.2 if "Translate" in name else 1.0)
        found, boxes, _ = run(
            inside_tf_data, name, cases["image"], cases["bboxes"],
            argument=argument if sign == "pos" else -argument,
        )  # fmt: skip
        prefix = f"{name}__{magnitude}__{sign}"
        assert np.mean((found != cases[f"{prefix}__image"]).any(axis=-1)) <= 0.005
        np.testing.assert_allclose(boxes, cases[f"{prefix}__bboxes"], atol=1e-6)


@pytest.mark.parametrize(
    ("center", "half"), [((10, 20), 8), ((0, 0), 5), ((47, 61), 12), ((24, 30), 40)]
)
def test_cutout_equals_the_release(center, half, cases):
    expected = cases[f"Cutout__c{center[0]}_{center[1]}_pad{half}__image"]
    np.testing.assert_array_equal(image_ops.cutout(cases["image"], center, half), expected)


@pytest.mark.parametrize(("box", "center", "share"), [(0, (15, 25), 0.3), (1, (40, 50), 0.75)])
def test_cutout_of_a_share_of_a_box_equals_the_release(box, center, share, cases):
    _, size = image_ops.box_region(cases["bboxes"][box], cases["image"].shape[:2])
    half = tf.cast(share * tf.cast(size, tf.float32) / 2.0, tf.int32)
    expected = cases[f"BBox_Cutout__box{box}_c{center[0]}_{center[1]}_frac{share}__image"]
    np.testing.assert_array_equal(image_ops.cutout(cases["image"], center, half), expected)


@pytest.mark.parametrize("box", [0, 1])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Flip", 0), ("Solarize", 100), ("Equalize", 0), ("Rotate", 20), ("ShearX", 0.2),
        ("ShearY", -0.2), ("TranslateX", 6), ("TranslateY", -5),
    ],
)  # fmt: skip
def test_operations_inside_a_box_equal_the_release(name, argument, box, cases):
    boxes = cases["bboxes"][box : box + 1]
    found, same, _ = policies.apply(
        f"{name}_Only_BBoxes", cases["image"], boxes, argument=argument, as_released=True
    )
    expected = cases[f"Only_{name}__box{box}__image"]
    assert np.mean((found != expected).any(axis=-1)) <= 0.005
    np.testing.assert_array_equal(same, boxes)


# --- Where ours differs unless asked to do as released ---------------------------------------


def test_contrast_blends_with_the_mean_gray():
    image = np.full((300, 300, 3), 100, "uint8")
    image[:150] = 50  # the mean is 75
    found = policies.apply("Contrast", image, argument=0.0)[0]
    np.testing.assert_array_equal(found, 75)
    # As released: 90,000 pixels / 256 = 351, clipped to white.
    released = policies.apply("Contrast", image, argument=0.0, as_released=True)[0]
    np.testing.assert_array_equal(released, 255)


def test_solarize_at_the_limit():
    image = np.arange(48, dtype="uint8").reshape(4, 4, 3)
    np.testing.assert_array_equal(policies.apply("Solarize", image, level=10)[0], image)
    released = policies.apply("Solarize", image, level=10, as_released=True)[0]
    np.testing.assert_array_equal(released, 255 - image)


def test_a_box_that_leaves_is_dropped_and_does_not_come_back():
    boxes = np.array([[0.2, 0.0, 0.8, 0.1], [0.2, 0.4, 0.8, 0.6]], "float32")
    size = (100, 100)
    moved = image_ops.translate_boxes(boxes, size, [0, 20])
    np.testing.assert_allclose(moved, [[0, 0, 0, 0], [0.2, 0.2, 0.8, 0.4]], atol=1e-6)
    back = image_ops.rotate_boxes(image_ops.translate_boxes(moved, size, [0, -20]), size, 30.0)
    np.testing.assert_array_equal(back[0], 0)
    released = image_ops.translate_boxes(boxes, size, [0, 20], as_released=True)
    np.testing.assert_allclose(released[0], [0.2, 0.0, 0.8, 0.05], atol=1e-6)


def test_quarter_turn_by_hand():
    """A pixel at row 0, column 3 of 5 x 5 goes to row 1, column 0: turned against the clock."""
    image = np.zeros((5, 5, 3), "uint8")
    image[0, 3] = 9
    found, boxes, _ = policies.apply("Rotate_BBox", image, [[0, 0.6, 0.2, 0.8]], argument=90.0)
    assert np.argwhere(found[..., 0] == 9).tolist() == [[1, 0]]
    np.testing.assert_allclose(boxes, [[0.2, 0.0, 0.4, 0.2]], atol=1e-6)

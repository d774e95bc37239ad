"""Image, boxes and mask see one draw; draws are reproducible; strange images are handled."""

import collections
import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from official_selftrain.config import InputConfig
from official_selftrain.data.augmentation import geometry, policies
from official_selftrain.data.augmentation.image_ops import FILL
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.utils.errors import UserError

MOVING = sorted(
    name
    for name in policies.operations()
    if name.startswith(("Rotate", "Shear", "Translate", "Flip"))
)
WHOLE = [name for name in MOVING if name.endswith("_BBox")]


def picture(height, width, seed, count=3):
    """A mask of random ids, an image that shows them, and random boxes."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 10, (height, width)).astype("uint8")
    image = np.repeat(mask[..., None] * 10, 3, axis=-1)
    corners = rng.random((count, 2, 2)).astype("float32")
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=-1)
    return image, boxes, mask


# --- Tables ----------------------------------------------------------------------------------


def test_tables_equal_the_release(golden):
    expected = json.loads((golden / "augment/policies.json").read_text())
    for name, rows in expected.items():
        lines = policies.AUTO_AUGMENT[name].strip().splitlines()
        ours = [[step.split() for step in line.split(",")] for line in lines]
        assert [[[n, float(p), float(m)] for n, p, m in row] for row in ours] == rows
    assert expected.keys() == policies.AUTO_AUGMENT.keys()
    table = json.loads((golden / "augment/level_to_argument.json").read_text())["table"]
    for name, rows in table.items():
        for level, row in enumerate(rows):
            found = policies.level_to_argument(name, level)
            assert found == pytest.approx(row[0] if row else 0.0)


def test_levels_above_ten_extrapolate_up_to_the_limit_of_the_operation():
    # The paper takes magnitude 15 for ResNet-101.
    expected = {
        "Rotate_BBox": 45.0, "ShearX_BBox": 0.45, "TranslateX_BBox": 150.0, "Cutout": 60.0,
        "Color": 2.8, "SolarizeAdd": 165.0, "Posterize": 6.0, "Solarize": 256.0,
    }  # fmt: skip
    for name, argument in expected.items():
        found = policies.level_to_argument(name, 15, cutout=40, translate=100)
        assert found == pytest.approx(argument)
    assert policies.level_to_argument("Posterize", 40) == 8
    assert len(policies.RAND_AUGMENT) == 16


# --- Properties ------------------------------------------------------------------------------

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sampled_from(MOVING), st.floats(-15, 15), seeds)
def test_mask_and_image_agree(height, width, name, level, seed):
    image, boxes, mask = picture(height, width, seed)
    argument = policies.level_to_argument(name, level, translate=20)
    image, _, mask = policies.apply(name, image, boxes, mask, argument=argument, seed=seed)
    expected = np.where(mask == IGNORE_LABEL, FILL, mask * 10)
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=-1))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sampled_from(WHOLE), st.floats(-15, 15), seeds)
def test_a_marked_pixel_inside_a_box_stays_inside_the_moved_box(height, width, name, level, seed):
    rng = np.random.default_rng(seed)
    top, left = rng.integers(height), rng.integers(width)
    bottom, right = rng.integers(top, height) + 1, rng.integers(left, width) + 1
    image, mask = np.zeros((height, width, 3), "uint8"), np.zeros((height, width), "uint8")
    image[top:bottom, left:right], mask[top:bottom, left:right] = 255, 1
    box = [[top / height, left / width, bottom / height, right / width]]
    argument = policies.level_to_argument(name, level, translate=20)
    image, (moved,), mask = policies.apply(name, image, box, mask, argument=argument)
    ymin, xmin, ymax, xmax = moved * (height, width, height, width)
    for rows, columns in (np.nonzero(mask == 1), np.nonzero(image[..., 0] == 255)):
        # Nearest sampling takes a pixel up to half a diagonal away.
        y, x = rows + 0.5, columns + 0.5
        assert (ymin - 0.75 <= y).all() and (y <= ymax + 0.75).all()
        assert (xmin - 0.75 <= x).all() and (x <= xmax + 0.75).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(-8, 8), st.integers(-8, 8), seeds)
def test_translated_boxes_are_exact(height, width, dy, dx, seed):
    image, boxes, _ = picture(height, width, seed)
    _, moved, _ = policies.apply("TranslateY_BBox", image, boxes, argument=float(dy))
    _, moved, _ = policies.apply("TranslateX_BBox", image, moved, argument=float(dx))
    shift = np.array([dy / height, dx / width] * 2)
    expected = np.clip(boxes - shift, 0, 1)
    present = (moved[:, 2:] > moved[:, :2]).all(axis=1)
    np.testing.assert_allclose(moved[present], expected[present], atol=1e-5)
    gone = ((expected[:, 2:] - expected[:, :2]) <= 0).any(axis=1)
    np.testing.assert_array_equal(present, ~gone)


@settings(max_examples=40, deadline=None)
@given(
    sizes, sizes, st.sampled_from(["S1", "S2", "S3", "S4"]), st.sampled_from([0, 1, 4]),
    st.floats(0, 30), st.booleans(), seeds,
)  # fmt: skip
def test_no_box_leaves_or_inverts(height, width, policy, count, magnitude, as_released, seed):
    image, boxes, mask = picture(height, width, seed, count)
    source = InputConfig(policy=policy, magnitude=magnitude, as_released=as_released)
    scene = policies.make_scene(image, boxes, mask)
    result = geometry.Augmentation(source, (32, 32))(scene, tf.constant([seed, 1], tf.int64))
    found = result["boxes"].numpy()
    assert found.shape == (count, 4)
    assert (found >= 0).all() and (found <= 31).all() and (found[:, 2:] >= found[:, :2]).all()
    assert result["image"].shape == (32, 32, 3) and np.isfinite(result["image"]).all()
    assert set(np.unique(result["mask"])) <= {*range(10), IGNORE_LABEL}


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4000, 30)])
@pytest.mark.parametrize("boxes", [[], [[0, 0, 1, 1]], [[0.5, 0.5, 0.5001, 0.5001]]])
def test_strange_images_and_boxes(size, boxes):
    image, _, mask = picture(*size, 0)
    boxes = np.array(boxes, "float32").reshape(-1, 4)
    for name in policies.operations():
        found = policies.apply(name, image, boxes, mask, seed=3)
        assert [part.shape for part in found] == [image.shape, boxes.shape, mask.shape]
        if not len(boxes) and ("Only" in name or name == "BBox_Cutout"):
            np.testing.assert_array_equal(found[0], image)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((4, 4), "uint8"), None, r"\[height, width, 3\] of type uint8; given \[4, 4\]"),
        (np.zeros((4, 4, 4), "uint8"), None, r"given \[4, 4, 4\]"),
        (np.zeros((4, 4, 3), "uint16"), None, "of type uint16"),
        (np.zeros((0, 4, 3), "uint8"), None, r"given \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), "uint8"), np.zeros((4, 5), "uint8"), r"the mask .*given \[4, 5\]"),
    ],
)
def test_other_arrays_are_refused(image, mask, message):
    with pytest.raises(UserError, match=message):
        policies.apply("Equalize", image, mask=mask)


def test_unknown_operations_are_refused():
    with pytest.raises(UserError, match="no operation is called 'Rotate'; known: AutoContrast"):
        policies.apply("Rotate", np.zeros((4, 4, 3), "uint8"))


# --- Draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["S2", "S4"])
def test_pipeline_equals_eager_and_equal_seeds_give_equal_images(name):
    image, boxes, mask = picture(40, 56, 0)
    augmentation = geometry.Augmentation(InputConfig(policy=name), (32, 32))
    scene = policies.make_scene(image, boxes, mask)
    seeds = [tf.constant([7, i], tf.int64) for i in (0, 1, 2, 3, 4, 5, 0)]
    mapped = tf.data.Dataset.from_tensor_slices(seeds).map(lambda seed: augmentation(scene, seed))
    found = [tf.nest.map_structure(np.asarray, result) for result in mapped]
    for seed, result in zip(seeds, found, strict=True):
        eager = augmentation(scene, seed)
        np.testing.assert_allclose(result["image"], eager["image"], atol=1e-5)
        np.testing.assert_allclose(result["boxes"], eager["boxes"], atol=1e-4)
        np.testing.assert_array_equal(result["mask"], eager["mask"])
    np.testing.assert_array_equal(found[0]["image"], found[-1]["image"])
    assert len({result["image"].tobytes() for result in found}) == 6


def test_randaugment_draws_seventeen_rows_evenly_with_replacement_and_both_signs():
    """Marks in place of the operations: which were drawn, and with which argument."""
    policy = policies.rand_augment(num_ops=2)
    seen = collections.Counter()

    def mark(number):
        def apply(scene, argument, seed, chance):
            entry = tf.stack([tf.cast(number, tf.float32), argument, 0.0, 0.0])[None]
            return scene | {"boxes": tf.concat([scene["boxes"], entry], axis=0)}

        return apply

    names = sorted(policies.RAND_AUGMENT)
    policy.operations = [
        policies.Operation(mark(number), o.per_box, o.signed)
        for number, o in enumerate(policy.operations)
    ]
    scene = policies.make_scene(np.zeros((2, 2, 3), "uint8"))
    data = tf.data.Dataset.range(4000).map(
        lambda i: policy(scene, tf.stack([tf.constant(5, tf.int64), i]))["boxes"]
    )
    minus, twice = 0, 0
    for drawn in data.as_numpy_iterator():
        seen.update(drawn[:, 0].astype(int).tolist())
        seen["nothing"] += 2 - len(drawn)
        minus += (drawn[:, 1] < 0).sum()
        twice += len(drawn) == 2 and drawn[0, 0] == drawn[1, 0]
        for number, argument, *_ in drawn:
            name = names[int(number)]
            expected = policies.level_to_argument(name, 10, cutout=40, translate=100)
            assert abs(argument) == pytest.approx(expected)
            assert argument >= 0 or name in WHOLE
    # 8,000 draws of 17: 471 each, standard deviation 21.
    assert len(seen) == 17 and all(abs(n - 8000 / 17) < 5 * 21 for n in seen.values())
    # 5 of 17 operations have a sign: 2,353 draws, half of them negative.
    assert abs(minus - 8000 * 5 / 34) < 5 * 32
    assert 4000 * 16 / 17**2 * 0.6 < twice < 4000 * 16 / 17**2 * 1.4


def test_autoaugment_applies_its_steps_in_order_with_their_probabilities():
    """The policy `test` is translate by 100, then equalize, always."""
    image, boxes, _ = picture(60, 240, 1)
    policy = policies.auto_augment("test", as_released=True)  # pixels, however small the image
    found = policy(policies.make_scene(image, boxes), tf.constant([0, 4], tf.int64))
    options = []
    for argument in (100.0, -100.0):
        moved, moved_boxes, _ = policies.apply(
            "TranslateX_BBox", image, boxes, argument=argument, as_released=True
        )
        options.append((policies.apply("Equalize", moved)[0], moved_boxes))
    matching = [o for o in options if (o[0] == found["image"].numpy()).all()]
    assert len(matching) == 1
    np.testing.assert_array_equal(found["boxes"], matching[0][1])


@pytest.mark.parametrize(
    ("height", "width", "as_released", "shift", "half"),
    [
        (96, 96, False, 38, 15),  # 250 * 96 / 640 = 37.5
        (64, 320, False, 125, 50),  # the longer side decides
        (480, 640, False, 250, 100),
        (700, 900, False, 250, 100),  # never more than the release
        (96, 96, True, 250, 100),
    ],
)
def test_distances_shrink_with_small_images(height, width, as_released, shift, half):
    scene = policies.make_scene(np.full((height, width, 3), 7, "uint8"))
    for seed in range(2):
        move = policies.Policy([[("TranslateX_BBox", 1.0, 10)]], as_released=as_released)
        moved = move(scene, tf.constant([0, seed], tf.int64))["image"].numpy()
        assert (moved[..., 0] == FILL).all(axis=0).sum() == min(shift, width)
        paint = policies.Policy([[("Cutout", 1.0, 10)]], as_released=as_released)
        painted = paint(scene, tf.constant([0, seed], tf.int64))["image"].numpy()[..., 0] == FILL
        columns = painted.any(axis=0).sum()
        assert min(half, width) <= columns <= min(2 * half, width)


@pytest.mark.parametrize("policy", ["S2", "S4"])
def test_a_small_image_keeps_most_of_its_pixels(policy):
    """A share of 1 - 100 * 96 / 640 / 96 = 84 % of an image stays in each translation of S4."""
    source = InputConfig(policy=policy)
    change = geometry.make_policy(source)
    mask = np.ones((96, 96), "uint8")
    scene = policies.make_scene(np.full((96, 96, 3), 7, "uint8"), mask=mask)
    kept = [
        (change(scene, tf.constant([1, seed], tf.int64))["mask"].numpy() == 1).mean()
        for seed in range(20)
    ]
    assert min(kept) > 0.5 and np.mean(kept) > 0.8


def test_operations_on_boxes_take_a_third_of_the_probability_for_each_box():
    rows = [[("Flip_Only_BBoxes", 0.6, 0)]]
    policy = policies.Policy(rows)
    image = np.zeros((4, 400, 3), "uint8")
    image[:, ::4] = 200  # the first pixel of each box, gone when the box is mirrored
    boxes = [[0, i / 100, 1, (i + 0.9) / 100] for i in range(100)]
    scene = policies.make_scene(image, boxes)
    flipped = 0
    for i in range(10):
        found = policy(scene, tf.constant([2, i], tf.int64))
        np.testing.assert_array_equal(found["boxes"], scene["boxes"])
        flipped += (found["image"].numpy()[0, ::4, 0] == 0).sum()
    # 1,000 boxes with probability 0.2, standard deviation 12.6.
    assert 200 - 5 * 12.6 < flipped < 200 + 5 * 12.6


def test_keras_cv_policy_moves_no_label():
    pytest.importorskip("keras_cv")
    image, boxes, mask = picture(40, 56, 0)
    source = InputConfig(policy="keras_cv", flip=False, jitter=(1.0, 1.0))
    augmentation = geometry.Augmentation(source, (40, 56))
    scene = policies.make_scene(image, boxes, mask)
    data = tf.data.Dataset.range(20).map(
        lambda i: augmentation(scene, tf.stack([tf.constant(5, tf.int64), i]))
    )
    results = [tf.nest.map_structure(np.asarray, result) for result in data]
    assert len({result["image"].tobytes() for result in results}) > 10
    for result in results:
        np.testing.assert_array_equal(result["mask"], mask)
        expected = np.clip(boxes * (40, 56, 40, 56), 0, (39, 55, 39, 55))
        np.testing.assert_allclose(result["boxes"], expected, atol=1e-4)

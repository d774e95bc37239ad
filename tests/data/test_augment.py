import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st

from official_selftrain.config import InputConfig
from official_selftrain.data import records
from official_selftrain.data.augmentation import geometry, image_ops


@pytest.mark.parametrize("inside_tf_data", [False, True])
@pytest.mark.parametrize("index", range(5))
def test_resize_equals_release(index, inside_tf_data, golden):
    case = load(golden / f"resize/resize_{index}.npz")
    jitter = bool(case["jitter"])
    target = tuple(int(x) for x in case["desired_size"])
    padded = case["output_image"].shape[:2]

    def transform(image, boxes, label):
        info = geometry.plan_resize(
            tf.shape(image)[:2],
            target,
            case["random_scale"] if jitter else None,
            case["uniform_offset"] if jitter else (0.0, 0.0),
        )
        boxes = geometry.resize_boxes(boxes, info)
        return (
            geometry.resize_image(image, info, padded),
            info,
            boxes,
            image_ops.non_empty(boxes),
            geometry.resize_mask(label, info),
        )

    inputs = (case["image"], case["boxes_normalized"], case["label"])
    if inside_tf_data:
        data = tf.data.Dataset.from_tensors(inputs).map(transform)
        image, info, boxes, keep, label = next(iter(data))
    else:
        image, info, boxes, keep, label = transform(*map(tf.constant, inputs))
    np.testing.assert_allclose(image, case["output_image"], atol=1e-5)
    np.testing.assert_allclose(info, case["image_info"], rtol=1e-6)
    np.testing.assert_allclose(boxes, case["boxes_out"], atol=1e-4)
    np.testing.assert_array_equal(np.where(keep)[0], case["non_empty_indices"])
    np.testing.assert_array_equal(label, case["label_out"][..., 0])


def test_normalize_equals_release(golden):
    case = load(golden / "resize/normalize.npz")
    image, expected = (case[k] for k in sorted(case, key=lambda k: case[k].dtype.itemsize))
    np.testing.assert_allclose(geometry.normalize(image), expected, atol=1e-5)


def test_flip_equals_release(golden):
    case = load(golden / "augment/horizontal_flip.npz")
    flipped = geometry.flip({"image": case["image"], "boxes": case["boxes"]})
    np.testing.assert_array_equal(flipped["image"], case["image_flipped"])
    np.testing.assert_allclose(flipped["boxes"], case["boxes_flipped"], atol=1e-6)


def test_flip_twice_is_the_identity():
    rng = np.random.default_rng(0)
    scene = {
        "image": rng.random((5, 7, 3)),
        "mask": rng.integers(0, 9, (5, 7)),
        "boxes": np.array([[0.1, 0.2, 0.5, 0.9]], "float32"),
    }
    again = geometry.flip(geometry.flip(scene))
    for key, value in scene.items():
        np.testing.assert_allclose(again[key], value, atol=1e-7)


@pytest.mark.parametrize("case", ["train_noaug", "eval_resize", "eval_pad"])
def test_segmentation_parser_equals_release(case, golden):
    expected = load(golden / f"parsers/segmentation_{case}.npz")
    (serialized,) = tf.data.TFRecordDataset(str(golden / "parsers/segmentation.tfrecord"))
    example = records.decode(serialized)
    plan = geometry.plan_pad if case == "eval_pad" else geometry.plan_resize
    if case == "train_noaug":
        source = InputConfig(flip=False, jitter=(1.0, 1.0), as_released=True)
        result = geometry.Augmentation(source, (128, 128))(example, tf.constant([0, 0], tf.int64))
    else:
        result = geometry.fit(example, plan(tf.shape(example["image"])[:2], (128, 128)), True)
    np.testing.assert_allclose(result["image"], expected["image"], atol=1e-5)
    np.testing.assert_array_equal(result["mask"], expected["masks"][..., 0])
    np.testing.assert_array_equal(result["mask"] != 255, expected["valid_masks"][..., 0])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 90), st.integers(8, 90), st.floats(0.3, 2.5), st.floats(0, 0.99),
    st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 2**31),
)  # fmt: skip
def test_image_boxes_and_mask_move_together(height, width, scale, position, top, left, seed):
    """A white rectangle with its box and mask: after S1 all three are where the box says."""
    row, column = int(top * (height - 4)), int(left * (width - 4))
    image = np.zeros((height, width, 3), "uint8")
    image[row : row + 4, column : column + 4] = 255
    mask = (image[..., 0] > 0).astype("int32")
    box = np.array([[row / height, column / width, (row + 4) / height, (column + 4) / width]])
    info = geometry.plan_resize((height, width), (64, 64), scale, (position, position))
    moved = np.asarray(geometry.resize_boxes(tf.constant(box, tf.float32), info))[0]
    bright = np.asarray(geometry.resize_image(image, info))[..., 0]
    labeled = np.asarray(geometry.resize_mask(mask, info)) == 1
    assert (moved >= 0).all() and (moved <= 63).all() and (moved[2:] >= moved[:2]).all()
    y, x = np.mgrid[:64, :64]
    slack = 1 + np.asarray(info)[2].max()  # a source pixel wide
    near = (
        (y >= moved[0] - slack) & (x >= moved[1] - slack)
        & (y <= moved[2] + slack) & (x <= moved[3] + slack)
    )  # fmt: skip
    assert not (labeled & ~near).any()
    assert not ((bright > 2.2) & ~near).any()  # white is 2.25


def test_equal_seeds_give_equal_draws_and_neighbors_differ():
    draws = [geometry.draw(tf.constant([3, i], tf.int64), (0.5, 2.0)) for i in (0, 0, 1)]
    assert float(draws[0][1]) == float(draws[1][1]) != float(draws[2][1])
    assert 0.5 <= float(draws[0][1]) <= 2.0

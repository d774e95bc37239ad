import numpy as np
import pytest
from conftest import concatenate_levels, load

from official_selftrain.ops import anchors as anchor_ops


def test_smallest_anchors_by_hand():
    anchors = anchor_ops.anchor_boxes((128, 128), anchor_size=4.0)
    assert anchors.shape == (9 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1), 4)
    # The first cell of level 3 has its center at 4, and the side of its first anchor is 4 * 8 = 32.
    np.testing.assert_allclose(anchors[0], [4 - 16, 4 - 16, 4 + 16, 4 + 16])
    # Ratio 2: width 32 * sqrt(2), height 32 / sqrt(2).
    np.testing.assert_allclose(anchors[1, 3] - anchors[1, 1], 32 * 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(anchors[1, 2] - anchors[1, 0], 32 / 2**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["anchors_128x128_size3", "anchors_128x128_size4", "anchors_64x64_size4"]
)
def test_anchors_equal_release(name, golden):
    expected = load(golden / f"anchors/{name}.npz")
    ours = anchor_ops.anchor_boxes(
        expected["image_size"], anchor_size=float(expected["anchor_size"])
    )
    np.testing.assert_allclose(ours, expected["boxes"], atol=1e-3)


LABELS = ["a128", "b128_anchor3", "c256", "match0.5_unmatched0.4"]


# A batch always has room for one box, so that "empty" is padded.
@pytest.mark.parametrize(
    ("name", "padding"), [(n, p) for n in LABELS for p in (0, 3)] + [("empty", 3)]
)
def test_labels_equal_release(name, padding, golden):
    case = load(golden / f"labels/labels_{name}.npz")
    size = tuple(case["image_size"])
    anchors = anchor_ops.anchor_boxes(size, anchor_size=float(case["anchor_size"]))
    boxes = np.concatenate([case["boxes"], np.full((padding, 4), -1, "float32")])
    classes = np.concatenate([case["classes"], np.full(padding, -1, "int32")])
    unmatched = 0.4 if "unmatched0.4" in name else 0.5
    class_targets, box_targets, positives = anchor_ops.assign(
        anchors, boxes[None], classes[None], unmatched_threshold=unmatched
    )
    flat_classes = concatenate_levels(case, "cls_targets", 1)[:, 0]
    np.testing.assert_array_equal(np.asarray(class_targets)[0], flat_classes)
    np.testing.assert_allclose(
        np.asarray(box_targets)[0], concatenate_levels(case, "box_targets", 4), atol=1e-5
    )
    assert float(positives[0]) == float(case["num_positives"])


def test_each_box_claims_an_anchor_and_the_first_wins():
    anchors = np.array([[0, 0, 10, 10], [100, 100, 110, 110]], "float32")
    boxes = np.array([[[0, 0, 10, 1], [0, 0, 10, 2], [50, 50, 60, 60]]], "float32")
    classes = np.array([[1, 2, 3]])
    class_targets, _, positives = anchor_ops.assign(anchors, boxes, classes)
    # All three want anchor 0 (the third overlaps nothing): the lowest index gets it.
    np.testing.assert_array_equal(class_targets, [[1, anchor_ops.NEGATIVE]])
    np.testing.assert_array_equal(positives, [1.0])

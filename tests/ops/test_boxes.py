import numpy as np
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st

from official_selftrain.ops import boxes as box_ops


def test_iou_of_half_overlap():
    a = np.array([0.0, 0.0, 2.0, 2.0])  # area 4
    b = np.array([0.0, 1.0, 2.0, 3.0])  # area 4, overlap 2
    np.testing.assert_allclose(box_ops.iou(a, b), 2 / (4 + 4 - 2))


def test_iou_of_empty_boxes_is_zero():
    point = np.array([1.0, 1.0, 1.0, 1.0])
    assert float(box_ops.iou(point, point)) == 0.0


def test_coding_equals_release(golden):
    case = load(golden / "postprocess/box_coding.npz")
    anchors = case["anchors"]
    decoded = np.asarray(box_ops.decode(case["encoded"], anchors))
    sizes = np.abs(case["decoded"]).max()
    np.testing.assert_allclose(decoded, case["decoded"], rtol=1e-5, atol=1e-6 * sizes)
    clipped = box_ops.clip(decoded, np.asarray(case["clip_size"], "float32"))
    np.testing.assert_allclose(clipped, case["clipped"], rtol=1e-5, atol=1e-6 * sizes)
    targets = box_ops.encode(case["boxes_to_encode"], anchors)
    np.testing.assert_allclose(targets, case["training_targets"], rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.floats(1, 200)] * 4), min_size=1, max_size=5), st.floats(8, 64))
def test_decode_undoes_encode_but_for_the_extra_pixel(rows, side):
    rows = np.array(rows, "float32")
    boxes = np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:]], axis=1)
    anchors = np.tile(np.array([[20.0, 20.0, 20.0 + side, 20.0 + side]], "float32"), (len(rows), 1))
    decoded = np.asarray(box_ops.decode(box_ops.encode(boxes, anchors), anchors))
    # Decoding scales by (side + 1) / side and takes the pixel off again.
    grown = (boxes[:, 2:] - boxes[:, :2]) * (side + 1) / side
    np.testing.assert_allclose(decoded[:, 2:] - decoded[:, :2], grown - 1, rtol=1e-4, atol=1e-3)

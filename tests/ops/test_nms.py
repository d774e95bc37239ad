import numpy as np
import pytest
from conftest import concatenate_levels, load

from official_selftrain.ops import anchors as anchor_ops
from official_selftrain.ops import boxes as box_ops
from official_selftrain.ops.nms import NO_SCORE, class_wise_nms


def released_inputs(golden):
    case = load(golden / "postprocess/detections.npz")
    classes = int(case["num_classes"])
    scores = 1 / (1 + np.exp(-concatenate_levels(case, "cls_outputs", classes)))[..., 1:]
    anchors = anchor_ops.anchor_boxes((128, 128), anchor_size=float(case["anchor_size"]))
    deltas = concatenate_levels(case, "box_outputs", 4)
    boxes = box_ops.clip(box_ops.decode(deltas, anchors), case["image_shape"][:, 0])
    return case, boxes, scores.astype("float32")


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("v1", {}),
        ("v1_k20_pre50_thr0.2", {"max_detections": 20, "score_threshold": 0.2}),
        ("v1_few", {"score_threshold": 0.9}),
    ],
)
def test_detections_equal_release(variant, settings, golden):
    case, boxes, scores = released_inputs(golden)
    ours = [np.asarray(x) for x in class_wise_nms(boxes, scores, **settings)]
    for image in range(2):
        count = int(case[f"{variant}__num_detections"][image])
        assert (ours[1][image] > NO_SCORE).sum() == count
        np.testing.assert_allclose(
            ours[1][image], case[f"{variant}__detection_scores"][image], atol=1e-5
        )
        np.testing.assert_allclose(
            ours[0][image, :count], case[f"{variant}__detection_boxes"][image, :count], atol=1e-2
        )
        np.testing.assert_array_equal(
            ours[2][image, :count] + 1, case[f"{variant}__detection_classes"][image, :count]
        )


@pytest.mark.parametrize("tag", ["hard", "soft0.5", "soft0.3_iou0.5"])
def test_one_class_equals_tensorflow_op(tag, golden):
    case = load(golden / "postprocess/nms_single_class.npz")
    sigma, iou, threshold, count = (float(x) for x in case[f"{tag}_args"])
    boxes, scores, _ = class_wise_nms(
        case["boxes"][None],
        case["scores"][None, :, None],
        max_detections=int(count),
        iou_threshold=iou,
        score_threshold=threshold,
        soft_sigma=sigma,
    )
    valid = int(case[f"{tag}_num_valid"])
    np.testing.assert_allclose(scores[0, :valid], case[f"{tag}_scores"][:valid], atol=1e-5)
    np.testing.assert_allclose(boxes[0, :valid], case["boxes"][case[f"{tag}_indices"][:valid]])
    assert (np.asarray(scores)[0, valid:] == NO_SCORE).all()


def test_soft_decay_by_hand_and_classes_apart():
    boxes = np.array([[[0, 0, 2, 2], [0, 1, 2, 3]]], "float32")  # IoU 1/3
    scores = np.array([[[0.9, 0.1], [0.8, 0.7]]], "float32")
    _, kept, label = class_wise_nms(
        boxes, scores, max_detections=4, iou_threshold=1.0, soft_sigma=0.5
    )
    decay = np.exp(-((1 / 3) ** 2))
    np.testing.assert_allclose(kept[0], [0.9, 0.8 * decay, 0.7, 0.1 * decay][:4], rtol=1e-5)
    np.testing.assert_array_equal(label[0], [0, 0, 1, 1])


def test_nothing_above_the_threshold():
    boxes = np.zeros((1, 3, 4), "float32")
    _, scores, _ = class_wise_nms(boxes, np.full((1, 3, 2), 0.01, "float32"), max_detections=2)
    np.testing.assert_array_equal(scores, [[NO_SCORE, NO_SCORE]])

import sys

import numpy as np
import pytest
from conftest import load

from official_selftrain.data.predictions import Detections
from official_selftrain.data.records import ImageRecord
from official_selftrain.evaluation import coco


def golden_images(case):
    """Truth and detections of the golden images; detections go back to original pixels."""
    order = {int(source_id): i for i, source_id in enumerate(case["gt_source_id"])}
    for i, source_id in enumerate(case["pred_source_id"]):
        j = order[int(source_id)]
        height, width = int(case["gt_height"][j]), int(case["gt_width"][j])
        count = int(case["gt_num_detections"][j][0])
        truth = ImageRecord(
            image_id=int(source_id),
            encoded=b"-",
            height=height,
            width=width,
            boxes=case["gt_boxes"][j][:count] / np.tile([height, width], 2),
            classes=case["gt_classes"][j][:count],
            areas=case["gt_areas"][j][:count],
            is_crowd=case["gt_is_crowds"][j][:count].astype(bool),
        )
        pixels = case["pred_detection_boxes"][i] / np.tile(case["pred_image_info"][i][2], 2)
        found = Detections(
            pixels / np.tile([height, width], 2),
            case["pred_detection_scores"][i],
            case["pred_detection_classes"][i],
        )
        yield truth, found


@pytest.mark.parametrize("evaluator", ["installed", "pycocotools"])
def test_coco_metrics_equal_release(evaluator, golden, monkeypatch):
    if evaluator == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        monkeypatch.setattr(coco, "_evaluator", lambda: (COCO, COCOeval))
    case = load(golden / "evaluation/coco_box.npz")
    metric = coco.DetectionMetric()
    for truth, found in golden_images(case):
        metric.update(truth, found)
    result = metric.result()
    ours = [result[name] for name in case["metric_names"].tolist()]
    np.testing.assert_allclose(ours, case["metric_values"], atol=1e-5)
    per_class = [value for name, value in result.items() if name.startswith("AP/")]
    assert np.mean([v for v in per_class if v >= 0]) == pytest.approx(result["AP"], abs=1e-6)


def test_nothing_found_is_zero_and_no_truth_is_minus_one():
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    empty = ImageRecord(image_id=1, encoded=b"-", height=10, width=10)
    labeled = ImageRecord(
        image_id=1, encoded=b"-", height=10, width=10, boxes=[[0, 0, 1, 1]], classes=[1]
    )
    metric = coco.DetectionMetric()
    metric.update(empty, nothing)
    assert metric.result()["AP"] == -1.0
    metric.update(labeled, nothing)
    assert metric.result()["AP"] == 0.0


def test_classes_have_a_value_with_and_without_detections():
    """-1 without truth; classes that share a name are told apart by their ids."""
    labeled = ImageRecord(
        image_id=1, encoded=b"-", height=10, width=10, boxes=[[0, 0, 1, 1]], classes=[1]
    )
    metric = coco.DetectionMetric({1: "cat", 2: "dog", 3: "dog"})
    metric.update(labeled, Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)))
    classes = {"AP/cat": 0.0, "AP/dog (2)": -1.0, "AP/dog (3)": -1.0}
    result = metric.result()
    assert {name: result[name] for name in classes} == classes and len(result) == 15
    metric.update(labeled, Detections(np.array([[0, 0, 1, 1.0]]), np.ones(1), np.ones(1, int)))
    found = metric.result()
    assert list(found) == list(result) and found["AP/dog (3)"] == -1 and 0.4 < found["AP/cat"] < 0.6


@pytest.mark.parametrize("crowd", [False, True])
def test_values_are_finite_whatever_the_truth(crowd):
    """Crowds alone, and boxes in no size class, leave COCO's averages empty."""
    truth = ImageRecord(
        image_id=1, encoded=b"-", height=10, width=10, boxes=[[0, 0, 1, 1]], classes=[1],
        is_crowd=np.array([crowd]), areas=np.array([1e11 if not crowd else 100.0]),
    )  # fmt: skip
    metric = coco.DetectionMetric()
    metric.update(truth, Detections(np.array([[0, 0, 1, 1.0]]), np.ones(1), np.ones(1, int)))
    values = metric.result().values()
    assert all(value == -1 or 0 <= value <= 1 for value in values)


@pytest.mark.parametrize("error", [OSError("libgomp.so.1: cannot open"), AttributeError("np.bool")])
def test_a_broken_evaluator_gives_way_to_pycocotools(error, monkeypatch, caplog):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "faster_coco_eval":
                raise error

    for name in [n for n in sys.modules if n.startswith("faster_coco_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    coco._evaluator.cache_clear()
    assert {cls.__module__.split(".")[0] for cls in coco._evaluator()} == {"pycocotools"}
    coco._evaluator.cache_clear()
    assert "faster_coco_eval is broken, pycocotools is used instead" in caplog.text

"""Thresholds that are found on selection images, and what the statistics of labels warn of."""

import dataclasses
import json
import re

import mini
import numpy as np
import pytest
from helpers import record

from official_selftrain import config as config_lib
from official_selftrain.config import PseudoConfig
from official_selftrain.data import records
from official_selftrain.data.predictions import Detections, MaskPrediction
from official_selftrain.engine import checkpoints
from official_selftrain.evaluation.box_labels import (
    BoxLabelStatistics,
    BoxScores,
    density_thresholds,
)
from official_selftrain.evaluation.label_statistics import flooding_classes, starved_classes
from official_selftrain.evaluation.mask_labels import MaskLabelStatistics, MaskScores, byte_limits
from official_selftrain.evaluation.thresholds import THRESHOLDS, ScoreCounts
from official_selftrain.pipeline import thresholds
from official_selftrain.pipeline.labeling import label_stage
from official_selftrain.pipeline.training import train
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.utils.errors import UserError


def counts(scores, right, truth=100, enough=10):
    """Scores of a class in whole percents, each with whether it is right."""
    found = ScoreCounts(2, enough, first_class=1)
    found.add(np.ones(len(scores), int), np.array(scores) - 1, np.array(right, bool))
    found.truth[1] = truth
    return found


# From above: 10 right, 5 wrong, 10 right, 20 wrong.
SCORES = [95] * 10 + [80] * 5 + [60] * 10 + [40] * 20
RIGHT = [1] * 10 + [0] * 5 + [1] * 10 + [0] * 20


@pytest.mark.parametrize(
    ("target", "threshold", "precision", "reached"),
    [
        (0.8, 0.4, 20 / 25, True),  # at 0.8 it is 10 of 15 only, but lower it is enough again
        (0.81, 0.8, 10 / 10, True),
        (1.0, 0.8, 10 / 10, True),
        (0.4, 0.3, 20 / 45, True),  # no lower, though all are kept
        (0.0, 0.3, 20 / 45, True),
    ],
)
def test_the_threshold_is_the_lowest_that_reaches_the_target(target, threshold, precision, reached):
    entry = counts(SCORES, RIGHT).result(target, {1: "fish"})["fish"]
    assert (entry["threshold"], entry["precision"]) == (threshold, pytest.approx(precision))
    assert (entry["class"], entry["reached"], entry["truth"]) == (1, reached, 100)


@pytest.mark.parametrize(
    ("found", "threshold", "reached"),
    [
        (counts(SCORES, RIGHT, truth=9), 0.5, None),  # too few objects
        (counts([95] * 4, [1] * 4), 0.5, None),  # too few boxes
        (counts([20] * 50, [1] * 50), 0.5, None),  # none above the floor
        (counts([90] * 4 + [50] * 6, [1] * 4 + [0] * 6), 0.3, False),  # 4 boxes prove nothing
        (counts([90] * 6 + [50] * 6, [1, 1, 1, 0, 0, 0] + [0] * 6), 0.5, False),  # the best one
    ],
)
def test_a_class_that_is_rare_or_bad_gets_what_is_known(found, threshold, reached):
    entry = found.result(0.8, {})["1"]
    assert (entry["threshold"], entry["reached"]) == (threshold, reached)


def test_workers_add_up_to_one():
    a, b = counts(SCORES[:20], RIGHT[:20], 50), counts(SCORES[20:], RIGHT[20:], 50)
    a.merge(b)
    assert a.result(0.8, {}) == counts(SCORES, RIGHT).result(0.8, {})
    assert a.precision([0.5, 0.8]) == 1.0 and a.precision([0.5, 0.4]) == 20 / 25
    assert a.precision([0.5, 0.99]) is None


@pytest.mark.parametrize("score", [0.3, 0.6, 0.61, 0.995, 1.0])
def test_bins_of_boxes_are_those_that_the_student_keeps(score):
    search = BoxScores(PseudoConfig(), 3)
    truth = record(boxes=[[0, 0, 0.5, 0.5]], classes=[2], scores=None, is_crowd=None)
    found = Detections(truth.boxes, np.array([score], "float32"), truth.classes)
    search.update(truth, found)
    kept = search.found[2, ::-1].cumsum()[::-1]
    pseudo = dataclasses.replace(truth, scores=found.scores, origin="pseudo")
    for index, threshold in enumerate(THRESHOLDS):
        tally = BoxLabelStatistics(PseudoConfig(score_threshold=threshold), 3)
        tally.add(pseudo, truth)
        if threshold >= 0.3:
            assert kept[index] == tally.kept.total(), threshold
    np.testing.assert_array_equal(search.found, search.right)
    assert search.truth.tolist() == [0, 0, 1]


def test_boxes_that_are_dropped_for_a_better_one_do_not_count():
    truth = record(boxes=[[0, 0, 0.5, 0.5]], classes=[2], scores=None, is_crowd=None)
    boxes, classes = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45]], "float32"), np.array([2, 1])
    found = Detections(boxes, np.array([0.9, 0.8], "float32"), classes)
    for changes, wrong in (({}, 1), ({"agnostic_nms_iou": 0.5}, 0)):
        search = BoxScores(PseudoConfig(**changes), 3)
        search.update(truth, found)
        assert (search.found[1].sum(), search.right[2].sum()) == (wrong, 1)


def test_pixels_count_where_the_human_mask_is_known():
    search = MaskScores(3)
    truth = np.array([[0, 1, 1, 255]], "uint8")
    classes, confidence = np.array([[0, 1, 2, 2]], "uint8"), np.array([[255, 153, 152, 9]], "uint8")
    search.update(record(mask=gray(truth)), MaskPrediction(classes, confidence))
    # The student keeps a confidence of at least rint(255 * threshold): 153 from 0.6 down.
    assert byte_limits([0.6])[0] == 153
    assert np.argwhere(search.found).tolist() == [[0, 100], [1, 60], [2, 59]]
    assert np.argwhere(search.right).tolist() == [[0, 100], [1, 60]]
    assert search.truth.tolist() == [1, 2, 0]


def gray(array):
    from official_selftrain.data import png

    return png.encode(np.asarray(array, "uint8"))


# --- Warnings --------------------------------------------------------------------------------


def boxes_record(classes, score=0.9):
    count = len(classes)
    boxes = [[0.1 * i, 0, 0.1 * i + 0.05, 0.5] for i in range(count)]
    return record(
        boxes=boxes, classes=classes, scores=np.full(count, score), is_crowd=None, mask=b""
    )


def box_warnings(human, pseudo, truth=None):
    tally = BoxLabelStatistics(PseudoConfig(), 4, {1: "jack", 2: "queen", 3: "king"}, human)
    for number, found in enumerate(pseudo):
        tally.add(found, truth[number] if truth else boxes_record([]))
    return tally.result()["warnings"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([1] * 7, "7.00 boxes per image, but 2.00 in the human labels: .* raise pseudo.score"),
        ([1, 2], None),
        ([], "0.00 boxes per image, but 2.00 in the human labels: .* lower pseudo.score"),
    ],
)
def test_a_rate_far_from_the_human_one_is_a_warning(classes, message):
    human, pseudo = [boxes_record([1, 1])] * 10, [boxes_record(classes)] * 10
    told = [text for text in box_warnings(human, pseudo) if "boxes per image" in text]
    assert len(told) == (message is not None)
    if message:
        assert re.search(message, told[0])


def test_labels_that_are_known_to_be_wrong_are_a_warning():
    pseudo = [boxes_record([1, 1])] * 10
    assert "agree with" not in str(box_warnings([], pseudo, pseudo))
    wrong = [boxes_record([2, 2])] * 9 + [boxes_record([1, 1])]
    assert "only 10.0% of the kept labels agree with the held-back labels" in str(
        box_warnings([], pseudo, wrong)
    )


def test_a_class_that_floods_or_is_never_found_is_named():
    names = {1: "jack", 2: "queen", 3: "king"}
    assert flooding_classes({1: 90, 2: 10}, {1: 50, 2: 50}, names)[0].startswith(
        "class queen has 50.0% of the pseudo labels, but 10.0% of the human ones"
    )
    assert not flooding_classes({1: 90, 2: 10}, {1: 65, 2: 35}, names)
    assert not flooding_classes({1: 90, 2: 10}, {1: 9, 2: 9}, names)  # too few to say
    assert "king" in flooding_classes({1: 90}, {1: 50, 3: 50}, names)[0]
    assert not flooding_classes({}, {1: 50}, names)
    assert "queen has 0.0%" in starved_classes({1: 50, 2: 50}, {1: 12}, names)[0]
    assert not starved_classes({1: 50, 2: 50}, {1: 11, 2: 1}, names)  # fewer than that is chance


@pytest.mark.parametrize(
    ("human_rows", "pseudo_rows", "warned"), [(20, 0, True), (20, 10, False), (1, 0, False)]
)
def test_masks_of_one_class_are_a_warning(human_rows, pseudo_rows, warned):
    def mask(rows):
        pixels = np.zeros((40, 60), "uint8")
        pixels[:rows] = 1
        return gray(pixels)

    human = [
        record(mask=mask(human_rows), height=40, width=60, encoded=gray(np.zeros((40, 60, 3))))
    ]
    tally = MaskLabelStatistics(PseudoConfig(), 2, {0: "water", 1: "boat"}, human)
    pseudo = dataclasses.replace(
        human[0], mask=mask(pseudo_rows), confidence=gray(np.full((40, 60), 200)), origin="pseudo"
    )
    tally.add(pseudo, dataclasses.replace(pseudo, mask=b"", confidence=b""))
    told = [text for text in tally.result()["warnings"] if "unlearns" in text]
    assert bool(told) == warned
    if warned:
        assert told[0].startswith("100.00% of the labeled pixels are water, but 50.0% of the human")


def test_without_selection_images_each_class_is_kept_as_often_as_humans_label_it():
    """Two human boxes of jack and one of queen in two images; three images are pseudo-labeled."""
    human = [boxes_record([1, 2]), boxes_record([1])]
    pseudo = [
        boxes_record([1, 1, 2], score=[0.9, 0.8, 0.3]),
        boxes_record([1, 2], score=[0.701, 0.2]),
        boxes_record([1, 3], score=[0.5, 0.9]),
    ]
    found = density_thresholds(pseudo, human, {1: "jack", 2: "queen", 3: "king"})
    # Three jacks are expected, so that the fourth is one too many; of 1.5 queens there are two.
    assert found == {
        "jack": {"class": 1, "threshold": 0.5, "truth": 2},
        "queen": {"class": 2, "threshold": 0.1, "truth": 1},
    }
    source = PseudoConfig(score_threshold="auto")
    kept = thresholds.completed(source, {"thresholds": found}).thresholds(4)
    assert kept == [0.5, 0.5, 0.1, 0.5]


# --- From the teacher to the student -----------------------------------------------------------

ENTRY = {"class": 1, "threshold": 0.7, "precision": 0.9, "reached": True, "truth": 20}
BAD = {"class": 2, "threshold": 0.6, "precision": 0.4, "reached": False, "truth": 20}
RARE = {"class": 3, "threshold": 0.5, "precision": None, "reached": None, "truth": 2}


def test_the_student_gets_numbers():
    config = config_lib.resolve("demo", overrides=["pseudo.score_threshold=auto"])
    with pytest.raises(UserError, match="is a number only once a teacher has labeled"):
        config.pseudo.thresholds(3)
    found = {"thresholds": {"jack": ENTRY, "queen": BAD}}
    student = thresholds.with_thresholds(config, found)
    assert student.pseudo.thresholds(4) == [0.5, 0.7, 0.6, 0.5]
    assert thresholds.with_thresholds(config, {"thresholds": {}}).pseudo.thresholds(2) == [0.5] * 2
    plain = config.override({"pseudo.score_threshold": 0.3})
    assert thresholds.with_thresholds(plain, found) is plain


def test_what_the_selection_images_say_is_told():
    source = PseudoConfig(score_threshold="auto")
    selection = {"precision": 0.45, "classes": {"jack": ENTRY, "queen": BAD, "king": RARE}}
    low, missed = thresholds.warnings(selection, source, {})
    assert low.startswith("only 45.0% of the kept labels agree with the selection images")
    assert "for queen (40% at 0.6): the best one is taken" in missed and "jack" not in missed
    (alone,) = thresholds.warnings({}, source, {"thresholds": {}})
    assert not thresholds.warnings({}, source, {"thresholds": {"jack": ENTRY}})
    assert "no selection images are held out: 0.5 is taken for every class" in alone
    assert not thresholds.warnings({}, PseudoConfig(), {})
    result = BoxLabelStatistics(PseudoConfig(), 4, {1: "jack"}).result()
    result |= thresholds.entries(selection, source)
    from official_selftrain.evaluation.box_labels import box_rows

    rows = dict(box_rows(result))
    assert rows["boxes above 0.5 to 0.7, by class"] == "0"
    some = BoxLabelStatistics(PseudoConfig(class_thresholds={2: 0.7}), 4).result()
    assert dict(box_rows(some))["boxes above 0.5 to 0.7, by class"] == "0"
    assert rows["jack"] == "none, threshold 0.7 (precision 90% on the selection images)"
    assert rows["king"] == "none, threshold 0.5 (too rare in the selection images to tell)"


@pytest.mark.parametrize(
    ("statistics", "override", "message"),
    [
        (None, "trainer.seed=0", "needs the thresholds that pseudo_label or run writes"),
        ({"thresholds": {}}, "trainer.seed=0", "statistics.json has none: label again"),
        (
            {"thresholds": {}, "target_precision": 0.8},
            "pseudo.target_precision=0.9",
            "target_precision=0.9, but the thresholds in .* were found for 0.8",
        ),
    ],
)
def test_labels_without_thresholds_are_refused(tmp_path, statistics, override, message):
    records.write(str(tmp_path / "pseudo-00000.tfrecord"), [boxes_record([1])])
    if statistics is not None:
        (tmp_path / "statistics.json").write_text(json.dumps(statistics))
    labels = [f"pseudo.records={tmp_path}", "pseudo.score_threshold=auto", override]
    config = config_lib.resolve("demo", overrides=labels)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


def test_thresholds_are_found_once_and_read_by_a_student(tmp_path, monkeypatch, caplog):
    """An untrained teacher labels; the selection images are those of the evaluation."""
    mini.write_boxes(tmp_path)
    config = mini.resolve(
        tmp_path, "pseudo.score_threshold=auto", "pseudo.target_precision=0.0", "task.num_classes=2"
    )
    from official_selftrain.tasks import make_task

    teacher = tmp_path / "teacher"
    teacher.mkdir()
    checkpoints.save_weights(make_task(config.task).build_model(), teacher)
    (teacher / "best.json").write_text('{"converged": false}')

    def label():
        place = Workspace.open(config, tmp_path / "labels")
        place.prepare(("human", "unlabeled", "evaluation"))
        place.data.summaries["selection"] = place.data.summaries["evaluation"]
        return label_stage(place, teacher)

    search = {"truth": 0}

    def found(self, target, names):
        search["truth"] += int(self.truth[1])
        return {names[1]: {**ENTRY, "threshold": 0.001, "kept": 9, "right": 9}}

    monkeypatch.setattr(ScoreCounts, "result", found)
    files, statistics = label()
    assert search["truth"] == 5  # the boxes of the six images
    assert statistics["thresholds"]["square"]["threshold"] == 0.001
    assert statistics["selection"]["images"] == 6 and statistics["target_precision"] == 0.0
    assert "the teacher had not converged" in statistics["warnings"][-1] + caplog.text
    assert label()[1] == statistics and search["truth"] == 5  # not predicted again
    student = config.override({"pseudo.records": str(tmp_path / "labels")})
    assert thresholds.from_records(student).pseudo.class_thresholds == {1: 0.001}
    assert len(files) == 1


def test_masks_need_no_suppression_across_classes():
    with pytest.raises(UserError, match=r"agnostic_nms_iou drops boxes: it needs task.kind=det"):
        config_lib.resolve("demo_segmentation", overrides=["pseudo.agnostic_nms_iou=0.5"])

import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from helpers import record

from official_selftrain import teacher
from official_selftrain.config import PseudoConfig
from official_selftrain.data import records
from official_selftrain.data.predictions import Detections
from official_selftrain.evaluation.box_labels import BoxLabelStatistics, matches
from official_selftrain.pipeline.labeling import label_statistics
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.utils.errors import UserError


class Answers(DetectionTask):
    """Finds one object in every image; counts the images it is shown."""

    shown = 0

    def predict(self, model, images, labels):
        batch = images.shape[0]
        return {
            "boxes": tf.constant(np.tile([[[0.0, 0.0, 0.5, 0.5]]], (batch, 1, 1)), tf.float32),
            "scores": tf.fill([batch, 1], 0.7),
            "classes": tf.fill([batch, 1], 1),
        }

    def predictions(self, arrays, count):
        self.shown += count
        return super().predictions(arrays, count)


@pytest.fixture
def shards(tmp_path):
    files = []
    for shard in range(3):
        file = str(tmp_path / f"u-{shard}.tfrecord")
        images = [record(image_id=10 * shard + i, mask=b"") for i in range(5)]
        records.write(file, images)
        files.append(file)
    return files


def test_every_image_is_labeled_once_and_finished_shards_are_kept(shards, tmp_path):
    task = Answers(num_classes=3, image_size=(128, 128))
    written = teacher.outputs(shards, tmp_path / "labels")
    pairs = list(zip(shards, written, strict=True))
    predictor = teacher.Predictor(task, None, 4)
    assert teacher.unfinished(pairs) == pairs
    teacher.label(predictor, pairs, "teacher", 15)
    ids = [r.image_id for r in records.read(written)]
    assert ids == [10 * s + i for s in range(3) for i in range(5)]
    assert task.shown == 15
    # A kill leaves whole shards only; the same call does the missing one.
    before = [pathlib.Path(file).read_bytes() for file in written]
    pathlib.Path(written[1]).unlink()
    assert teacher.unfinished(pairs) == [pairs[1]]
    teacher.label(predictor, [pairs[1]], "teacher", 5)
    assert teacher.unfinished(pairs) == []
    assert task.shown == 20
    assert [pathlib.Path(file).read_bytes() for file in written] == before
    assert all(r.origin == "pseudo" for r in records.read(written))


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: len(data) // 2], flip],
    ids=["emptied", "cut", "flipped"],
)
@pytest.mark.parametrize("proof", ["kept", "missing", "half"])
def test_a_damaged_shard_of_labels_is_found_with_and_without_its_proof(
    shards, tmp_path, caplog, damage, proof
):
    pairs = list(zip(shards, teacher.outputs(shards, tmp_path / "labels"), strict=True))
    for file, output in pairs:
        stream = (r.relabeled("t", boxes=[], classes=[]) for r in records.read([file]))
        records.write(output, stream)
    assert teacher.unfinished(pairs) == []  # shards of earlier versions are read, and get a proof
    file, note = (pathlib.Path(name) for name in (pairs[1][1], records.proof_file(pairs[1][1])))
    assert json.loads(note.read_text())["bytes"] == file.stat().st_size
    file.write_bytes(damage(file.read_bytes()))
    if proof != "kept":
        note.write_text('{"by') if proof == "half" else note.unlink()
    assert teacher.unfinished(pairs) == [pairs[1]]
    assert f"{file} is damaged: it is labeled again" in caplog.text


def labeled(tmp_path, scores, name="p"):
    """One image a score, the box being right; the truth has two boxes an image."""
    pseudo, truth = [], []
    for index, score in enumerate(scores):
        box = [[0.0, 0.5, 0.5, 1.0]]
        values = {"image_id": index, "is_crowd": None, "mask": b""}
        pseudo.append(record(boxes=box, classes=[1], scores=np.array([score], "float32"), **values))
        truth.append(record(scores=None, **values))
    files = [str(tmp_path / f"{name}.tfrecord"), str(tmp_path / f"{name}-truth.tfrecord")]
    records.write(files[0], pseudo)
    records.write(files[1], truth)
    return [files[0]], [files[1]]


def label_report(files, threshold, names=None):
    return label_statistics(
        BoxLabelStatistics(PseudoConfig(score_threshold=threshold), 3, names), *files
    )


def test_classes_have_thresholds_of_their_own(tmp_path):
    files = labeled(tmp_path, [0.9, 0.6, 0.4])
    report = label_statistics(
        BoxLabelStatistics(PseudoConfig(score_threshold=0.8, class_thresholds={1: 0.5}), 3), *files
    )
    assert report["boxes"] == 2 and report["threshold"] == 0.8


def test_report_by_hand(tmp_path):
    files = labeled(tmp_path, [0.9, 0.6, 0.5, 0.2])
    report = label_report(files, 0.5, {1: "fish"})
    assert (report["images"], report["stored_boxes"], report["boxes"]) == (4, 4, 2)
    assert report["boxes_per_class"] == {"fish": 2}
    assert report["empty_share"] == 0.5
    assert report["precision"] == 1.0
    assert report["recall"] == pytest.approx(2 / 8)
    # Bins of 0.05 from 0; float32 0.6 and 0.2 lie just above, 0.9 just below their edges.
    assert sum(report["score_histogram"]) == 4 and report["score_histogram"][10] == 1


def test_threshold_that_keeps_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="keeps no box of 2 images; the highest score is 0.60"):
        label_report(labeled(tmp_path, [0.6, 0.2]), 0.9)


def test_almost_nothing_and_almost_everything_are_loud(tmp_path, caplog):
    report = label_report(labeled(tmp_path, [0.9] + [0.1] * 30), 0.5)
    assert "only 3.2% of images keep a box" in report["warnings"][0]
    assert "PSEUDO LABELS: only 3.2%" in caplog.text
    assert label_report(labeled(tmp_path, [0.9] * 10, "q"), 0.5)["warnings"] == []


def test_matching_uses_each_true_box_once():
    truth = record(is_crowd=None)
    boxes = np.array([[0, 0.5, 0.5, 1.0], [0, 0.5, 0.5, 0.98], [0.25, 0, 1, 0.5]], "float32")
    assert matches(boxes, np.array([1, 1, 2]), truth).tolist() == [True, False, True]
    assert not matches(boxes, np.array([2, 2, 1]), truth).any()
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert matches(nothing.boxes, nothing.classes, truth).shape == (0,)

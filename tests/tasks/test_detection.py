import numpy as np
import pytest
import tensorflow as tf
from conftest import concatenate_levels, load
from helpers import loss_of, png, record

from official_selftrain.config import InputConfig
from official_selftrain.data import inputs, records
from official_selftrain.data.records import ImageRecord
from official_selftrain.ops import anchors as anchor_ops
from official_selftrain.ops import boxes as box_ops
from official_selftrain.tasks.detection import Detections, DetectionTask

SIZE = (128, 128)


def make_task(**changes):
    settings = {"num_classes": 4, "image_size": SIZE, "anchor_size": 4.0, "max_instances": 10}
    return DetectionTask(**{**settings, **changes})


@pytest.mark.parametrize("training", [True, False])
def test_parser_equals_release(training, golden):
    """Training drops the crowd, prediction keeps it; no jitter and no flip in the golden case."""
    mode = "train" if training else "predict_with_gt"
    expected = load(golden / f"parsers/detection_{mode}.npz")
    source = InputConfig(flip=False, jitter=(1.0, 1.0))
    parse = make_task().parser(source, training)
    file = str(golden / "parsers/detection.tfrecord")
    (serialized,) = tf.data.TFRecordDataset(file)
    image, labels = parse(records.decode(serialized), tf.zeros([2], tf.int64))
    np.testing.assert_allclose(image, expected["image"], atol=1e-5)
    np.testing.assert_allclose(labels["image_info"], expected["image_info"], rtol=1e-6)
    class_targets, box_targets, positives = anchor_ops.assign(
        make_task().anchors, labels["boxes"][None], labels["classes"][None]
    )
    expected = {key.replace("__", "_"): value for key, value in expected.items()}
    np.testing.assert_array_equal(
        np.asarray(class_targets)[0], concatenate_levels(expected, "cls_targets", 1)[:, 0]
    )
    np.testing.assert_allclose(
        np.asarray(box_targets)[0], concatenate_levels(expected, "box_targets", 4), atol=1e-5
    )
    assert float(positives[0]) == float(expected["num_positives"])


def labels_of(boxes, classes, room=3):
    """A batch of one image, padded."""
    padding = room - len(boxes)
    return {
        "boxes": np.array([boxes + [[-1] * 4] * padding], "float32"),
        "classes": np.array([classes + [-1] * padding], "int32"),
    }


def outputs(task, class_logit=-4.0):
    anchors = len(task.anchors)
    return {
        "class_logits": tf.fill([1, anchors, 4], class_logit),
        "box_deltas": tf.zeros([1, anchors, 4]),
    }


def test_image_without_boxes_has_a_finite_class_loss_alone():
    task = make_task()
    loss = loss_of(task, outputs(task), labels_of([], []))
    assert np.isfinite(float(loss["total"])) and float(loss["total"]) > 0
    assert float(loss["box"]) == 0.0
    assert float(task.objects(labels_of([], []))) == 0.0


def test_loss_is_normalised_by_one_plus_positives_over_replicas():
    task = make_task()
    labels = labels_of([[10, 10, 60, 60]], [2])
    alone = loss_of(task, outputs(task), labels)["total"]
    positives = float(anchor_ops.assign(task.anchors, labels["boxes"], labels["classes"])[2][0])
    shared = loss_of(task, outputs(task), labels, shared=lambda x: 2 * x)["total"]
    ratio = (1 + positives) / (1 + 2 * positives)
    assert float(shared) == pytest.approx(float(alone) * ratio, rel=1e-5)


class Oracle:
    """A network that sees one object: its anchors answer, the others are silent."""

    def __init__(self, task, box, label):
        self.task, self.box, self.label = task, np.array(box, "float32"), label

    def __call__(self, images, training):
        assert not training
        anchors = self.task.anchors
        overlap = np.asarray(box_ops.iou(self.box[None], anchors))
        logits = np.full((1, len(anchors), 4), -9.0, "float32")
        logits[0, overlap > 0.5, self.label] = 3.0
        deltas = box_ops.encode(np.tile(self.box, (len(anchors), 1)), anchors)
        return {"class_logits": logits, "box_deltas": np.asarray(deltas)[None]}


def test_detections_come_back_in_fractions_of_the_original_image(tmp_path):
    """An image of 64 x 32 is doubled to 128 x 64 and padded; the box returns where it was."""

    truth = np.array([0.25, 0.25, 0.75, 0.75], "float32")
    record = ImageRecord(
        image_id=1, encoded=png(64, 32), height=64, width=32, boxes=[truth], classes=[3]
    )
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [record])
    task = make_task()
    images, labels, _ = next(iter(inputs.prediction_dataset([file], task.parser(), 1)))
    network_box = np.asarray(labels["boxes"])[0, 0]
    np.testing.assert_allclose(network_box, [32, 16, 96, 48])
    arrays = task.predict(Oracle(task, network_box, 3), images, labels)
    (found,) = task.predictions(arrays, 1)
    assert found.classes[0] == 3
    assert found.scores[0] == pytest.approx(1 / (1 + np.exp(-3)), rel=1e-5)
    # The released decoding is larger by a pixel of the network input, less than 2 % here.
    np.testing.assert_allclose(found.boxes[0], truth, atol=0.03)


def test_background_is_never_detected():
    task = make_task()
    images = np.zeros((1, *SIZE, 3), "float32")
    labels = {"image_info": np.array([[[128, 128], [128, 128], [1, 1], [0, 0]]], "float32")}
    arrays = task.predict(Oracle(task, [32, 32, 96, 96], 0), images, labels)
    assert task.predictions(arrays, 1)[0].scores.size == 0


def test_pseudo_record_keeps_the_image_and_every_score():

    found = Detections(np.array([[0, 0, 1, 1.0]]), np.array([0.06]), np.array([2]))
    pseudo = make_task().to_record(record(), found, "runs/teacher")
    assert pseudo.encoded == record().encoded and pseudo.image_id == record().image_id
    assert (pseudo.origin, pseudo.teacher) == ("pseudo", "runs/teacher")
    assert pseudo.scores.tolist() == [0.06] and pseudo.mask == b""

import io

import numpy as np
import pytest
import tensorflow as tf
from conftest import concatenate_levels, load
from helpers import loss_of, png, record
from PIL import Image

from official_selftrain.config import InputConfig, PseudoConfig, changed
from official_selftrain.data import inputs, records
from official_selftrain.data.predictions import Detections
from official_selftrain.data.records import ImageRecord
from official_selftrain.evaluation.box_labels import BoxLabelStatistics, best_of_object, duplicates
from official_selftrain.evaluation.label_statistics import starved_classes
from official_selftrain.ops import anchors as anchor_ops
from official_selftrain.ops import boxes as box_ops
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.utils.errors import UserError

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
    parse = make_task().parser(source if training else None)
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


def labels_of(boxes, classes, max_boxes=3):
    """A batch of one image, padded."""
    padding = max_boxes - len(boxes)
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
    assert float(task.label_density(labels_of([], []))) == 0.0


def test_loss_is_normalized_by_one_plus_positives_over_replicas():
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
    assert pseudo.scores == np.float32(0.06) and pseudo.mask == b""


# --- Labels that the task cannot use, or that call for a second look -------------------------


def test_class_ids_beyond_the_task_name_the_record(tmp_path):
    task, odd = make_task(num_classes=2), record(name="odd.png")  # of classes 1 and 2
    task.check_record(record(classes=[1, 1]))
    with pytest.raises(UserError, match=r"odd.png has the class id 2, but task.num_classes=2"):
        task.check_record(odd)
    with pytest.raises(UserError, match=r"odd.png has the class id 2"):
        BoxLabelStatistics(PseudoConfig(), 2).add(odd, odd)
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [record(classes=[1, 1]), odd])
    with pytest.raises(UserError, match=r"odd.png has the class id 2"):
        inputs.find_bad_record([file], task.check_record)
    parse = task.parser(PseudoConfig())
    data = inputs.training_dataset([file], parse, 2, 0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="beyond task.num_classes"):
        next(iter(data))
    kept = tf.data.TFRecordDataset(file).filter(task.make_record_filter(PseudoConfig()))
    with pytest.raises(tf.errors.InvalidArgumentError, match="beyond task.num_classes"):
        list(kept)


def test_boxes_on_a_better_box_of_another_class_are_counted():
    box, near, far = [0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.45], [0.6, 0.6, 0.9, 0.9]

    def count(boxes, classes, scores):
        return duplicates(np.array(boxes, "float32"), np.array(classes), np.array(scores))

    assert count([box, near, far], [1, 2, 3], [0.9, 0.8, 0.7]) == 1
    assert count([box, near, far], [1, 1, 3], [0.9, 0.8, 0.7]) == 0  # one class: suppression
    assert count([box, near, box], [1, 2, 3], [0.7, 0.8, 0.9]) == 2
    assert count([box, [0.1, 0.1, 0.29, 0.5]], [1, 2], [0.9, 0.8]) == 0
    assert count(np.zeros((0, 4)), [], []) == 0


def pseudo_record(classes, scores=0.9, boxes=None):
    count = len(classes)
    boxes = [[0, 0, 0.5, 0.5]] * count if boxes is None else boxes
    return record(
        boxes=boxes, classes=classes, scores=np.full(count, scores), is_crowd=None, mask=b""
    )


def test_double_boxes_are_reported_and_many_are_a_warning():
    tally = BoxLabelStatistics(PseudoConfig(), 4, {1: "jack", 2: "king"})
    truth = pseudo_record([])
    tally.add(pseudo_record([1, 2]), truth)
    tally.add(pseudo_record([1], 0.1), truth)
    result = tally.result()
    assert result["double_boxes"] == 1
    assert any("1 of 2 boxes (50%) lie on a better box" in text for text in result["warnings"])
    rows = dict(make_task().label_rows(result))
    assert rows["boxes on a better box of another class"] == "1"
    del result["double_boxes"]  # a report of an earlier version
    make_task().label_rows(result)


def test_the_result_of_no_image_is_no_crash():
    result = BoxLabelStatistics(PseudoConfig(), 4).result()
    assert (result["images"], result["boxes"], result["warnings"]) == (0, 0, [])


@pytest.mark.parametrize(
    ("human", "pseudo", "starved"),
    [
        ({1: 50, 2: 50}, {1: 90, 2: 10}, ["two"]),
        ({1: 50, 2: 50}, {1: 100}, ["two"]),
        ({1: 50, 2: 50}, {1: 80, 2: 20}, []),
        ({1: 500, 2: 9}, {1: 1000}, []),  # too few to say
        ({1: 50, 2: 50}, {1: 9}, []),
        ({1: 50, 2: 50}, {}, []),
        ({}, {1: 90, 2: 1}, []),
        ({1: 40, 2: 40, 3: 40}, {3: 100}, ["one", "two"]),
    ],
)
def test_classes_that_pseudo_labels_starve_are_named(human, pseudo, starved):
    names = {1: "one", 2: "two", 3: "three"}
    warnings = starved_classes(human, pseudo, names)
    assert [text.split()[1] for text in warnings] == starved


def test_the_tally_compares_its_classes_with_human_ones():
    human = [pseudo_record([1, 2])] * 20
    tally = BoxLabelStatistics(PseudoConfig(), 4, {2: "king"}, human)
    for _ in range(30):
        tally.add(pseudo_record([1]), pseudo_record([]))
    warnings = tally.result()["warnings"]
    assert any("class king has 0.0% of the pseudo labels, but 50.0%" in w for w in warnings)


# --- One label per object ---------------------------------------------------------------------

NEAR = [[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.45], [0.1, 0.12, 0.5, 0.41], [0.6, 0.6, 0.9, 0.9]]


@pytest.mark.parametrize(
    ("classes", "scores", "kept"),
    [
        ([1, 2, 3, 2], [0.9, 0.8, 0.7, 0.6], [True, False, False, True]),
        ([1, 1, 2, 2], [0.9, 0.8, 0.7, 0.6], [True, True, False, True]),  # a class drops no own
        ([1, 2, 1, 1], [0.7, 0.8, 0.9, 0.6], [True, False, True, True]),  # whatever the order
        ([1, 2, 1, 1], [0.7, 0.8, 0.6, 0.9], [False, True, False, True]),
        ([1, 2, 2, 1], [0.8, 0.8, 0.3, 0.3], [True, False, False, True]),  # a tie: the first one
    ],
)
def test_boxes_on_a_better_box_of_another_class_are_dropped(classes, scores, kept):
    found = best_of_object(
        np.array(NEAR, "float32"), np.array(classes), np.array(scores, "float32"), 0.5
    )
    assert found.tolist() == kept
    assert best_of_object(np.zeros((0, 4)), np.zeros(0), np.zeros(0), 0.5).shape == (0,)


def test_a_dropped_box_drops_none():
    """The first lies on the second, the second on the third, but the first not on the third."""
    boxes = [[0, 0, 1, 0.3], [0, 0.1, 1, 0.4], [0, 0.2, 1, 0.5]]  # neighbors have an IoU of 0.5
    found = best_of_object(
        np.array(boxes, "float32"), np.array([1, 2, 3]), np.array([0.9, 0.8, 0.7]), 0.4
    )
    assert found.tolist() == [True, False, True]


def test_student_and_statistics_read_the_same_boxes(tmp_path):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.6, (20, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.2, 0.4, (20, 2))], axis=1)
    found = Detections(boxes, np.sort(rng.uniform(0, 1, 20))[::-1], rng.integers(1, 4, 20))
    task = make_task(max_instances=20)
    pseudo, file = task.to_record(record(), found, "teacher"), str(tmp_path / "a.tfrecord")
    records.write(file, [pseudo])
    settings = {"batch_size": 1, "jitter": (1.0, 1.0), "flip": False, "score_threshold": 0.2}
    counts = []
    for changes in ({}, {"agnostic_nms_iou": 0.5}, {"agnostic_nms_iou": 0.1}):
        source = PseudoConfig(**settings, class_thresholds={2: 0.6}, **changes)
        _, labels = next(iter(inputs.training_dataset([file], task.parser(source), 1, 0)))
        kept = task.kept(pseudo, source)
        count = len(kept.scores)
        np.testing.assert_array_equal(labels["scores"][0][:count], kept.scores)
        np.testing.assert_array_equal(labels["classes"][0][:count], kept.classes)
        assert (np.asarray(labels["classes"])[0][count:] == -1).all() and "weights" not in labels
        tally = BoxLabelStatistics(source, 4)
        tally.add(pseudo, pseudo_record([]))
        counts.append(tally.result()["boxes"])
        assert counts[-1] == count == counts[0] - tally.result()["suppressed_boxes"]
    assert counts[0] > counts[1] > counts[2] > 0


# --- Boxes that count with their scores ---------------------------------------------------------


def test_the_loss_of_a_box_counts_with_its_score():
    """Two objects far apart: the sums are those of each alone, with its weight."""
    task, boxes = make_task(), [[8, 8, 40, 40], [72, 72, 120, 120]]
    x = outputs(task)
    x["box_deltas"] += 0.3
    nothing = task.loss_sums(x, labels_of([], []))[0]
    single = [task.loss_sums(x, labels_of([box], [2])) for box in boxes]
    labels = labels_of(boxes, [2, 2])
    plain, count = task.loss_sums(x, labels)
    ones = task.loss_sums(x, labels | {"weights": np.array([[1, 1, 0]], "float32")})
    assert float(ones[1]) == float(count) == sum(float(n) for _, n in single)
    for name in plain:
        assert float(ones[0][name]) == pytest.approx(float(plain[name]), rel=1e-6)
    sums, count = task.loss_sums(x, labels | {"weights": np.array([[0.5, 0.75, 0]], "float32")})
    assert float(count) == 0.5 * float(single[0][1]) + 0.75 * float(single[1][1])
    box = 0.5 * float(single[0][0]["box"]) + 0.75 * float(single[1][0]["box"])
    assert float(sums["box"]) == pytest.approx(box, rel=1e-5)
    # The class loss of the anchors of a box is what it adds to that of an empty image, and what
    # these anchors have there, where all logits are -4.
    negative = 4 * 0.75 * (1 / (1 + np.exp(4))) ** 1.5 * np.log1p(np.exp(-4))
    expected = float(nothing["class"])
    for weight, (alone, anchors) in zip((0.5, 0.75), single, strict=True):
        of_anchors = float(alone["class"]) - float(nothing["class"]) + float(anchors) * negative
        expected += weight * of_anchors - float(anchors) * negative
    assert float(sums["class"]) == pytest.approx(expected, rel=1e-4)


def test_the_parser_gives_scores_as_weights(tmp_path):
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [pseudo_record([1, 2], [0.9, 0.6])])
    source = PseudoConfig(batch_size=1, score_weighting=True)
    _, labels = next(iter(inputs.training_dataset([file], make_task().parser(source), 1, 0)))
    np.testing.assert_allclose(labels["weights"][0][:3], [0.9, 0.6, 0], rtol=1e-6)
    _, human = next(iter(inputs.training_dataset([file], make_task().parser(InputConfig()), 1, 0)))
    assert "weights" not in human


# --- Many views of an image ---------------------------------------------------------------------


NETWORK = {
    "backbone": "resnet10", "neck": "fpn", "neck_filters": 8, "head_convs": 1, "head_filters": 8,
    "nms": {"max_detections": 5},
}  # fmt: skip


class Blob:
    """A network that sees a bright rectangle in each image, at any size, mirrored or not."""

    def __init__(self, task):
        self.task = task

    def __call__(self, images, training):
        images = np.asarray(images)
        size = images.shape[1:3]
        anchors = anchor_ops.anchor_boxes(size, self.task.config.anchor_size)
        rows, columns = (np.flatnonzero((images[0, ..., 0] > 1).any(axis)) for axis in (1, 0))
        box = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], "float32")
        overlap = np.asarray(box_ops.iou(box[None], anchors))
        logits = np.full((1, len(anchors), 4), -9.0, "float32")
        logits[0, overlap > 0.4, 3] = 3.0
        deltas = box_ops.encode(np.tile(box, (len(anchors), 1)), anchors)
        return {"class_logits": logits, "box_deltas": np.asarray(deltas)[None]}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (2.0,), (1.0, 2.0), (0.75, 1.5)])
def test_all_views_see_the_same_box(tmp_path, scales, flip):
    pixels = np.zeros((64, 48, 3), "uint8")
    pixels[16:40, 8:28] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [ImageRecord(image_id=1, encoded=buffer.getvalue(), height=64, width=48)])
    task = DetectionTask(make_task(label_scales=scales, label_flip=flip, **NETWORK).config, True)
    images, labels, _ = next(iter(inputs.prediction_dataset([file], task.parser(), 1)))
    (found,) = task.predictions(task.predict(Blob(task), images, labels), 1)
    assert found.classes.tolist() == [3]  # the views are one object
    np.testing.assert_allclose(found.boxes[0], [16 / 64, 8 / 48, 40 / 64, 28 / 48], atol=0.03)


def test_the_mirror_image_has_the_mirrored_boxes():
    """Outputs for a mirrored image are decoded to the boxes of the image itself."""
    task = make_task()
    order, start = [], 0  # of the anchors of each row from right to left
    for side in (16, 8, 4, 2, 1):
        level = start + np.arange(side * side * 9).reshape(side, side, 9)
        order.append(level[:, ::-1].ravel())
        start += level.size
    order = np.concatenate(order)
    deltas = np.random.default_rng(0).normal(0, 0.3, (1, start, 4)).astype("float32")
    logits = np.zeros((1, start, 4), "float32")
    info = np.array([[[128, 128], [128, 128], [1, 1], [0, 0]]], "float32")
    plain, _ = task.decode({"class_logits": logits, "box_deltas": deltas}, info)
    mirrored = deltas[:, order] * np.float32([1, -1, 1, 1])
    outputs = {"class_logits": logits, "box_deltas": mirrored}
    back, _ = task.decode(outputs, info, mirrored=True)
    np.testing.assert_allclose(np.asarray(back), np.asarray(plain)[:, order], atol=1e-3)


def test_a_flip_of_the_flipped_image_gives_the_same_boxes():
    task = make_task(num_classes=3, **NETWORK)
    model = task.build_model()
    predict = model.get_layer("retinanet.class_net.class-predict")
    rng = np.random.default_rng(0)
    predict.set_weights([rng.standard_normal(predict.kernel.shape), np.zeros(predict.bias.shape)])
    images = rng.standard_normal((1, *SIZE, 3)).astype("float32")
    labels = {"image_info": np.array([[[128, 128], [128, 128], [1, 1], [0, 0]]], "float32")}
    both = make_task(num_classes=3, eval_flip=True, **NETWORK)
    first = both.predict(model, images, labels)
    second = both.predict(model, images[:, :, ::-1], labels)
    np.testing.assert_allclose(first["scores"], second["scores"], rtol=1e-5)
    ymin, xmin, ymax, xmax = np.moveaxis(np.asarray(second["boxes"])[0], -1, 0)
    back = np.stack([ymin, 1 - xmax, ymax, 1 - xmin], axis=-1)
    # Boxes at the border are clipped to the last pixel on one side only (released code).
    np.testing.assert_allclose(np.sort(first["boxes"][0], 0), np.sort(back, 0), atol=1.01 / 128)


def test_the_detector_of_any_size_equals_the_fixed_one(tmp_path):
    """As it is compiled to predict at two scales."""
    from official_selftrain import teacher

    task = make_task(num_classes=3, **NETWORK)
    model = task.build_model()
    views = DetectionTask(changed(task.config, label_scales=(1.0, 1.5), label_flip=True), True)
    network = views.inference_model(model)
    x = np.random.default_rng(0).standard_normal((1, *SIZE, 3)).astype("float32")
    for name, value in model(x).items():
        np.testing.assert_allclose(network(x)[name], value, rtol=1e-4, atol=1e-5)
    assert task.inference_model(model) is model and views.scales.sizes == [(128, 128), (256, 256)]
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [record(image_id=i) for i in range(3)])
    found = [p for _, p in teacher.Predictor(views, model, 2)([file])]
    assert len(found) == 3 and all(p.boxes.shape[1:] == (4,) for p in found)

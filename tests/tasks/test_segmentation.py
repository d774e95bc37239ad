import io

import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from helpers import loss_of, mask_png, png, record
from PIL import Image

from official_selftrain.config import InputConfig, PseudoConfig, SegmentationConfig
from official_selftrain.data import inputs, records
from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.evaluation.mask_labels import MaskLabelStatistics
from official_selftrain.evaluation.miou import SegmentationMetric
from official_selftrain.pipeline.labeling import label_statistics
from official_selftrain.tasks import make_task, multiscale
from official_selftrain.tasks.segmentation import SegmentationTask
from official_selftrain.utils.errors import UserError

SIZE = (128, 128)
SMALL = {
    "num_classes": 3,
    "image_size": SIZE,
    "backbone": "efficientnet-b0",
    "backbone_sizes": {"width": 0.25, "depth": 0.3},
    "neck": "fpn",
    "neck_filters": 8,
    "head_convs": 1,
}


def make(labeling=False, **changes):
    return SegmentationTask(SegmentationConfig(**{**SMALL, **changes}), labeling)


def make_labeler(**changes):
    """A task that labels at two scales, each of which is traced twice."""
    return make(True, label_scales=(0.5, 1.0), **changes)


def gray(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def image_record(height=40, width=60, **changes):
    values = {
        "encoded": png(height, width), "height": height, "width": width, "boxes": [],
        "classes": [], "scores": None, "is_crowd": None, "mask": mask_png(height, width, 1),
    }  # fmt: skip
    return record(**{**values, **changes})


# --- Loss and metric -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pascal_config", {}),
        ("groundtruth_dimension", {"loss_size": "mask"}),
        ("label_smoothing_0.1", {"label_smoothing": 0.1}),
        ("class_weights", {"class_weights": "golden"}),
    ],
)
def test_loss_equals_release(name, changes, golden):
    case = load(golden / "losses/segmentation_loss.npz")
    if changes.get("class_weights"):
        changes = {"class_weights": tuple(case["class_weights"].tolist())}
    task = make(num_classes=6, **changes)
    labels = {"mask": tf.constant(case["labels"][..., 0], tf.int32)}
    loss = loss_of(task, {"logits": tf.constant(case["logits"])}, labels)
    np.testing.assert_allclose(loss["total"], case[f"loss_{name}"], rtol=1e-5)


def test_an_ignored_image_costs_nothing_and_replicas_share_the_pixels():
    task = make()
    logits = tf.random.stateless_normal([2, 32, 32, 3], [0, 1])
    ignored = {"mask": tf.fill([2, *SIZE], 255)}
    assert float(loss_of(task, {"logits": logits}, ignored)["total"]) == 0
    mask = np.full((2, *SIZE), 255, "int32")
    mask[0, :64], mask[1, :4, :4] = 1, 2
    whole = loss_of(task, {"logits": logits}, {"mask": tf.constant(mask)})["total"]
    count = 16 * 32 + 1  # every fourth pixel of each side
    shares = [
        loss_of(
            task,
            {"logits": logits[i : i + 1]},
            {"mask": tf.constant(mask[i : i + 1])},
            lambda _: count,
        )["total"]
        for i in range(2)
    ]
    np.testing.assert_allclose(sum(shares), whole, rtol=1e-6)


def test_metric_equals_release(golden):
    case = load(golden / "evaluation/miou.npz")
    metric = SegmentationMetric(5, {0: "background"})
    for logits, masks in zip(case["logits"], case["masks"], strict=True):
        found = tf.argmax(tf.raw_ops.ResizeBilinear(images=logits, size=masks.shape[1:3]), axis=-1)
        metric.update_pixels(masks[..., 0].astype(int), found.numpy())
    np.testing.assert_array_equal(metric.confusion, case["confusion_matrix"])
    result = metric.result()
    np.testing.assert_allclose(result["mIoU"], case["miou"], atol=1e-5)
    names = ["background", "1", "2", "3", "4"]
    np.testing.assert_allclose(
        [result[f"IoU/{n}"] for n in names], case["iou_per_class"], atol=1e-5
    )


def test_metric_by_hand():
    metric = SegmentationMetric(3)
    truth = image_record(2, 4, mask=gray([[0, 0, 1, 255], [0, 1, 1, 255]]))
    found = np.array([[0, 1, 1, 2], [0, 1, 0, 2]], "uint8")
    metric.update(truth, MaskPrediction(found, found))
    result = metric.result()
    # Class 0: 2 right, 1 + 1 wrong; class 1: 2 right, 1 + 1 wrong; class 2 only where ignored.
    assert result["IoU/0"] == result["IoU/1"] == result["mIoU"] == 0.5
    assert result["IoU/2"] == -1 and result["pixel_accuracy"] == pytest.approx(4 / 6)


# --- Input -----------------------------------------------------------------------------------


def test_the_student_ignores_pixels_under_the_threshold_of_their_class(tmp_path):
    mask = np.zeros((40, 60), "uint8")
    mask[:, 30:] = 1
    confidence = np.full((40, 60), 200, "uint8")
    confidence[:20] = 120  # 0.47
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [image_record(mask=gray(mask), confidence=gray(confidence))])
    shares = {}
    for name, changes in {
        "low": {"score_threshold": 0.4},
        "default": {},
        "by class": {"class_thresholds": {1: 0.4}},
        "high": {"score_threshold": 0.9},
    }.items():
        source = PseudoConfig(batch_size=1, jitter=(1.0, 1.0), flip=False, **changes)
        parse = make().parser(source)
        image, labels = next(iter(inputs.training_dataset([file], parse, 1, 0)))
        assert image.shape == (1, *SIZE, 3)
        found = labels["mask"].numpy()[0]
        inside = found[:85]  # 40 x 60 becomes 85 x 128, the rest is padding
        assert (found[86:] == 255).all()
        shares[name] = [np.mean(inside == value).round(2) for value in (0, 1)]
    assert shares == {
        "low": [0.5, 0.5], "default": [0.25, 0.25], "by class": [0.25, 0.5], "high": [0.0, 0.0],
    }  # fmt: skip
    keep = make().make_record_filter
    (serialized,) = tf.data.TFRecordDataset(file)
    assert bool(keep(PseudoConfig())(serialized))
    assert not bool(keep(PseudoConfig(score_threshold=0.9))(serialized))


@pytest.mark.parametrize("policy", ["S1", "S4"])
@pytest.mark.parametrize("size", [(40, 60), (300, 260)])
def test_images_larger_and_smaller_than_the_crop(tmp_path, policy, size):
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [image_record(*size)])
    parse = make().parser(InputConfig(batch_size=2, policy=policy))
    for _, labels in inputs.training_dataset([file], parse, 2, 0).take(4):
        assert set(np.unique(labels["mask"])) <= {1, 255}


# --- Predictions -----------------------------------------------------------------------------


def write_images(tmp_path, *sizes):
    rng = np.random.default_rng(0)
    file = str(tmp_path / "images.tfrecord")
    records.write(
        file,
        [
            image_record(h, w, encoded=gray(rng.integers(0, 255, (h, w, 3))), image_id=i)
            for i, (h, w) in enumerate(sizes)
        ],
    )
    return [file]


def predict(task, model, files, batch=2):
    from official_selftrain import teacher

    return [prediction for _, prediction in teacher.Predictor(task, model, batch)(files)]


@pytest.fixture(scope="module")
def model():
    network = make().build_model()
    rng = np.random.default_rng(0)
    network.get_layer("segmentation.conv2d").kernel.assign(rng.standard_normal((1, 1, 8, 3)))
    return network


def test_single_scale_equals_the_exported_network(model, tmp_path):
    """`serving.ClassMap` has the released chain of resizes."""
    files = write_images(tmp_path, (100, 60), (30, 90), (128, 128))
    task = make()
    found = predict(task, model, files)
    serve = task.serving(model)
    for images, labels, count in inputs.prediction_dataset(files, task.parser(), 1):
        result = serve(images[0], labels["image_info"][:, 0])
        classes = tf.io.decode_png(result["category_bytes"][0])[..., 0].numpy()
        scores = tf.io.decode_png(result["score_bytes"][0])[..., 0].numpy().astype(int)
        ours = found.pop(0)
        assert ours.classes.shape == classes.shape
        assert np.mean(ours.classes != classes) < 0.001
        assert np.abs(ours.confidence.astype(int) - scores).max() <= 1
        assert int(count) == 1


def test_strips_change_nothing(model, tmp_path, monkeypatch):
    files = write_images(tmp_path, (200, 60), (31, 90))
    whole = predict(make(), model, files)
    monkeypatch.setattr(multiscale, "MAX_PROBABILITIES", 1000)  # a few rows at a time
    for a, b in zip(whole, predict(make(), model, files), strict=True):
        # But for rounding: where a CPU's vectors end, exp is another function.
        assert np.mean(a.classes != b.classes) < 0.001
        assert np.abs(a.confidence.astype(int) - b.confidence).max() <= 1
        assert np.mean(a.confidence != b.confidence) < 0.001


def test_scales_are_averaged_as_probabilities(model, tmp_path):
    """Two scales by hand: fit, network, resize to the image, softmax, mean."""
    from official_selftrain.data.augmentation import geometry

    files = write_images(tmp_path, (64, 96))
    task = make(eval_scales=(1.0, 1.5), eval_flip=True)
    (found,) = predict(task, model, files)
    (serialized,) = tf.data.TFRecordDataset(files)
    image = records.decode(serialized)["image"]
    network = task.inference_model(model)
    total = 0
    for target, size in ((128, 128), (192, 256)):
        info = geometry.plan_resize((64, 96), (target, target))
        x = geometry.resize_image(image, info, (size, size))[None]
        for mirrored in (False, True):
            logits = network(x[:, :, ::-1] if mirrored else x)["logits"]
            logits = logits[:, :, ::-1] if mirrored else logits
            logits = tf.raw_ops.ResizeBilinear(images=logits, size=[size, size])
            logits = logits[:, : round(target * 2 / 3), :target]
            total += tf.nn.softmax(tf.raw_ops.ResizeBilinear(images=logits, size=[64, 96])[0]) / 4
    assert np.mean(found.classes != tf.argmax(total, -1).numpy()) < 0.001
    expected = np.rint(255 * tf.reduce_max(total, -1).numpy())
    assert np.abs(found.confidence - expected).max() <= 1


def test_predictor_of_any_size_equals_the_fixed_one(model):
    task = make(labeling=True)
    x = np.random.default_rng(0).standard_normal((1, *SIZE, 3)).astype("float32")
    np.testing.assert_allclose(
        task.inference_model(model)(x)["logits"], model(x)["logits"], rtol=1e-4, atol=1e-5
    )
    assert make().inference_model(model) is model
    assert task.scales.sizes == [(128, 128)] * 3 + [(256, 256)] * 3
    spinenet = make(True, backbone="spinenet49S", neck="none", head_level=3, backbone_sizes=None)
    with pytest.raises(UserError, match="a SpineNet has one image size"):
        spinenet.inference_model(model)


def test_evaluation_at_the_size_of_the_network(model, tmp_path):
    files = write_images(tmp_path, (64, 96))
    (found,) = predict(make(eval_size="network"), model, files)
    assert found.classes.shape == (85, 128)
    metric = SegmentationMetric(3)
    (truth,) = records.read(files)
    metric.update(truth, found)
    assert metric.confusion.sum() == 85 * 128


# --- Pseudo labels ---------------------------------------------------------------------------


def test_records_of_the_teacher_hold_every_pixel_and_its_confidence(model, tmp_path):
    from official_selftrain import teacher

    files = write_images(tmp_path, (64, 96), (30, 90), (128, 128))
    task = make_labeler()
    written = teacher.outputs(files, tmp_path)
    shards = list(zip(files, written, strict=True))
    teacher.label(teacher.Predictor(task, model, 2), shards, "teacher")
    labeled = list(records.read(written))
    for a, prediction in zip(labeled, predict(task, model, files), strict=True):
        assert a.origin == "pseudo" and not len(a.boxes)
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(a.mask))), prediction.classes
        )
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(a.confidence))), prediction.confidence
        )
        assert prediction.classes.shape == (a.height, a.width)


@pytest.fixture
def soft_file(tmp_path):
    """An image whose halves hold classes (0, 2) with (0.6, 0.2) and (1, 0) with (0.8, 0.2)."""
    rows = np.zeros((2, 40, 60), "uint8")
    classes, confidences = rows.copy(), rows + 51
    classes[0, :, 30:], classes[1, :, :30] = 1, 2
    confidences[0, :, :30], confidences[0, :, 30:] = 153, 204
    soft = image_record(
        mask=gray(classes[0]),
        confidence=gray(confidences[0]),
        runner_up_masks=gray(classes[1]),
        runner_up_confidences=gray(confidences[1]),
    )
    records.write(tmp_path / "soft.tfrecord", [soft])
    return str(tmp_path / "soft.tfrecord")


def first_labels(file, source, **changes):
    parse = make(**changes).parser(source)
    _, labels = next(iter(inputs.training_dataset([file], parse, 2, 0)))
    return labels


STILL = {"batch_size": 2, "jitter": (1.0, 1.0), "flip": False}


def test_soft_labels_by_hand(soft_file):
    labels = first_labels(soft_file, PseudoConfig(soft=True, **STILL), label_classes=2)
    assert labels["mask"].shape == (2, *SIZE, 4)
    inside = labels["mask"].numpy()[0, :85]
    np.testing.assert_array_equal(inside[10, 10], [0, 2, 153, 51])
    np.testing.assert_array_equal(inside[10, 120], [1, 0, 204, 51])
    task = make(label_classes=2)
    weights = np.array([1.0, 2.0, 3.0])
    logits = np.broadcast_to(np.log(weights / 6), (2, 32, 32, 3)).astype("float32")
    found = loss_of(task, {"logits": tf.constant(logits)}, labels)["total"]
    left = -(0.75 * np.log(1 / 6) + 0.25 * np.log(3 / 6))  # what was not stored is shared out
    right = -(0.8 * np.log(2 / 6) + 0.2 * np.log(1 / 6))
    np.testing.assert_allclose(found, (left + right) / 2, rtol=1e-5)
    assert float(task.label_density(labels)) == pytest.approx(85 / 128)
    confident = PseudoConfig(soft=True, score_threshold=0.7, **STILL)
    labels = first_labels(soft_file, confident, label_classes=2)
    found = loss_of(task, {"logits": tf.constant(logits)}, labels)["total"]
    np.testing.assert_allclose(found, right, rtol=1e-5)


@pytest.mark.parametrize("policy", ["S1", "S4"])
def test_soft_labels_move_like_hard_ones(soft_file, policy):
    source = {"batch_size": 2, "policy": policy, "magnitude": 4}
    for seed in range(3):
        hard, soft = (
            make(label_classes=2).parser(PseudoConfig(soft=soft, **source))
            for soft in (False, True)
        )
        (_, a), (_, b) = (
            next(iter(inputs.training_dataset([soft_file], parse, 2, seed)))
            for parse in (hard, soft)
        )
        np.testing.assert_array_equal(a["mask"], b["mask"][..., 0])
        inside = a["mask"].numpy() != 255
        sets = {tuple(row) for row in b["mask"].numpy()[inside]}
        assert sets <= {(0, 2, 153, 51), (1, 0, 204, 51)}


def test_teacher_stores_the_distribution(model, tmp_path):
    files = write_images(tmp_path, (64, 96))
    (hard,) = predict(make_labeler(), model, files)
    (soft,) = predict(make_labeler(label_classes=9), model, files)  # there are three
    np.testing.assert_array_equal(soft.classes, hard.classes)
    np.testing.assert_array_equal(soft.confidence, hard.confidence)
    classes = np.stack([soft.classes, *np.split(soft.runner_up_classes, 2)])
    assert (np.sort(classes, axis=0) == np.arange(3)[:, None, None]).all()
    confidences = np.stack([soft.confidence, *np.split(soft.runner_up_confidences, 2)]).astype(int)
    assert (np.diff(confidences, axis=0) <= 0).all()
    assert np.abs(confidences.sum(axis=0) - 255).max() <= 1
    (image,) = records.read(files)
    stored = make_labeler(label_classes=9).to_record(image, soft, "teacher")
    source = PseudoConfig(soft=True)
    make(label_classes=3).check_pseudo_record(stored, source)
    with pytest.raises(UserError, match="hold 3 of 3 classes per pixel; label again"):
        make(label_classes=2).check_pseudo_record(stored, source)
    with pytest.raises(UserError, match="hold 1 of 3 classes"):
        make(label_classes=2).check_pseudo_record(
            make_labeler().to_record(image, hard, "teacher"), source
        )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("loss_size", ["logits", "mask"])
def test_pixels_count_with_their_confidence(soft_file, soft, loss_size):
    source = PseudoConfig(soft=soft, score_weighting=True, **STILL)
    changes = {"label_classes": 2, "loss_size": loss_size}
    labels = first_labels(soft_file, source, **changes)
    assert labels["weights"].shape == (2, *SIZE) == labels["mask"].shape[:3]
    inside = labels["weights"].numpy()[0, :85]
    np.testing.assert_allclose([inside[10, 10], inside[10, 120]], [0.6, 0.8], rtol=1e-6)
    task = make(**changes)
    logits = np.broadcast_to(np.log(np.array([1.0, 2.0, 3.0]) / 6), (2, 32, 32, 3))
    outputs = {"logits": tf.constant(logits.astype("float32"))}
    left, right = -np.log(1 / 6), -np.log(2 / 6)
    if soft:
        left = 0.75 * left - 0.25 * np.log(3 / 6)
        right = 0.8 * right - 0.2 * np.log(1 / 6)
    found = loss_of(task, outputs, labels)["total"]
    np.testing.assert_allclose(found, (0.6 * left + 0.8 * right) / 1.4, rtol=1e-5)
    plain = first_labels(soft_file, PseudoConfig(soft=soft, **STILL), **changes)
    assert list(plain) == ["mask"] and (plain["mask"].numpy() == labels["mask"].numpy()).all()
    count = task.loss_sums(outputs, labels)[1] / task.loss_sums(outputs, plain)[1]
    np.testing.assert_allclose(count, 0.7, rtol=1e-5)
    ones = {**labels, "weights": tf.ones_like(labels["weights"])}
    np.testing.assert_allclose(
        loss_of(task, outputs, ones)["total"], loss_of(task, outputs, plain)["total"], rtol=1e-6
    )


def test_what_the_student_reads_of_a_mask():
    mask, confidence = [[0, 1, 2, 255]], [[200, 100, 153, 255]]
    pseudo = image_record(1, 4, mask=gray(mask), confidence=gray(confidence), origin="pseudo")
    kept = make().kept(pseudo, PseudoConfig(class_thresholds={2: 0.6, 1: 0.3}))
    assert np.asarray(Image.open(io.BytesIO(kept.mask))).tolist() == [[0, 1, 2, 255]]
    kept = make().kept(pseudo, PseudoConfig(score_threshold=0.61))
    assert np.asarray(Image.open(io.BytesIO(kept.mask))).tolist() == [[0, 255, 255, 255]]


def test_tally_by_hand():
    classes, confidence = [[0, 0, 1, 1], [0, 1, 1, 2]], [[250, 100, 128, 127], [128, 200, 10, 60]]
    pseudo = image_record(2, 4, mask=gray(classes), confidence=gray(confidence))
    truth = image_record(2, 4, mask=gray([[0, 1, 1, 1], [1, 1, 255, 2]]))
    tally = MaskLabelStatistics(PseudoConfig(), 3, {0: "sky", 1: "road", 2: "car"})
    tally.add(pseudo, truth)
    result = tally.result()
    # Kept, from 128 on: sky 250 and 128, road 128 and 200.
    assert (result["pixels"], result["ignored_share"]) == (4, 0.5)
    assert result["pixels_per_class"] == {"sky": 2, "road": 2}
    assert result["warnings"] == ["no pixel is left of 1 classes that were found: car"]
    # Kept pixels: sky 1 of 2 right, road 2 of 3.
    assert result["mIoU"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # All: sky 1 of 3, road 3 of 5, car 1 of 1.
    assert result["mIoU_all"] == pytest.approx((1 / 3 + 3 / 5 + 1) / 3)
    assert sum(result["score_histogram"]) == 8
    rows = dict(make().label_rows(result))
    assert rows["pixels ignored (below 0.5)"] == "50.0%" and rows["sky"] == "50.0% of pixels"


def test_thresholds_that_keep_nothing_are_an_error(tmp_path):

    files = [str(tmp_path / "p.tfrecord"), str(tmp_path / "t.tfrecord")]
    records.write(files[0], [image_record(confidence=mask_png(40, 60, 200))])
    records.write(files[1], [image_record(mask=b"")])
    with pytest.raises(UserError, match="the threshold 0.9 keeps no pixel of 1 images"):
        label_statistics(
            MaskLabelStatistics(PseudoConfig(score_threshold=0.9), 3), files[:1], files[1:]
        )
    result = label_statistics(MaskLabelStatistics(PseudoConfig(), 3), files[:1], files[1:])
    assert "mIoU" not in result and result["ignored_share"] == 0


def test_make_task_chooses_by_kind():
    assert isinstance(make_task(SegmentationConfig(**SMALL)), SegmentationTask)
    assert make_task(SegmentationConfig(**SMALL), labeling=True).scales.scales[0] == 0.5


# --- Masks that the task cannot use, or that call for a second look --------------------------


@pytest.mark.parametrize(
    ("changes", "message", "in_graph"),
    [
        ({"mask": b""}, "odd.png has no mask", "an image has no mask"),
        ({"mask": mask_png(40, 60, 3)}, "odd.png has the class id 3, but", "beyond"),
        ({"mask": mask_png(40, 60, 254)}, "odd.png has the class id 254, but", "beyond"),
    ],
)
def test_masks_that_the_task_cannot_use_name_the_record(tmp_path, changes, message, in_graph):
    task, odd = make(), image_record(name="odd.png", **changes)
    task.check_record(image_record(mask=mask_png(40, 60, 255)))
    with pytest.raises(UserError, match=message):
        task.check_record(odd)
    with pytest.raises(UserError, match=message):
        MaskLabelStatistics(PseudoConfig(), 3).add(odd, odd)
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [odd])
    with pytest.raises(UserError, match=message):
        inputs.find_bad_record([file], task.check_record)
    parse = task.parser(InputConfig())
    with pytest.raises(tf.errors.InvalidArgumentError, match=in_graph):
        next(iter(inputs.training_dataset([file], parse, 1, 0)))


def test_pseudo_masks_without_confidence_and_truth_of_other_classes_are_told():
    tally, plain = MaskLabelStatistics(PseudoConfig(), 3), image_record()
    with pytest.raises(UserError, match="a mask without confidences"):
        tally.add(plain, plain)
    pseudo = image_record(confidence=mask_png(40, 60, 200))
    with pytest.raises(UserError, match="b.png has the class id 9"):
        tally.add(pseudo, image_record(name="b.png", mask=mask_png(40, 60, 9)))


@pytest.mark.parametrize(
    ("threshold", "confidence", "num_classes", "warned"),
    [(0.5, 130, 2, True), (0.5, 255, 3, True), (0.5, 100, 3, False), (0.0, 100, 2, False)],
)
def test_a_threshold_that_ignores_nothing_is_a_warning(threshold, confidence, num_classes, warned):
    tally = MaskLabelStatistics(PseudoConfig(score_threshold=threshold), num_classes)
    tally.add(image_record(confidence=mask_png(40, 60, confidence)), image_record(mask=b""))
    warnings = [w for w in tally.result()["warnings"] if "ignores no pixel" in w]
    assert bool(warnings) == warned
    if warned:
        assert ("of 2 classes one always has that much" in warnings[0]) == (num_classes == 2)


def test_masks_that_starve_a_class_are_a_warning():
    human = np.zeros((40, 60), "uint8")
    human[:8] = 1  # a fifth
    pseudo = np.zeros((40, 60), "uint8")
    pseudo[0] = 1
    tally = MaskLabelStatistics(PseudoConfig(), 2, {1: "nucleus"}, [image_record(mask=gray(human))])
    found = image_record(mask=gray(pseudo), confidence=mask_png(40, 60, 200))
    tally.add(found, image_record(mask=b""))
    (warning,) = [w for w in tally.result()["warnings"] if "nucleus" in w]
    assert warning.startswith("class nucleus has 2.5% of the pseudo labels, but 20.0% of the human")

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import concatenate_levels, load

from official_selftrain.applications.layers import BilinearUpsample
from official_selftrain.ops import losses
from official_selftrain.ops.losses import segmentation_loss_sum


def test_focal_loss_by_hand():
    # p = 0.5: CE = ln 2, modulator 0.5^2.
    np.testing.assert_allclose(
        losses.focal_loss(np.zeros(2, "float32"), np.array([1.0, 0.0], "float32"), gamma=2.0),
        [0.25 * 0.25 * np.log(2), 0.75 * 0.25 * np.log(2)],
        rtol=1e-6,
    )


def test_focal_loss_of_extreme_logits_is_alpha_times_the_logit():
    logits = np.array([-1e4, 1e4, -1e4, 1e4], "float32")
    values = losses.focal_loss(logits, np.array([1, 1, 0, 0], "float32"), alpha=0.25, gamma=1.5)
    np.testing.assert_allclose(values, [0.25 * 1e4, 0, 0, 0.75 * 1e4], rtol=1e-6)


def test_huber_loss_by_hand():
    # Below delta: 0.5 * 0.05^2; above: 0.1 * 0.3 - 0.5 * 0.1^2.
    np.testing.assert_allclose(
        losses.huber_loss(np.array([0.05, -0.3]), np.zeros(2), 0.1), [0.00125, 0.025], rtol=1e-5
    )


def test_focal_elements_equal_release(golden):
    case = load(golden / "losses/focal_elementwise.npz")
    ours = losses.focal_loss(
        case["logits"], case["targets"], alpha=float(case["alpha"]), gamma=float(case["gamma"])
    )
    np.testing.assert_allclose(ours / case["normalizer"], case["loss"], rtol=1e-5)


def loss_case(golden):
    case = load(golden / "losses/retinanet_loss.npz")
    classes = int(case["num_classes"])
    logits = keras.ops.convert_to_tensor(concatenate_levels(case, "cls_outputs", classes))
    deltas = keras.ops.convert_to_tensor(concatenate_levels(case, "box_outputs", 4))
    class_targets = concatenate_levels(case, "cls_targets", 1)[..., 0]
    box_targets = concatenate_levels(case, "box_targets", 4)
    return case, classes, logits, deltas, class_targets, box_targets


@pytest.mark.parametrize(("tag", "gamma"), [("default", 1.5), ("gamma2", 2.0)])
def test_detection_loss_equals_release(tag, gamma, golden):
    case, _, logits, deltas, class_targets, box_targets = loss_case(golden)
    normalizer = 1 + case["num_positives"].sum()
    class_sum, box_sum = losses.detection_loss_sums(
        logits, deltas, class_targets, box_targets, gamma=gamma
    )
    class_loss, box_loss = class_sum / normalizer, box_sum / (4 * normalizer)
    np.testing.assert_allclose(class_loss, case[f"cls_loss_{tag}"], rtol=1e-5)
    np.testing.assert_allclose(box_loss, case[f"box_loss_{tag}"], rtol=1e-5)
    np.testing.assert_allclose(class_loss + 50 * box_loss, case[f"model_loss_{tag}"], rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="uses a gradient tape")
def test_detection_loss_gradients_equal_release(golden):
    import tensorflow as tf

    case, classes, logits, deltas, class_targets, box_targets = loss_case(golden)
    normalizer = 1 + case["num_positives"].sum()
    with tf.GradientTape() as tape:
        tape.watch([logits, deltas])
        class_sum, box_sum = losses.detection_loss_sums(logits, deltas, class_targets, box_targets)
        loss = class_sum / normalizer + 50 * box_sum / (4 * normalizer)
    for key, depth, gradient in zip(
        ("grad_cls", "grad_box"), (classes, 4), tape.gradient(loss, [logits, deltas]), strict=True
    ):
        np.testing.assert_allclose(gradient, concatenate_levels(case, key, depth), atol=1e-6)


def test_segmentation_loss_equals_release(golden):
    case = load(golden / "losses/segmentation_loss.npz")
    labels = case["labels"][..., 0].astype("int32")
    small = labels[:, ::4, ::4]  # bilinear without half-pixel centers
    upsample = BilinearUpsample(4)
    results = {
        "pascal_config": segmentation_loss_sum(case["logits"], small),
        "groundtruth_dimension": segmentation_loss_sum(upsample(case["logits"]), labels),
        "label_smoothing_0.1": segmentation_loss_sum(case["logits"], small, label_smoothing=0.1),
        "class_weights": segmentation_loss_sum(
            case["logits"], small, class_weights=case["class_weights"]
        ),
    }
    for name, (total, count) in results.items():
        np.testing.assert_allclose(total / count, case[f"loss_{name}"], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["pascal_config", "groundtruth_dimension"])
def test_segmentation_gradient_equals_release(name, golden):
    case = load(golden / "losses/segmentation_loss.npz")
    labels = case["labels"][..., 0].astype("int32")
    logits = tf.constant(case["logits"])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        if name == "pascal_config":
            total, count = segmentation_loss_sum(logits, labels[:, ::4, ::4])
        else:
            total, count = segmentation_loss_sum(BilinearUpsample(4)(logits), labels)
        loss = total / count
    np.testing.assert_allclose(tape.gradient(loss, logits), case[f"grad_{name}"], atol=1e-6)


def test_segmentation_without_a_labeled_pixel_is_zero():
    total, count = segmentation_loss_sum(np.ones((1, 2, 2, 3), "float32"), np.full((1, 2, 2), 255))
    assert float(total) == float(count) == 0

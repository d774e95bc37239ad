"""Exported files, run by what would run them: TensorFlow alone, LiteRT and ONNX Runtime."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from official_selftrain import config as config_lib
from official_selftrain import serving
from official_selftrain.applications.efficientnet import preprocess_input
from official_selftrain.errors import UserError
from official_selftrain.models import build_model
from official_selftrain.tasks.detection import DetectionTask

SIZE = (128, 256)
SPINENET = {"endpoint_filters": 8, "filter_size_scale": 0.125}


@pytest.fixture(scope="module")
def detector():
    config = config_lib.DetectionConfig(
        num_classes=3,
        image_size=SIZE,
        backbone_sizes=SPINENET,
        head_convs=1,
        head_filters=8,
        nms={"max_detections": 7},
    )
    model = build_model(config)
    predict = model.get_layer("retinanet.class_net.class-predict")
    kernel = np.random.default_rng(0).standard_normal(predict.kernel.shape) * 0.3
    predict.set_weights([kernel, np.zeros(predict.bias.shape)])  # scores worth suppressing
    return model, config


@pytest.fixture(scope="module")
def segmenter():
    config = config_lib.SegmentationConfig(
        num_classes=3,
        image_size=SIZE,
        backbone="efficientnet-b0",
        backbone_sizes={"width": 0.1},
        neck_filters=8,
        neck_repeats=1,
        head_convs=1,
    )
    model = build_model(config)
    classify = model.get_layer("segmentation.conv2d")
    kernel = np.random.default_rng(0).standard_normal(classify.kernel.shape)
    classify.set_weights([kernel, np.zeros(3)])
    return model, config


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), "uint8")


def encoded(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def saved_detector(detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    assert serving.save_model(*detector, folder) < 1e-3
    return folder


RUN_ALONE = """
import sys
import numpy as np
import tensorflow as tf
saved = tf.saved_model.load(sys.argv[1])
images = [open(path, "rb").read() for path in sys.argv[3:]]
outputs = saved.signatures["serving_default"](image_bytes=tf.constant(images))
np.savez(sys.argv[2], **{name: value.numpy() for name, value in outputs.items()})
assert "official_selftrain" not in sys.modules
"""


def run_alone(folder, images, tmp_path):
    """Outputs of a SavedModel in a process that has TensorFlow only."""
    paths = []
    for index, image in enumerate(images):
        paths.append(tmp_path / f"{index}.image")
        paths[-1].write_bytes(image)
    arguments = [sys.executable, "-c", RUN_ALONE, folder, tmp_path / "outputs.npz", *paths]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "outputs.npz", allow_pickle=True) as outputs:  # strings are objects
        return dict(outputs)


def test_detections_of_png_and_jpeg_equal_the_model(detector, saved_detector, tmp_path):
    model, config = detector
    images = [encoded(noise(90, 200), "PNG"), encoded(noise(200, 90), "JPEG")]
    found = run_alone(saved_detector, images, tmp_path)
    assert found["detection_boxes"].shape == (2, 7, 4)
    assert found["num_detections"].dtype == found["detection_classes"].dtype == np.int32
    task = DetectionTask(config)
    parse = task.parser()
    for index, image in enumerate(images):
        pixels = tf.io.decode_image(image, channels=3, expand_animations=False)
        example = {
            "image": pixels,
            "boxes": tf.zeros([0, 4]),
            "classes": tf.zeros([0], tf.int32),
            "scores": tf.zeros([0]),
        }
        inputs, labels = parse(example, None)
        info = labels["image_info"][None]
        arrays = task.predict(model, inputs[None], {"image_info": info})
        wanted = task.predictions(arrays, 1)[0]
        height, width = pixels.shape[:2]
        count = len(wanted.scores)
        assert found["num_detections"][index] == count > 0
        boxes = wanted.boxes * [height, width, height, width]
        np.testing.assert_allclose(found["detection_boxes"][index, :count], boxes, atol=1e-2)
        np.testing.assert_allclose(
            found["detection_scores"][index, :count], wanted.scores, atol=1e-5
        )
        np.testing.assert_array_equal(found["detection_classes"][index, :count], wanted.classes)
        np.testing.assert_array_equal(found["image_info"][index], info[0])


def test_all_signatures_give_the_same_detections(saved_detector):
    signatures = tf.saved_model.load(str(saved_detector)).signatures
    image = noise(60, 100)
    example = tf.train.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(encoded(image, "PNG"))
    answers = [
        signatures["image_bytes"](image_bytes=tf.constant([encoded(image, "PNG")])),
        signatures["tf_example"](tf_example=tf.constant([example.SerializeToString()])),
        signatures["image_tensor"](image_tensor=tf.constant(image[None])),
    ]
    for answer in answers[1:]:
        for name, value in answer.items():
            np.testing.assert_allclose(value, answers[0][name], atol=1e-4, err_msg=name)


def test_fixed_batch_and_no_suppression(detector, tmp_path):
    model, config = detector
    assert serving.save_model(model, config, tmp_path, batch_size=2, nms="none") < 1e-3
    signature = tf.saved_model.load(str(tmp_path)).signatures["raw_image_tensor"]
    images = np.random.default_rng(3).standard_normal((2, *SIZE, 3)).astype("float32")
    raw = signature(raw_image_tensor=tf.constant(images))
    anchors = 9 * sum((128 >> level) * (256 >> level) for level in range(3, 8))
    assert raw["raw_boxes"].shape == (2, anchors, 1, 4)
    assert raw["raw_scores"].shape == (2, anchors, 2)
    outputs = model(images, training=False)
    np.testing.assert_allclose(raw["raw_encoded_boxes"], outputs["box_deltas"], atol=1e-4)
    scores = tf.sigmoid(outputs["class_logits"])[..., 1:]
    np.testing.assert_allclose(raw["raw_scores"], scores, atol=1e-5)


def test_class_maps_have_the_size_of_their_images(segmenter, tmp_path):
    model, config = segmenter
    assert serving.save_model(model, config, tmp_path / "model") == 0
    images = [noise(100, 100), noise(60, 300), noise(*SIZE)]
    found = run_alone(tmp_path / "model", [encoded(x, "PNG") for x in images], tmp_path)
    for index, image in enumerate(images):
        category, score = (
            np.asarray(Image.open(io.BytesIO(found[name][index])))
            for name in ("category_bytes", "score_bytes")
        )
        assert category.shape == score.shape == image.shape[:2]
        assert set(np.unique(category)) <= {0, 1, 2} and len(np.unique(category)) > 1
        assert score.min() >= 255 // 3  # the likeliest of three classes
    # Without half-pixel centres, every fourth pixel is a pixel of the logits.
    logits = model(preprocess_input(images[2][None].astype("float32")), training=False)["logits"]
    np.testing.assert_array_equal(category[::4, ::4], np.argmax(logits[0], axis=-1))


def test_onnx_runtime_gives_the_outputs_of_the_model(detector, tmp_path):
    import onnxruntime

    model, _ = detector
    serving.save_network(model, tmp_path / "new" / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "new" / "model.onnx")
    images = np.random.default_rng(4).standard_normal((2, *SIZE, 3)).astype("float32")
    outputs = session.run(None, {session.get_inputs()[0].name: images})
    expected = model(images, training=False)
    assert len(outputs) == len(expected) == 2
    for value in outputs:  # the converter renames them
        wanted = expected["box_deltas" if value.shape[-1] == 4 else "class_logits"]
        np.testing.assert_allclose(value, wanted, atol=1e-3)


def test_tflite_gives_the_outputs_of_the_model(segmenter, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model, _ = segmenter
    serving.save_network(model, tmp_path / "model.tflite", "tflite", batch_size=1)
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    images = np.random.default_rng(5).standard_normal((1, *SIZE, 3)).astype("float32")
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
    interpreter.invoke()
    output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    expected = np.asarray(model(images, training=False)["logits"])
    assert np.abs(output - expected).max() < 1e-3 * expected.std() + 1e-5


def test_missing_converter_names_the_extra(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs tf2onnx and onnx.*\[export\]"):
        serving.save_network(detector[0], tmp_path / "m.onnx", "onnx")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=x"], "say what to run"),
        (["--experiment=demo", "--model_dir=nowhere"], "give --output"),
        (["--experiment=demo", "--output=x", "--weights=nowhere.h5"], "classes.json is missing"),
        (["--experiment=coco_spinenet49", "--output=x", "--weights=no.h5"], "no weights at no.h5"),
        (
            ["--experiment=coco_spinenet49", "--output=x", "--weights=no", "--image_size=big"],
            "--image_size takes SIDE or HEIGHT,WIDTH",
        ),
    ],
)
def test_wrong_commands_are_answered_in_one_line(flags, message, tmp_path):
    command = [sys.executable, "-m", "official_selftrain.export", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr

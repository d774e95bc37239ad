"""Exported files, run by what would run them: TensorFlow alone, LiteRT and ONNX Runtime."""

import importlib
import io
import logging
import struct
import subprocess
import sys
import types

import absl.logging
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from official_selftrain import config as config_lib
from official_selftrain import export
from official_selftrain.applications.efficientnet import preprocess_input
from official_selftrain.conversion import exif, serving
from official_selftrain.tasks import make_task
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.utils.errors import UserError

SIZE = (128, 256)


@pytest.fixture(scope="module")
def detector():
    config = config_lib.DetectionConfig(
        num_classes=3,
        image_size=SIZE,
        backbone="resnet10",
        neck="fpn",
        neck_filters=8,
        head_convs=1,
        head_filters=8,
        nms={"max_detections": 7},
    )
    model = make_task(config).build_model()
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
        backbone_sizes={"width": 0.1, "depth": 0.3},
        neck_filters=8,
        neck_repeats=1,
        head_convs=1,
    )
    model = make_task(config).build_model()
    classify = model.get_layer("segmentation.conv2d")
    kernel = np.random.default_rng(0).standard_normal(classify.kernel.shape)
    classify.set_weights([kernel, np.zeros(3)])
    return model, config


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), "uint8")


def encoded(image, kind, orientation=None):
    exif = Image.Exif()
    exif[0x010F] = "a camera, whose name is stored beside the directory"
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, exif=exif)
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


def test_all_signatures_give_the_same_detections_of_a_turned_photo(saved_detector):
    signatures = tf.saved_model.load(str(saved_detector)).signatures
    photo = encoded(noise(60, 100), "PNG", orientation=6)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(photo))))
    example = tf.train.Example()
    example.features.feature["image/encoded"].bytes_list.value.append(photo)
    answers = [
        signatures["image_bytes"](image_bytes=tf.constant([photo])),
        signatures["tf_example"](tf_example=tf.constant([example.SerializeToString()])),
        signatures["image_tensor"](image_tensor=tf.constant(shown[None])),
    ]
    np.testing.assert_array_equal(answers[0]["image_info"][0, 0], [100, 60])
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
    # Without half-pixel centers, every fourth pixel is a pixel of the logits.
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


# --- EXIF orientation ------------------------------------------------------------------------

PHOTO = noise(16, 24)


@pytest.fixture(scope="module")
def decode():
    return tf.function(serving._decode, [tf.TensorSpec([], tf.string)], autograph=False)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("JPEG", 3)])
def test_images_are_turned_as_pillow_turns_them(decode, kind, tolerance, orientation):
    photo = encoded(PHOTO, kind, orientation)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(photo))))
    found = decode(photo).numpy()
    assert found.shape == shown.shape == ((24, 16, 3) if 5 <= orientation <= 8 else (16, 24, 3))
    # Two JPEG decoders differ by rounding; noise that is turned another way differs by 85.
    assert np.abs(found.astype(int) - shown).mean() <= tolerance


def jpeg(*segments):
    """A JPEG of 16 x 24 pixels with application segments before its own."""
    plain = encoded(PHOTO, "JPEG")
    added = b"".join(struct.pack(">BBH", 255, m, len(s) + 2) + s for m, s in segments)
    return plain[:2] + added + plain[2:]


def tiff(*entries, order="<", head=None):
    """An EXIF segment with directory entries (tag, kind, count, value)."""
    head = head or {"<": b"II*\0", ">": b"MM\0*"}[order]
    rows = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + rows + bytes(4)


SHORT_6 = (274, 3, 1, b"\6\0\0\0")
XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>\xff'


@pytest.mark.parametrize(
    ("segments", "turned"),
    [
        ([(0xE1, tiff(SHORT_6))], True),
        ([(0xE1, tiff((274, 3, 1, b"\0\6\0\0"), order=">"))], True),
        ([(0xE1, tiff((274, 4, 1, b"\6\0\0\0")))], True),
        ([(0xE0, b"JFIF" + bytes(10)), (0xE2, bytes(3000)), (0xE1, tiff(SHORT_6))], True),
        ([(0xFE, b"Exif\0\0 and FFDA: \xff\xda"), (0xE1, tiff(SHORT_6))], True),
        ([(0xE1, XMP % 1), (0xE1, tiff(SHORT_6))], True),
        ([(0xE1, XMP % 6)], True),
        ([(0xE1, tiff((274, 3, 1, b"\1\0\0\0"))), (0xE1, XMP % 6)], False),
        ([(0xE1, XMP % 0)], False),
        ([(0xED, tiff(SHORT_6))], False),  # not an EXIF segment
        ([(0xE1, tiff((274, 2, 1, b"\6\0\0\0")))], False),  # text
        ([(0xE1, tiff((274, 3, 2, b"\6\0\6\0")))], False),
        ([(0xE1, tiff((274, 3, 1, b"\xff\xff\0\0")))], False),
        ([(0xE1, tiff((275, 3, 1, b"\6\0\0\0")))], False),
        ([(0xE1, tiff(SHORT_6, head=b"ABCD"))], False),
        ([(0xE1, tiff(SHORT_6)[:24])], False),  # cut
        ([(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")], False),  # a directory far away
        ([(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff")], False),  # of 65,535 entries
        ([(0xE1, b"Exif\0\0")], False),
        ([(0xE1, b"")], False),
    ],
)
def test_orientations_in_odd_and_damaged_segments(decode, segments, turned):
    image = jpeg(*segments)
    assert decode(image).shape == ((24, 16, 3) if turned else (16, 24, 3))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\neXIfII*\0", b"GIF89a"],
)
def test_bytes_that_end_early_have_no_orientation(data):
    assert int(exif.exif_orientation(data)) == 1


# --- What is refused, and what is left behind ------------------------------------------------


@pytest.mark.parametrize("problem", [ModuleNotFoundError("none", name="onnx"), OSError("x.so")])
def test_missing_and_broken_converters_name_the_extra(detector, tmp_path, monkeypatch, problem):
    def fail(name):
        raise problem

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UserError, match=r"writing onnx needs the extra.*\[export\]"):
        serving.save_network(detector[0], tmp_path / "m.onnx", "onnx")


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("kernel", np.nan, "the weights .*kernel are not finite"),
        ("bias", np.inf, "the weights .*bias are not finite"),
        ("moving_variance", -1.0, "the output .* of the network is not finite"),
    ],
)
def test_networks_that_are_not_finite_are_refused(detector, tmp_path, leaf, value, message):
    model, config = detector
    variable = next(v for v in reversed(model.weights) if v.name == leaf)
    before = np.array(variable)
    variable.assign(np.full(before.shape, value))
    try:
        with pytest.raises(UserError, match=message):
            serving.save_model(model, config, tmp_path / "model")
        with pytest.raises(UserError, match=message):
            serving.save_network(model, tmp_path / "model.onnx", "onnx")
    finally:
        variable.assign(before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", [0, 1])
def test_the_comparison_sees_nan(position, monkeypatch):
    """A NaN is seen wherever it is among the outputs."""
    values = [tf.constant([1.0]), tf.constant([2.0])]
    saved = dict(zip("ab", values, strict=True))
    values[position] = tf.constant([np.nan])

    loaded = types.SimpleNamespace(signatures={"raw_image_tensor": lambda raw_image_tensor: saved})
    monkeypatch.setattr(tf.saved_model, "load", lambda folder: loaded)
    difference = serving._difference(lambda x: dict(zip("ab", values, strict=True)), "x", [1])
    assert np.isnan(difference)


def test_what_writers_say_of_names_is_kept_off_the_screen(caplog):
    caplog.set_level(logging.INFO)
    with serving._quiet():
        absl.logging.info("renamed to unknown_17")
        logging.getLogger("tf2onnx").info("renamed to unknown_18")
        logging.warning("a warning")
    logging.info("afterwards")
    assert [row.message for row in caplog.records] == ["a warning", "afterwards"]


def test_output_folders_and_files_are_not_mixed_up(tmp_path):
    (tmp_path / "export" / "variables").mkdir(parents=True)
    (tmp_path / "export" / "saved_model.pb").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for path, kind in [("new", "saved_model"), ("export", "saved_model"), ("a.onnx", "onnx")]:
        serving.check_output(tmp_path / path, kind)
    for path, kind, message in [
        ("photos", "saved_model", "holds 'a.jpg', which does not belong to an earlier"),
        ("export/saved_model.pb", "saved_model", "is a file; a SavedModel is a folder"),
        ("model.h5", "onnx", "the onnx file must end in .onnx"),
        ("model.onnx", "tflite", "the tflite file must end in .tflite"),
    ]:
        with pytest.raises(UserError, match=message):
            serving.check_output(tmp_path / path, kind)


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{}", '{"num_classes": "3"}', '{"num_classes": 1}', '{"num_classes": true}'],
)
def test_a_damaged_class_list_asks_for_the_number(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    config = config_lib.experiment_settings("demo")
    with pytest.raises(UserError, match=r"num_classes=N|is not valid JSON"):
        export.num_classes(config_lib.config_from_dict(config), tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=x"], "no experiment is given"),
        (["--experiment=demo", "--model_dir=nowhere"], "--output is required"),
        (["--experiment=demo", "--output=x", "--weights=nowhere.h5"], "classes.json is missing"),
        (["--experiment=coco_spinenet49", "--output=x", "--weights=no.h5"], "no weights at no.h5"),
        (
            ["--experiment=coco_spinenet49", "--output=x", "--weights=no", "--image_size=big"],
            "--image_size takes SIDE or HEIGHT,WIDTH",
        ),
        (
            ["--experiment=coco_spinenet49", "--output=x", "--weights=no", "--image_size=0"],
            "--image_size takes sides from 1 to 8192 pixels",
        ),
    ],
)
def test_wrong_commands_are_answered_in_one_line(flags, message, tmp_path):
    command = [sys.executable, "-m", "official_selftrain.export", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr

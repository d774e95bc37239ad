"""Trained networks as SavedModel, TFLite and ONNX files.

The SavedModel holds everything from encoded images to detections or class maps, with the input and
output names of the released code (reference section 22); the others hold the network alone.
"""

import contextlib
import logging
import pathlib

import numpy as np
import tensorflow as tf

from official_selftrain.config import changed
from official_selftrain.data.augmentation import geometry
from official_selftrain.ops import nms as nms_ops
from official_selftrain.utils import extras, files
from official_selftrain.utils.errors import UserError, one_line

SOFT_SIGMA = 0.3  # the paper's Soft-NMS
NMS = ("hard", "soft", "none")
SUFFIXES = {"tflite": ".tflite", "onnx": ".onnx"}
SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


class Detector:
    """Serving function of a detector.

    Outputs, for B images: `num_detections` `[B]` int32; `detection_boxes` `[B, D, 4]` as (ymin,
    xmin, ymax, xmax) in pixels of the original image, best first; `detection_classes` `[B, D]`
    int32; `detection_scores` `[B, D]`, -1 in unused slots. Without suppression instead `raw_boxes`
    `[B, R, 1, 4]`, `raw_scores` `[B, R, C - 1]` and `raw_encoded_boxes` `[B, R, 4]`.

    Args:
        model: a `RetinaNet`.
        config: its `config.DetectionConfig`.
        nms: one of `NMS`.
    """

    def __init__(self, model, config, nms="hard"):
        from official_selftrain.tasks.detection import DetectionTask

        sigma = SOFT_SIGMA if nms == "soft" else 0.0
        settings = changed(config.nms, soft_sigma=sigma)
        # Not `changed`: an exported network may be of a size that training refuses.
        self.task = DetectionTask(config.model_copy(update={"nms": settings}))
        self.model = model
        self.suppress = nms != "none"

    def __call__(self, images, info):
        size = tf.tile(info[:, 0], [1, 2])[:, None]
        if not self.suppress:
            outputs = self.model(images, training=False)
            boxes, scores = self.task.decode(outputs, info)
            boxes = tf.minimum(boxes / tf.tile(info[:, 2], [1, 2])[:, None], size)
            return {
                "raw_boxes": boxes[:, :, None],
                "raw_scores": scores,
                "raw_encoded_boxes": outputs["box_deltas"],
            }
        found = self.task.predict(self.model, images, {"image_info": info})
        used = tf.cast(found["scores"] > nms_ops.NO_SCORE, tf.int32)
        return {
            "num_detections": tf.reduce_sum(used, axis=-1),
            "detection_boxes": found["boxes"] * size,
            "detection_classes": found["classes"],
            "detection_scores": found["scores"],
        }


class ClassMap:
    """Serving function of a segmenter.

    Outputs, for B images: `category_bytes` `[B]`, PNG of the likeliest class of each pixel of the
    original image, and `score_bytes` `[B]`, PNG of 255 times its probability, rounded down.

    Args:
        model: a `Segmenter`.
        config: its `config.SegmentationConfig`.
    """

    def __init__(self, model, config):
        self.model = model
        self.size = config.image_size

    def __call__(self, images, info):
        logits = self.model(images, training=False)["logits"]
        logits = tf.raw_ops.ResizeBilinear(images=logits, size=self.size)
        png = tf.TensorSpec([], tf.string)
        return tf.map_fn(
            lambda pair: self._encode(*pair),
            (logits, info),
            fn_output_signature={"category_bytes": png, "score_bytes": png},
        )

    def _encode(self, logits, info):
        inside = tf.cast(tf.round(info[0] * info[2]), tf.int32)
        logits = logits[: inside[0], : inside[1]]
        size = tf.cast(info[0], tf.int32)
        logits = tf.raw_ops.ResizeBilinear(images=logits[None], size=size)[0]
        score = tf.reduce_max(tf.nn.softmax(logits), axis=-1)
        category = tf.argmax(logits, axis=-1)
        images = {"category_bytes": category, "score_bytes": tf.minimum(255.0 * score, 255.0)}
        return {
            name: tf.io.encode_png(tf.cast(image, tf.uint8)[..., None])
            for name, image in images.items()
        }


def save_model(model, config, folder, batch_size=None, nms="hard"):
    """Writes a SavedModel that TensorFlow alone can run, and compares it with the model.

    It appears in `folder` only when it is complete and has been compared; an earlier export there
    is replaced.

    Signatures, each also returning `image_info` `[B, 4, 2]` (original size, network size, scale per
    axis, offset): `image_bytes` (also `serving_default`), JPEG or PNG strings `[B]`; `tf_example`,
    serialized examples with `image/encoded` `[B]`; `image_tensor`, uint8 `[B, H, W, 3]` of any
    size; `raw_image_tensor`, float32 `[B, H, W, 3]`, normalized and of the network's size. The
    first two turn an image as its EXIF orientation says, and all sizes and boxes are of the image
    as it is shown; the others take pixels that have been turned.

    Args:
        model: the network.
        config: its task config.
        folder: where to write; made if missing.
        batch_size: B, None for any.
        nms: one of `NMS`, for detectors.

    Returns:
        The largest difference between the written file and the model on one image of noise.

    Raises:
        UserError: if `folder` holds anything else, or numbers of the network are not finite.
    """
    import keras

    check_output(folder, "saved_model")
    check_finite(model)
    size = tuple(model.input.shape[1:3])
    # Not `changed`: a network may be exported at a size that training refuses.
    config = config.model_copy(update={"image_size": size})
    segments = config.kind == "segmentation"
    serve = ClassMap(model, config) if segments else Detector(model, config, nms)

    # Traced once, however many signatures call it.
    @tf.function(
        input_signature=[
            tf.TensorSpec([batch_size, *size, 3]),
            tf.TensorSpec([batch_size, 4, 2]),
        ],
        autograph=False,
    )
    def answer(images, info):
        return {**serve(images, info), "image_info": info}

    archive = keras.export.ExportArchive()
    archive.track(model)
    signatures = _signatures(answer, size, batch_size)
    for name, (function, spec) in signatures.items():
        archive.add_endpoint(name, function, [spec])
    pathlib.Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(folder) as temporary, _quiet():
        archive.write_out(str(temporary), verbose=False)
        function = signatures["raw_image_tensor"][0]
        difference = _difference(function, str(temporary), [batch_size or 1, *size, 3])
        if not np.isfinite(difference):
            raise UserError(f"the written file returns numbers that are not finite; {NOT_FINITE}")
    return difference


def _signatures(answer, size, batch_size):
    """`{name: (function, its input)}`; `answer` takes prepared images and their `image_info`."""

    def prepare(image):
        info = geometry.plan_resize(tf.shape(image)[:2], size)
        return tf.ensure_shape(geometry.resize_image(image, info, size), [*size, 3]), info

    def prepared(inputs, decode):
        specs = (tf.TensorSpec([*size, 3]), tf.TensorSpec([4, 2]))
        return tf.map_fn(lambda x: prepare(decode(x)), inputs, fn_output_signature=specs)

    def from_bytes(images):
        return answer(*prepared(images, _decode))

    def from_examples(examples):
        return answer(*prepared(examples, _decode_example))

    def from_pixels(images):
        return answer(*prepared(images, lambda image: image))

    def from_prepared(images):
        info = tf.constant([size, size, (1.0, 1.0), (0.0, 0.0)], tf.float32)
        return answer(images, tf.tile(info[None], [tf.shape(images)[0], 1, 1]))

    def spec(shape, dtype, name):
        return tf.TensorSpec([batch_size, *shape], dtype, name=name)

    return {
        "serving_default": (from_bytes, spec([], tf.string, "image_bytes")),
        "image_bytes": (from_bytes, spec([], tf.string, "image_bytes")),
        "tf_example": (from_examples, spec([], tf.string, "tf_example")),
        "image_tensor": (from_pixels, spec([None, None, 3], tf.uint8, "image_tensor")),
        "raw_image_tensor": (from_prepared, spec([*size, 3], tf.float32, "raw_image_tensor")),
    }


def _decode(encoded):
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    return upright(tf.ensure_shape(image, [None, None, 3]), exif_orientation(encoded))


def _decode_example(serialized):
    feature = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
    return _decode(tf.io.parse_single_example(serialized, feature)["image/encoded"])


def _difference(function, folder, shape):
    """Largest difference between a function and the same signature of a SavedModel."""
    images = tf.constant(np.random.default_rng(0).standard_normal(shape), tf.float32)
    saved = tf.saved_model.load(str(folder)).signatures["raw_image_tensor"](raw_image_tensor=images)
    expected = function(images)
    differences = [0.0]
    for name, value in expected.items():
        if value.dtype == tf.string:
            differences.append(float(tf.reduce_any(value != saved[name])))
        else:
            distance = tf.abs(tf.cast(value, tf.float32) - tf.cast(saved[name], tf.float32))
            differences.append(float(tf.reduce_max(distance)))
    return float(np.max(differences))  # unlike max(), not finite where one of them is not


def save_network(model, file, kind, batch_size=None):
    """Writes the network alone, normalized images to raw outputs, as TFLite or ONNX.

    Args:
        model: the network.
        file: where to write.
        kind: "tflite" or "onnx".
        batch_size: None for any.

    Raises:
        UserError: if the converter is not installed or fails, or numbers of the network are not
            finite.
    """
    import keras

    check_output(file, kind)
    for module in {"tflite": ["ai_edge_litert"], "onnx": ["onnx", "tf2onnx"]}[kind]:
        extras.import_extra(module, "export", f"writing {kind}")
    check_finite(model)
    shape = (batch_size, *model.input.shape[1:])
    signature = [keras.InputSpec(shape=shape, dtype="float32", name="images")]
    format_ = {"tflite": "litert", "onnx": "onnx"}[kind]
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file, SUFFIXES[kind]) as temporary, _quiet():
        try:
            model.export(str(temporary), format=format_, input_signature=signature, verbose=False)
        except Exception as error:  # each converter raises its own
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            raise UserError(f"the network cannot be written as {kind}: {reason}") from None


# --- What is written, and where -----------------------------------------------------------------

NOT_FINITE = "did the training diverge? Take the weights of an earlier checkpoint"


def check_finite(model):
    """Checks the weights of a network, and its outputs for one image of noise.

    Raises:
        UserError: naming what is not finite (NaN or infinity).
    """
    for variable in model.weights:
        if not np.isfinite(np.asarray(variable)).all():
            raise UserError(f"the weights {variable.path} are not finite; {NOT_FINITE}")
    image = np.random.default_rng(0).standard_normal((1, *model.input.shape[1:]))
    for name, value in model(image.astype("float32"), training=False).items():
        if not np.isfinite(np.asarray(value)).all():
            raise UserError(f"the network returns {name} that are not finite; {NOT_FINITE}")


def check_output(path, kind):
    """Checks that nothing but an earlier export stands where one is to be written.

    Args:
        path: folder of a SavedModel, or file.
        kind: "saved_model", "tflite" or "onnx".

    Raises:
        UserError: if something else is there.
    """
    path = pathlib.Path(path)
    if kind != "saved_model":
        if path.suffix != SUFFIXES[kind]:
            raise UserError(f"the {kind} file must end in {SUFFIXES[kind]}; given {path}")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the {kind} file to write")
    elif path.is_dir():
        others = sorted({file.name for file in path.iterdir()} - SAVED_MODEL)
        if others:
            raise UserError(
                f"the folder {path} holds {others[0]!r}, which is not of an earlier export; give "
                "a new or an empty folder"
            )
    elif path.exists():
        raise UserError(f"{path} is a file; a SavedModel is a folder")


@contextlib.contextmanager
def _quiet():
    """Keeps what the writers say of names that they change, page after page, off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


# --- EXIF orientation ---------------------------------------------------------------------------


def upright(image, orientation):
    """An image `[H, W, 3]` turned as its EXIF orientation, 1 to 8, says."""

    def when(orientations, turn, image):
        asked = tf.reduce_any(orientation == tf.constant(orientations))
        return tf.cond(asked, lambda: turn(image), lambda: image)

    image = when([5, 6, 7, 8], lambda x: tf.transpose(x, [1, 0, 2]), image)
    image = when([2, 3, 6, 7], lambda x: tf.reverse(x, [1]), image)
    return when([3, 4, 7, 8], lambda x: tf.reverse(x, [0]), image)


def exif_orientation(encoded):
    """The EXIF orientation, int32 1 to 8, of JPEG or PNG bytes; 1 for none, or a damaged one.

    As in Pillow, an XMP packet of a JPEG file counts where EXIF says nothing.
    """
    is_png = tf.strings.substr(encoded, 0, 8) == b"\x89PNG\r\n\x1a\n"
    value = tf.cond(
        is_png, lambda: _orientation_in_png(encoded), lambda: _orientation_in_jpeg(encoded)
    )
    return tf.where((value >= 1) & (value <= 8), tf.cast(value, tf.int32), 1)


def _orientation_in_png(encoded):
    """0 for none. These four letters are not met by chance before a TIFF header."""
    parts = tf.strings.split(encoded, "eXIf", maxsplit=1)
    return _orientation_in_tiff(tf.concat([parts, [b""]], axis=0)[1])


def _orientation_in_jpeg(encoded):
    """The orientation in the first EXIF segment, else in the first XMP segment; 0 for none."""
    number, size = _reader(encoded)

    def before_the_pixels(place, exif, xmp):
        ends = tf.constant([0xD9, 0xDA], tf.int64)
        return (number(place, 1) == 0xFF) & ~tf.reduce_any(number(place + 1, 1) == ends)

    def step(place, exif, xmp):
        segment = (number(place, 2) == 0xFFE1) & (place + 4 < size)
        head = number(place + 4, 4)
        exif = tf.where(segment & (head == 0x45786966) & (exif == 0), place, exif)  # "Exif"
        xmp = tf.where(segment & (head == 0x68747470) & (xmp == 0), place, xmp)  # "http"
        length = tf.where(number(place + 1, 1) == 0xFF, -one, number(place + 2, 2))  # or padding
        return place + 2 + length, exif, xmp

    def content(place, skipped):
        start = tf.minimum(place + 4 + skipped, size)
        length = tf.maximum(number(place + 2, 2) - 2 - skipped, 0)
        return tf.where(place > 0, tf.strings.substr(encoded, start, length), b"")

    zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    start = tf.where(number(zero, 2) == 0xFFD8, 2 * one, size)
    _, exif, xmp = tf.while_loop(before_the_pixels, step, (start, zero, zero))
    value = _orientation_in_tiff(content(exif, 6))
    return tf.where(value > 0, value, _orientation_in_xmp(content(xmp, 0)))


def _orientation_in_tiff(tiff):
    """The value of tag 274 in the first directory of a TIFF, 0 without one."""
    number, size = _reader(tiff)
    head = tf.strings.substr(tiff, 0, 4)
    little = head == b"II*\0"
    directory = number(tf.constant(4, tf.int64), 4, little)
    count = tf.minimum(number(directory, 2, little), size // 12)
    entries = directory + 2 + 12 * tf.range(count)
    kind = number(entries + 2, 2, little)
    short, long = kind == 3, kind == 4
    found = (number(entries, 2, little) == 274) & (number(entries + 4, 4, little) == 1)
    found &= (short | long) & (entries + 12 <= size) & (little | (head == b"MM\0*"))
    values = tf.where(short, number(entries + 8, 2, little), number(entries + 8, 4, little))
    return tf.concat([[0], values[found]], axis=0)[-1]


def _orientation_in_xmp(packet):
    digit = tf.strings.regex_replace(packet, r"^\C*?tiff:Orientation(?:=\"|>)([0-9])\C*$", r"\1")
    number, size = _reader(digit)
    return tf.where(size == 1, number(tf.constant(0, tf.int64), 1) - ord("0"), 0)


def _reader(text):
    """A function (places, width, little endian) -> unsigned numbers int64, zero bytes beyond the
    end; and the length of the string."""
    size = tf.cast(tf.strings.length(text), tf.int64)
    data = tf.concat([tf.io.decode_raw(text, tf.uint8), [0]], axis=0)

    def number(places, width, little=False):
        at = tf.minimum(places[..., None] + tf.range(width, dtype=tf.int64), size)
        powers = 256 ** tf.range(width, dtype=tf.int64)
        powers = tf.where(little, powers, powers[::-1])
        return tf.reduce_sum(tf.cast(tf.gather(data, at), tf.int64) * powers, axis=-1)

    return number, size

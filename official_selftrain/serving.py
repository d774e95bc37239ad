"""Trained networks as SavedModel, TFLite and ONNX files.

The SavedModel holds everything from encoded images to detections or class maps, with the input and
output names of the released code (reference section 22); the others hold the network alone.
"""

import importlib.util
import logging
import pathlib

import numpy as np
import tensorflow as tf

from official_selftrain.data import augment
from official_selftrain.errors import UserError
from official_selftrain.ops import nms as nms_ops

SOFT_SIGMA = 0.3  # the paper's Soft-NMS
NMS = ("hard", "soft", "none")


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
        settings = config.nms.model_copy(update={"soft_sigma": sigma})
        self.task = DetectionTask(config, nms=settings)
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

    Signatures, each also returning `image_info` `[B, 4, 2]` (original size, network size, scale per
    axis, offset): `image_bytes` (also `serving_default`), JPEG or PNG strings `[B]`; `tf_example`,
    serialized examples with `image/encoded` `[B]`; `image_tensor`, uint8 `[B, H, W, 3]` of any
    size; `raw_image_tensor`, float32 `[B, H, W, 3]`, normalised and of the network's size.

    Args:
        model: the network.
        config: its task config.
        folder: where to write; made if missing.
        batch_size: B, None for any.
        nms: one of `NMS`, for detectors.

    Returns:
        The largest difference between the written file and the model on one image of noise.
    """
    import keras

    size = tuple(model.input.shape[1:3])
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
    archive.write_out(str(folder), verbose=False)
    return _difference(signatures["raw_image_tensor"][0], folder, [batch_size or 1, *size, 3])


def _signatures(answer, size, batch_size):
    """`{name: (function, its input)}`; `answer` takes prepared images and their `image_info`."""

    def prepare(image):
        info = augment.plan_resize(tf.shape(image)[:2], size)
        return tf.ensure_shape(augment.resize_image(image, info, size), [*size, 3]), info

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
    return tf.ensure_shape(image, [None, None, 3])


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
    return max(differences)


def save_network(model, file, kind, batch_size=None):
    """Writes the network alone, normalised images to raw outputs, as TFLite or ONNX.

    Args:
        model: the network.
        file: where to write.
        kind: "tflite" or "onnx".
        batch_size: None for any.

    Raises:
        UserError: if the converter is not installed.
    """
    import keras

    needed = {"tflite": ["ai_edge_litert"], "onnx": ["tf2onnx", "onnx"]}[kind]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"writing {kind} needs {' and '.join(missing)}: "
            'pip install "official_selftrain[export]"'
        )
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    shape = (batch_size, *model.input.shape[1:])
    signature = [keras.InputSpec(shape=shape, dtype="float32", name="images")]
    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    kind = {"tflite": "litert", "onnx": "onnx"}[kind]
    model.export(str(file), format=kind, input_signature=signature, verbose=False)

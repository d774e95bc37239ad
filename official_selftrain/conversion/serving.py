"""Writes trained networks as SavedModel, TFLite, and ONNX files.

A SavedModel computes everything from encoded images to detections or class maps, with the input and
output names of the released `models/official/detection/serving` in TensorFlow's TPU repository. The
other files hold only the network.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from official_selftrain.conversion.exif import exif_orientation, upright
from official_selftrain.data.augmentation import geometry
from official_selftrain.tasks import make_task
from official_selftrain.utils import extras, files
from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.types import StrPath, Tensor

if TYPE_CHECKING:
    import keras

SUFFIXES = {"tflite": ".tflite", "onnx": ".onnx"}
# What an export may replace; a folder with any other file is left alone.
SAVED_MODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


def save_model(
    model: keras.Model,
    config: Any,
    folder: StrPath,
    batch_size: int | None = None,
    nms: str = "hard",
) -> float:
    """Writes a SavedModel that needs only TensorFlow, and compares it with the model.

    It appears in `folder` only when it is complete and has been compared. An earlier export in
    `folder` is replaced.

    Inputs of the signatures:

    - `image_bytes` (also `serving_default`): JPEG or PNG files, strings `[B]`;
    - `tf_example`: serialized examples `[B]` with `image/encoded`;
    - `image_tensor`: uint8 `[B, H, W, 3]` of any size;
    - `raw_image_tensor`: float32 `[B, H, W, 3]`, normalized and of the network's size.

    The first two rotate images according to their EXIF orientation; sizes and boxes refer to the
    rotated image. For the other two the caller has to rotate the pixels. The outputs are those of
    `task.serving`, and `image_info` `[B, 4, 2]` as in `geometry.plan_resize`.

    Args:
        model: the network.
        config: its task config.
        folder: where to write; created if missing.
        batch_size: B, or None for any.
        nms: "hard", "soft", or "none"; for detectors.

    Returns:
        The largest difference between the written file and the model on one image of noise.

    Raises:
        UserError: if `folder` holds anything else, or if weights or outputs of the network are not
            finite.
    """
    import keras

    check_output(folder, "saved_model")
    check_finite(model)
    size = tuple(model.input.shape[1:3])
    # Not `changed`: a network may be exported at a size that training refuses.
    task = make_task(config.model_copy(update={"image_size": size}))
    answer = _answer(task.serving(model, nms), size, batch_size)
    # `model.export` writes the network only; decoding images needs signatures of our own.
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
            raise UserError(f"an output of the written file is not finite; {NOT_FINITE}")
    return difference


def _answer(serve, size, batch_size):
    """The outputs of prepared images, as a `tf.function`: all signatures share its one trace."""
    images, info = tf.TensorSpec([batch_size, *size, 3]), tf.TensorSpec([batch_size, 4, 2])
    return tf.function(
        lambda images, info: {**serve(images, info), "image_info": info},
        input_signature=[images, info],
        autograph=False,
    )


def _signatures(
    answer: Callable[[Tensor, Tensor], dict[str, Tensor]],
    size: tuple[int, int],
    batch_size: int | None,
) -> dict[str, tuple[Callable, tf.TensorSpec]]:
    """The signatures of a SavedModel.

    Args:
        answer: takes prepared images `[B, *size, 3]` and their `image_info` `[B, 4, 2]`.
        size: (height, width) of the network's input in pixels.
        batch_size: B, or None for any.

    Returns:
        `{name: (function, its input)}`.
    """

    def prepare(image):
        info = geometry.plan_resize(tf.shape(image)[:2], size)
        return tf.ensure_shape(geometry.resize_image(image, info, size), [*size, 3]), info

    def prepared(inputs, decode):
        # `map_fn`, because images have different sizes until they are resized.
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


def _difference(
    function: Callable[[Tensor], dict[str, Tensor]], folder: StrPath, shape: list[int]
) -> float:
    """Largest difference between a function and `raw_image_tensor` of a SavedModel.

    Strings that are not equal count as a difference of 1.
    """
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
    return float(np.max(differences))  # unlike max(), NaN if one of them is


def save_network(
    model: keras.Model, file: StrPath, kind: str, batch_size: int | None = None
) -> None:
    """Writes only the network, from normalized images to raw outputs, as TFLite or ONNX.

    Args:
        model: the network.
        file: where to write.
        kind: "tflite" or "onnx".
        batch_size: number of images per call, or None for any.

    Raises:
        UserError: if the converter is not installed or fails, or if weights or outputs of the
            network are not finite.
    """
    import keras

    check_output(file, kind)
    for module in {"tflite": ["ai_edge_litert"], "onnx": ["onnx", "tf2onnx"]}[kind]:
        extras.import_extra(module, "export", f"writing {kind}")
    check_finite(model)
    shape = (batch_size, *model.input.shape[1:])
    signature = [keras.InputSpec(shape=shape, dtype="float32", name="images")]
    # Keras calls the format by the name of its new runtime.
    format_ = {"tflite": "litert", "onnx": "onnx"}[kind]
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file, SUFFIXES[kind]) as temporary, _quiet():
        try:
            model.export(str(temporary), format=format_, input_signature=signature, verbose=False)
        except Exception as error:  # each converter raises its own
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            raise UserError(f"cannot convert the network to {kind}: {reason}") from None


# --- What is written, and where -----------------------------------------------------------------

NOT_FINITE = "the training may have diverged; use the weights of an earlier checkpoint"


def check_finite(model: keras.Model) -> None:
    """Checks that the weights of a network, and its outputs for one image of noise, are finite.

    Raises:
        UserError: naming the first weights or output that hold NaN or infinity.
    """
    for variable in model.weights:
        if not np.isfinite(np.asarray(variable)).all():
            raise UserError(f"the weights {variable.path} are not finite; {NOT_FINITE}")
    # Finite weights can give NaN, such as the root of a negative variance.
    image = np.random.default_rng(0).standard_normal((1, *model.input.shape[1:]))
    for name, value in model(image.astype("float32"), training=False).items():
        if not np.isfinite(np.asarray(value)).all():
            raise UserError(f"the output {name} of the network is not finite; {NOT_FINITE}")


def check_output(path: StrPath, kind: str) -> None:
    """Checks that writing an export to `path` overwrites nothing but an earlier export.

    Args:
        path: folder of a SavedModel, or a file.
        kind: "saved_model", "tflite", or "onnx".

    Raises:
        UserError: if `path` holds something else, or has the wrong suffix.
    """
    path = pathlib.Path(path)
    if kind != "saved_model":
        if path.suffix != SUFFIXES[kind]:
            raise UserError(f"the {kind} file must end in {SUFFIXES[kind]}; given {path}")
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected the {kind} file to write")
    elif path.is_dir():
        others = sorted({file.name for file in path.iterdir()} - SAVED_MODEL)
        if others:
            raise UserError(
                f"the folder {path} holds {others[0]!r}, which does not belong to an earlier "
                "export; give a new or an empty folder"
            )
    elif path.exists():
        raise UserError(f"{path} is a file; a SavedModel is a folder")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the converters' messages, which are pages of renamed layers."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)

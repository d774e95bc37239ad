"""`ImageRecord`, and its form on disk: the only place that knows TFRecord feature names.

The names are those of the released code (and of Model Garden, which kept them), plus
`image/filename`, `image/origin`, `image/dataset`, `image/teacher`, `image/object/score`,
`image/segmentation/class/confidence` and `image/segmentation/next/...`.
"""

import dataclasses
import io
import os
import pathlib

import numpy as np
from PIL import Image

from official_selftrain.errors import UserError
from official_selftrain.files import replace, temporary_name

LARGEST_IMAGE = 2**29 - 1  # pixels; TensorFlow decodes no more
Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE  # Pillow's own limit is a third, less than a large panorama
# Boxes may leave [0, 1] by rounding; more than this is a mistake.
ROUNDING = 1e-4
# What a record knows of its image, whoever labels it.
IMAGE = ("image_id", "encoded", "height", "width", "name", "dataset")
# Labels of pixels, all PNGs.
PNGS = {
    "mask": "image/segmentation/class/encoded",
    "confidence": "image/segmentation/class/confidence",
    "next_masks": "image/segmentation/next/encoded",
    "next_confidences": "image/segmentation/next/confidence",
}


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image with its labels, human or pseudo, checked when made.

    Attributes:
        image_id: integer >= 0.
        encoded: JPEG or PNG bytes.
        height, width: of the image in pixels.
        name: file name, for messages and pictures.
        boxes: `[N, 4]` float32, (ymin, xmin, ymax, xmax) as fractions of the image. N may be 0.
        classes: `[N]` int64, from 1; 0 is the background.
        scores: `[N]` float32 in [0, 1], 1 for human labels.
        is_crowd: `[N]` bool.
        areas: `[N]` float32 in square pixels; computed from the boxes where not given.
        mask: gray PNG bytes of class ids, as large as the image (255 is ignored), or b"".
        confidence: gray PNG bytes, 255 times the probability of each pixel's class in a pseudo
            mask, or b"".
        next_masks, next_confidences: gray PNG bytes of the second, third, ... class of each pixel
            and of their probabilities, one map below the other, for soft labels; or b"".
        label: class of the whole image, from 0, for classification; -1 for none.
        origin: "human", "pseudo", or "none" for an image without labels.
        dataset, teacher: where image and labels come from.

    Raises:
        UserError: naming the record and the fault.
    """

    image_id: int
    encoded: bytes
    height: int
    width: int
    name: str = ""
    boxes: np.ndarray = ()
    classes: np.ndarray = ()
    scores: np.ndarray | None = None
    is_crowd: np.ndarray | None = None
    areas: np.ndarray | None = None
    mask: bytes = b""
    confidence: bytes = b""
    next_masks: bytes = b""
    next_confidences: bytes = b""
    label: int = -1
    origin: str = "human"
    dataset: str = ""
    teacher: str = ""

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        boxes = np.asarray(self.boxes, "float32").reshape(-1, 4)
        self._check_boxes(boxes)
        boxes = np.clip(boxes, 0.0, 1.0)
        put("boxes", boxes)
        put("classes", np.asarray(self.classes, "int64"))
        count = len(boxes)
        if self.scores is None:
            put("scores", np.ones(count, "float32"))
        if self.is_crowd is None:
            put("is_crowd", np.zeros(count, bool))
        if self.areas is None:
            sides = (boxes[:, 2:] - boxes[:, :2]) * (self.height, self.width)
            put("areas", sides.prod(axis=1).astype("float32"))
        for field in ("classes", "scores", "is_crowd", "areas"):
            if len(getattr(self, field)) != count:
                self._fail(f"{count} boxes but {len(getattr(self, field))} {field}")
        if count and self.classes.min() < 1:
            self._fail(f"class ids start at 1 (0 is the background); given {self.classes.min()}")

    def relabelled(self, teacher, **labels):
        """The image with pseudo labels, fields of a record, in place of every label it has."""
        image = {name: getattr(self, name) for name in IMAGE}
        return ImageRecord(**image, **labels, origin="pseudo", teacher=teacher)

    def _check_boxes(self, boxes):
        if not np.isfinite(boxes).all():
            self._fail("a box coordinate is not a finite number")
        if boxes.size == 0:
            return
        low, high = boxes.min(), boxes.max()
        if low < -ROUNDING or high > 1 + ROUNDING:
            hint = "; are these pixels?" if high > 2 else ""
            self._fail(
                "boxes are (ymin, xmin, ymax, xmax) as fractions of the image, 0 to 1; "
                f"given {low:.4g} to {high:.4g}{hint}"
            )
        if (boxes[:, 2:] < boxes[:, :2]).any():
            self._fail("a box ends before it begins; the order is (ymin, xmin, ymax, xmax)")

    def _fail(self, fault):
        raise UserError(f"image {self.name or self.image_id}: {fault}")


def to_example(record):
    """Serialised `tf.train.Example` of a record."""
    import tensorflow as tf

    def bytes_(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    def ints(*values):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    def floats(values):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    features = {
        "image/encoded": bytes_(record.encoded),
        "image/source_id": bytes_(str(record.image_id).encode()),
        "image/height": ints(record.height),
        "image/width": ints(record.width),
        "image/filename": bytes_(record.name.encode()),
        "image/origin": bytes_(record.origin.encode()),
        "image/dataset": bytes_(record.dataset.encode()),
        "image/teacher": bytes_(record.teacher.encode()),
        "image/object/class/label": ints(*record.classes.tolist()),
        "image/object/score": floats(record.scores),
        "image/object/area": floats(record.areas),
        "image/object/is_crowd": ints(*record.is_crowd.astype(int).tolist()),
    }
    for column, side in enumerate(("ymin", "xmin", "ymax", "xmax")):
        features[f"image/object/bbox/{side}"] = floats(record.boxes[:, column])
    if record.label >= 0:
        features["image/class/label"] = ints(record.label)
    for field, key in PNGS.items():
        if getattr(record, field):
            features[key] = bytes_(getattr(record, field))
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def from_example(serialized, where="record"):
    """The record of a serialised example, ours or of the released code.

    Args:
        serialized: bytes.
        where: named in errors.

    Raises:
        UserError: if it is no example, or has no image.
    """
    import tensorflow as tf

    try:
        features = tf.train.Example.FromString(serialized).features.feature
    except Exception:
        raise UserError(
            f"{where} is not a tf.train.Example; was it written by another program?"
        ) from None

    def text(key):
        values = features[key].bytes_list.value
        return values[0] if values else b""

    def ints(key):
        return np.array(features[key].int64_list.value, "int64")

    def floats(key):
        return np.array(features[key].float_list.value, "float32")

    encoded = text("image/encoded")
    if not encoded:
        raise UserError(f"{where} has no image (feature 'image/encoded')")
    height, width = ints("image/height"), ints("image/width")
    if not (height.size and width.size and height[0] > 0 and width[0] > 0):
        height, width = ([side] for side in tf.io.decode_image(encoded).shape[:2])
    source_id = text("image/source_id").decode()
    label = ints("image/class/label")
    columns = [floats(f"image/object/bbox/{side}") for side in ("ymin", "xmin", "ymax", "xmax")]
    return ImageRecord(
        image_id=int(source_id) if source_id.isdecimal() else hashed_id(source_id or encoded),
        encoded=encoded,
        height=int(height[0]),
        width=int(width[0]),
        name=text("image/filename").decode(),
        boxes=np.stack(columns, axis=-1),
        classes=ints("image/object/class/label"),
        scores=_or_none(floats("image/object/score")),
        is_crowd=_or_none(ints("image/object/is_crowd").astype(bool)),
        areas=_or_none(floats("image/object/area")),
        **{field: text(key) for field, key in PNGS.items()},
        label=int(label[0]) if label.size else -1,
        origin=text("image/origin").decode() or "human",
        dataset=text("image/dataset").decode(),
        teacher=text("image/teacher").decode(),
    )


def _or_none(array):
    return array if array.size else None


def encode_png(pixels):
    """PNG bytes of pixels, `[H, W, 3]` or `[H, W]` uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def hashed_id(name):
    """A stable 63-bit id of a name or of bytes."""
    import hashlib

    data = name.encode() if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def decode(serialized):
    """Tensors of one serialised example, inside `tf.data`.

    Returns:
        dict: `image` uint8 `[H, W, 3]`, `boxes` `[N, 4]` fractions, `classes` int32 `[N]`, `scores`
        `[N]`, `is_crowd` bool `[N]`, `mask` and `confidence` uint8 `[H, W]`, `next_masks` and
        `next_confidences` uint8 `[K H, W]` (`[0, 0]` without one), `label` int32, -1 without one.
        What a parser leaves unread is not decoded.
    """
    import tensorflow as tf

    sides = [f"image/object/bbox/{side}" for side in ("ymin", "xmin", "ymax", "xmax")]
    values = tf.io.parse_single_example(
        serialized,
        {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            **{key: tf.io.FixedLenFeature([], tf.string, b"") for key in PNGS.values()},
            "image/class/label": tf.io.FixedLenFeature([], tf.int64, -1),
            "image/object/class/label": tf.io.VarLenFeature(tf.int64),
            "image/object/score": tf.io.VarLenFeature(tf.float32),
            "image/object/is_crowd": tf.io.VarLenFeature(tf.int64),
            **{side: tf.io.VarLenFeature(tf.float32) for side in sides},
        },
    )
    boxes = tf.stack([values[side].values for side in sides], axis=-1)
    count = tf.shape(boxes)[0]
    scores = values["image/object/score"].values
    is_crowd = values["image/object/is_crowd"].values > 0

    def gray(encoded):
        return tf.cond(
            tf.strings.length(encoded) > 0,
            lambda: tf.io.decode_png(encoded, channels=1)[..., 0],
            lambda: tf.zeros([0, 0], tf.uint8),
        )

    image = tf.io.decode_image(values["image/encoded"], channels=3, expand_animations=False)
    return {
        "image": tf.ensure_shape(image, [None, None, 3]),
        "boxes": boxes,
        "classes": tf.cast(values["image/object/class/label"].values, tf.int32),
        # The released code writes neither scores nor, without crowds, the crowd flags.
        "scores": tf.cond(tf.size(scores) > 0, lambda: scores, lambda: tf.ones([count])),
        "is_crowd": tf.cond(
            tf.size(is_crowd) > 0, lambda: is_crowd, lambda: tf.zeros([count], tf.bool)
        ),
        **{field: gray(values[key]) for field, key in PNGS.items()},
        "label": tf.cast(values["image/class/label"], tf.int32),
    }


def matching_files(patterns):
    """Sorted files of a glob, or of several joined by commas.

    Raises:
        UserError: naming the pattern that matches nothing.
    """
    files = []
    for pattern in patterns.split(","):
        path = pathlib.Path(pattern.strip())
        found = sorted(str(p) for p in path.parent.glob(path.name))
        if not found:
            raise UserError(f"no file matches {pattern.strip()!r}")
        files += found
    return files


def read(files):
    """Records of TFRecord files, in order.

    Raises:
        UserError: naming the file and the record that cannot be read.
    """
    import tensorflow as tf

    for file in files:
        index = 0
        try:
            for serialized in tf.data.TFRecordDataset(file).as_numpy_iterator():
                yield from_example(serialized, f"record {index} of {file}")
                index += 1
        except tf.errors.OpError as error:
            raise UserError(
                f"{file} breaks off at record {index} ({error.message.split(';')[0]}); "
                "write it again with prepare_data"
            ) from None


def write(path, records):
    """Writes a TFRecord file that appears only when complete; returns the number of records.

    Raises:
        UserError: if the folder cannot be written or the disk is full.
    """
    import tensorflow as tf

    temporary = temporary_name(path)
    count = 0
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with tf.io.TFRecordWriter(temporary) as writer:
            for record in records:
                writer.write(to_example(record))
                count += 1
        replace(temporary, path)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
    return count

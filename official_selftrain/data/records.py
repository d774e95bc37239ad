"""`ImageRecord` and its form on disk; no other module knows the TFRecord feature names.

The names are those of the released code (and of Model Garden, which kept them), plus
`image/filename`, `image/origin`, `image/dataset`, `image/teacher`, `image/object/score`,
`image/segmentation/class/confidence` and `image/segmentation/next/...`.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from official_selftrain.data import png
from official_selftrain.utils.errors import Damaged, UserError
from official_selftrain.utils.files import matching, replacing
from official_selftrain.utils.types import StrPath, Tensor

LARGEST_IMAGE = 2**29 - 1  # pixels; TensorFlow decodes no more
# Pillow's own limit is a third of that, less than a large panorama has.
Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE
IGNORE_LABEL = 255  # pixels of a mask that do not count
# Boxes may leave [0, 1] by rounding; more than this is a mistake.
ROUNDING = 1e-4
# The fields that belong to the image and stay when its labels are replaced.
IMAGE = ("image_id", "encoded", "height", "width", "name", "dataset")
SIDES = ("ymin", "xmin", "ymax", "xmax")
# Labels of pixels, all stored as PNGs.
PNGS = {
    "mask": "image/segmentation/class/encoded",
    "confidence": "image/segmentation/class/confidence",
    "runner_up_masks": "image/segmentation/next/encoded",
    "runner_up_confidences": "image/segmentation/next/confidence",
}
# Defaults of fields that hold an array once the record is made, whatever they were given.
NO_LABELS: Any = ()
NOT_GIVEN: Any = None


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image with its labels, human or pseudo, checked when it is made.

    Attributes:
        image_id: integer >= 0.
        encoded: JPEG or PNG bytes.
        height, width: of the image in pixels.
        name: file name, for messages and pictures.
        boxes: `[N, 4]` float32, (ymin, xmin, ymax, xmax) as fractions of the image. N may be 0.
        classes: `[N]` int64, from 1; 0 is the background.
        scores: `[N]` float32 in [0, 1], 1 for human labels.
        is_crowd: `[N]` bool.
        areas: `[N]` float32 in square pixels; computed from the boxes if not given.
        texts: class names of the boxes, or () if they are not known.
        mask: gray PNG bytes of class ids, as large as the image (255 is ignored), or b"".
        confidence: gray PNG bytes, 255 times the probability of each pixel's class in a pseudo
            mask, or b"".
        runner_up_masks: gray PNG bytes of the second, third, ... likeliest class of each pixel, for
            soft labels; or b"". The K maps `[H, W]` are stacked to one `[K H, W]`, because a gray
            PNG has no channels to hold them.
        runner_up_confidences: the same of their probabilities times 255.
        label: class of the whole image, from 0, for classification; -1 for none.
        origin: "human", "pseudo", or "none" for an image without labels.
        dataset: name of the data set that the image comes from.
        teacher: name of the network that the pseudo labels come from.

    Raises:
        UserError: naming the record and what is wrong with it.
    """

    image_id: int
    encoded: bytes
    height: int
    width: int
    name: str = ""
    boxes: np.ndarray = NO_LABELS
    classes: np.ndarray = NO_LABELS
    scores: np.ndarray = NOT_GIVEN
    is_crowd: np.ndarray = NOT_GIVEN
    areas: np.ndarray = NOT_GIVEN
    texts: tuple[str, ...] = ()
    mask: bytes = b""
    confidence: bytes = b""
    runner_up_masks: bytes = b""
    runner_up_confidences: bytes = b""
    label: int = -1
    origin: str = "human"
    dataset: str = ""
    teacher: str = ""

    def __post_init__(self) -> None:
        boxes = self._array("boxes", "float32")
        if boxes.size % 4:
            self._fail(f"boxes have four numbers each; given {boxes.size} in all")
        boxes = boxes.reshape(-1, 4)
        self._check_boxes(boxes)
        boxes = np.clip(boxes, 0.0, 1.0)
        count = len(boxes)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (self.height, self.width)
        columns = {
            "classes": self._array("classes", "int64"),
            "scores": self._array("scores", "float32", np.ones(count)),
            "is_crowd": self._array("is_crowd", bool, np.zeros(count)),
            "areas": self._array("areas", "float32", sides.prod(axis=1)),
        }
        for field, column in columns.items():
            if column.shape != (count,):
                self._fail(f"{count} boxes but {column.size} {field}")
        if count and columns["classes"].min() < 1:
            lowest = columns["classes"].min()
            self._fail(f"class ids start at 1 (0 is the background); given {lowest}")
        for field in ("scores", "areas"):
            if not (np.isfinite(columns[field]) & (columns[field] >= 0)).all():
                self._fail(f"{field} must be finite and not negative; given {columns[field]}")
        try:
            self.name.encode()
        except UnicodeEncodeError:
            self._fail("its name is not UTF-8 text")
        for field, column in {**columns, "boxes": boxes}.items():
            # A frozen dataclass refuses plain assignments, also its own.
            object.__setattr__(self, field, column)

    def _array(self, field: str, dtype: Any, default: Any = ()) -> np.ndarray:
        given = getattr(self, field)
        try:
            return np.asarray(default if given is None else given, dtype)
        except (TypeError, ValueError, OverflowError) as error:
            self._fail(f"{field} cannot be {np.dtype(dtype).name}: {error}")

    def relabeled(self, teacher: str, **labels: Any) -> "ImageRecord":
        """A record of the same image with pseudo labels instead of all labels that it has.

        Args:
            teacher: name of the network that made the labels.
            **labels: the fields of the new record that hold them.
        """
        image = {name: getattr(self, name) for name in IMAGE}
        return ImageRecord(**image, **labels, origin="pseudo", teacher=teacher)

    def _check_boxes(self, boxes: np.ndarray) -> None:
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

    def _fail(self, fault: str) -> NoReturn:
        raise UserError(f"image {self.name or self.image_id}: {fault}") from None


def to_example(record: ImageRecord) -> bytes:
    """Serialized `tf.train.Example` of a record; equal records give equal bytes."""
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
    if record.texts:
        features["image/object/class/text"] = bytes_(*(text.encode() for text in record.texts))
    for column, side in enumerate(SIDES):
        features[f"image/object/bbox/{side}"] = floats(record.boxes[:, column])
    if record.label >= 0:
        features["image/class/label"] = ints(record.label)
    for field, key in PNGS.items():
        if getattr(record, field):
            features[key] = bytes_(getattr(record, field))
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def from_example(serialized: bytes, where: str = "record") -> ImageRecord:
    """The record of a serialized example, written by this package or by the released code.

    Args:
        serialized: a serialized `tf.train.Example`.
        where: what errors call it.

    Raises:
        UserError: if it is not an example, has no image, or has labels that a record refuses.
    """
    import tensorflow as tf

    try:
        features = tf.train.Example.FromString(serialized).features.feature
    except Exception:
        raise UserError(
            f"{where} is not a tf.train.Example; was it written by another program?"
        ) from None
    name = b"".join(features["image/filename"].bytes_list.value[:1]).decode(errors="replace")
    where += f" ({name})" if name else ""
    try:
        return _record(features)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {error}") from None


def _record(features: Any) -> ImageRecord:
    """The record of the features of a `tf.train.Example`."""

    def values(key, kind):
        found = features[key].WhichOneof("kind") if key in features else None
        content = getattr(features[key], found).value if found else []
        if len(content) and found != kind:
            raise UserError(f"feature {key!r} is a {found}, and must be a {kind}")
        return content

    def data(key):
        return next(iter(values(key, "bytes_list")), b"")

    def texts(key):
        try:
            return tuple(value.decode() for value in values(key, "bytes_list"))
        except UnicodeDecodeError as error:
            raise UserError(f"feature {key!r} is not UTF-8 text: {error.object[:80]!r}") from None

    def text(key):
        return next(iter(texts(key)), "")

    def ints(key):
        return np.array(values(key, "int64_list"), "int64")

    def floats(key):
        return np.array(values(key, "float_list"), "float32")

    encoded = data("image/encoded")
    if not encoded:
        raise UserError("it has no image (feature 'image/encoded')")
    height, width = _size(encoded, "image")
    sides = {side: floats(f"image/object/bbox/{side}") for side in SIDES}
    pngs = {field: data(key) for field, key in PNGS.items()}
    for field in ("mask", "confidence"):
        if pngs[field] and (size := _size(pngs[field], field)) != (height, width):
            raise UserError(f"its {field} has {size} pixels, its image {(height, width)}")
    label = ints("image/class/label")
    # The released code writes ids as text; other programs write them as integers.
    source_id = features["image/source_id"].int64_list.value
    source_id = str(source_id[0]) if source_id else text("image/source_id")
    return ImageRecord(
        image_id=_image_id(source_id, encoded),
        encoded=encoded,
        height=int(height),
        width=int(width),
        name=text("image/filename"),
        boxes=_stack_sides(sides),
        classes=ints("image/object/class/label"),
        scores=_or_none(floats("image/object/score")),
        is_crowd=_or_none(ints("image/object/is_crowd").astype(bool)),
        areas=_or_none(floats("image/object/area")),
        texts=texts("image/object/class/text"),
        **pngs,
        label=int(label[0]) if label.size else -1,
        origin=text("image/origin") or "human",
        dataset=text("image/dataset"),
        teacher=text("image/teacher"),
    )


def _stack_sides(sides: dict[str, np.ndarray]) -> np.ndarray:
    """Boxes `[N, 4]` from their four columns `[N]`."""
    if len({len(side) for side in sides.values()}) > 1:
        counts = ", ".join(f"{len(values)} {side}" for side, values in sides.items())
        raise UserError(f"its boxes have columns of different lengths: {counts}")
    return np.stack(list(sides.values()), axis=-1)


def _size(encoded: bytes, what: str) -> tuple[int, int]:
    """(height, width) in the header of an image; the features of a record may be wrong."""
    try:
        width, height = png.decode(encoded).size
        return height, width
    except Exception:
        raise UserError(
            f"its {what} cannot be decoded: it is not an image of a known format"
        ) from None


def _image_id(source_id: str, encoded: bytes) -> int:
    """The id as a number; the hash of any other text, or of the image if there is none."""
    number = int(source_id) if source_id.isdecimal() else -1
    return number if 0 <= number < 2**63 else hashed_id(source_id or encoded)


def _or_none(array: np.ndarray) -> Any:
    return array if array.size else None


def hashed_id(name: str | bytes) -> int:
    """A stable id of a name or of bytes, in 0 to 2^63 - 1."""
    data = name.encode() if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def decode(serialized: Tensor) -> dict[str, Tensor]:
    """Tensors of one serialized example, for use in `tf.data`.

    Inside a graph, entries that a parser does not use are not decoded.

    Args:
        serialized: string tensor `[]`.

    Returns:
        dict: `image` uint8 `[H, W, 3]`; `boxes` float32 `[N, 4]`, (ymin, xmin, ymax, xmax) as
        fractions; `classes` int32 `[N]`; `scores` float32 `[N]`; `is_crowd` bool `[N]`; `mask` and
        `confidence` uint8 `[H, W]`, `runner_up_masks` and `runner_up_confidences` uint8 `[K H, W]`,
        all `[0, 0]` if the record has none; `label` int32 `[]`, -1 if there is none.
    """
    import tensorflow as tf

    sides = [f"image/object/bbox/{side}" for side in SIDES]
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

    def gray(encoded):  # an empty string, the default of the feature, is not a PNG
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


def matching_files(
    patterns: StrPath | Iterable[StrPath], path: Callable[[Any], str] = str
) -> list[str]:
    """The TFRecord files that paths and globs stand for, each once.

    Args:
        patterns: a path, a glob, several of them joined by commas, or a list of them. A path that
            exists is taken as it is, even if it contains commas, stars or brackets; a folder stands
            for its files `*.tfrecord`.
        path: function that resolves a relative path.

    Raises:
        UserError: naming the pattern that matches no file.
    """
    if isinstance(patterns, (str, os.PathLike)):
        patterns = _split(str(patterns), path)
    found: list[str] = []
    for pattern in map(path, patterns):
        files = _files(pattern)
        if not files:
            what = f"the folder {pattern} has no file *.tfrecord"
            raise UserError(what if os.path.isdir(pattern) else f"no file matches {pattern!r}")
        found += files
    return list(dict.fromkeys(found))


def _split(patterns: str, path: Callable[[StrPath], str]) -> Iterator[str]:
    """The parts of a text between commas, except for commas in the name of a file that exists."""
    pieces = patterns.split(",")
    while pieces:
        # Longest first: "a,b.tfrecord" may be one file although "a" is one, too.
        joined = (",".join(pieces[:count]).strip() for count in range(len(pieces), 0, -1))
        part = next((part for part in joined if _files(path(part))), pieces[0].strip())
        yield part
        pieces = pieces[part.count(",") + 1 :]


def _files(pattern: str) -> list[str]:
    """The files of one pattern; hidden ones are those of editors and of other programs."""
    folder, paths = matching(pattern)
    if os.path.isdir(pattern):
        folder, paths = paths[0], sorted(paths[0].glob("*.tfrecord"))
    hidden = re.compile(r"(^|/)\.")
    return [
        str(path) for path in paths
        if path.is_file()
        and not hidden.search(path.relative_to(folder).as_posix())
        and not path.name.endswith(".tfrecord.json")  # the summary beside a shard
    ]  # fmt: skip


# --- Files -----------------------------------------------------------------------------------

# TensorFlow has no function for the checksum of bytes, and Python none for this polynomial.
CRC = [0] * 256
for _index in range(256):
    _value = _index
    for _ in range(8):
        _value = _value >> 1 ^ (0x82F63B78 if _value & 1 else 0)
    CRC[_index] = _value


def _checksum(data: bytes) -> int:
    """The masked CRC-32C of TFRecords."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def compression(file: StrPath) -> str:
    """How a TFRecord file is compressed as a whole: "GZIP", "ZLIB" or "".

    Raises:
        UserError: if it cannot be read.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{file} is not a regular file (a folder, device or pipe?)")
    try:
        with open(file, "rb") as stream:
            start = stream.read(12)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if len(start) < 12 or struct.unpack("<I", start[8:])[0] == _checksum(start[:8]):
        return ""
    if start.startswith(b"\x1f\x8b\x08"):
        return "GZIP"
    return "ZLIB" if start[0] == 0x78 and int.from_bytes(start[:2], "big") % 31 == 0 else ""


def read(
    files: StrPath | Iterable[StrPath], on_fault: Callable[[UserError], None] | None = None
) -> Iterator[ImageRecord]:
    """The records of TFRecord files, in order.

    Args:
        files: one path or several; compressed files are read as well.
        on_fault: function that is called with the error of each record that cannot be read, and of
            the rest of a file that breaks off. All other records are read. None raises the error.

    Raises:
        UserError: naming the file and the record.
    """

    def fault(error: UserError) -> None:
        if on_fault is None:
            raise error from None
        on_fault(error)

    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        for index, serialized in _serialized(str(file), fault):
            try:
                record = from_example(serialized, f"record {index} of {file}")
            except UserError as error:
                fault(error)
            else:
                yield record


def _serialized(file: str, fault: Callable[[UserError], None]) -> Iterator[tuple[int, bytes]]:
    """(index, bytes) of the undamaged records of a file."""
    import tensorflow as tf

    packed = compression(file)
    # TensorFlow ends the process if a damaged length does not fit into memory, so all lengths are
    # checked first.
    offsets, broken = ([], None) if packed else _offsets(file)
    index = 0
    try:
        stream = tf.data.TFRecordDataset(file, packed).take(-1 if packed else len(offsets))
        for serialized in stream.as_numpy_iterator():
            yield index, serialized
            index += 1
    except tf.errors.OpError:
        if packed:
            broken = _breaks_off(file, index)
        # TensorFlow reads nothing after the first damaged record; we read on without it.
        for later, offset in enumerate(offsets[index:], index):
            serialized = _undamaged(file, offset)
            if serialized is None:
                fault(Damaged(f"record {later} of {file} is damaged (its checksum is wrong)"))
            else:
                yield later, serialized
    if broken:
        fault(broken)


def _offsets(file: str) -> tuple[list[int], Damaged | None]:
    """The offsets of the records of a file in bytes, and an error if the file breaks off."""
    found: list[int] = []
    with open(file, "rb") as stream:
        end = os.fstat(stream.fileno()).st_size
        offset = 0
        while offset < end:
            header = stream.read(12)
            if len(header) < 12 or struct.unpack("<I", header[8:])[0] != _checksum(header[:8]):
                return found, _breaks_off(file, len(found))
            following = offset + 16 + int.from_bytes(header[:8], "little")
            if following > end:
                return found, _breaks_off(file, len(found))
            found.append(offset)
            offset = stream.seek(following)
    return found, None


def _breaks_off(file: str, index: int) -> Damaged:
    return Damaged(
        f"{file} breaks off at record {index}: it was cut, is damaged or is not a TFRecord file; "
        "copy it again, or delete it and repeat the command that wrote it"
    )


def _undamaged(file: str, offset: int) -> bytes | None:
    """The record at an offset, or None if its checksum is wrong."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        serialized = stream.read(int.from_bytes(stream.read(12)[:8], "little"))
        right = struct.unpack("<I", stream.read(4))[0] == _checksum(serialized)
    return serialized if right else None


def proof_file(output: StrPath) -> str:
    """The file with the checksum of a labeled shard, which proves that the shard is complete."""
    return f"{output}.json"


def write(path: StrPath, records: Iterable[ImageRecord]) -> int:
    """Writes a TFRecord file that appears only when it is complete.

    Returns:
        The number of records.

    Raises:
        UserError: if the folder cannot be written to or the disk is full. Exceptions of the
            iterable `records` are passed on.
    """
    import tensorflow as tf

    @contextlib.contextmanager
    def writing():  # only around the writes: an error of the iterable has nothing to do with `path`
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            raise UserError(f"cannot write {path}: {error}") from None

    with writing():
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    count = 0
    with replacing(path) as temporary:
        with writing():
            writer = tf.io.TFRecordWriter(str(temporary))
        try:
            for record in records:
                example = to_example(record)
                with writing():
                    writer.write(example)
                count += 1
            with writing():
                writer.close()
        finally:
            with contextlib.suppress(tf.errors.OpError):  # a full disk has been reported above
                writer.close()
    return count

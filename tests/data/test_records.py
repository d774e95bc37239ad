import contextlib
import gzip
import os
import pathlib
import re
import struct
import zlib

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from helpers import mask_png, png, record
from hypothesis import strategies as st

from official_selftrain.data import records
from official_selftrain.utils.errors import UserError


def assert_equal(a, b):
    for field in a.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


@pytest.mark.parametrize(
    "original",
    [
        record(),
        record(texts=("cat", "dog")),
        record(boxes=[], classes=[], scores=None, is_crowd=None, mask=b""),
        record(
            confidence=mask_png(),
            runner_up_masks=mask_png(8),
            runner_up_confidences=mask_png(8, 6, 1),
        ),
    ],
    ids=["boxes", "texts", "empty", "soft mask"],
)
def test_serializing_gives_the_record_back(original):
    assert_equal(records.from_example(records.to_example(original)), original)


def test_a_teachers_labels_replace_every_label():
    soft = {
        "confidence": mask_png(),
        "runner_up_masks": mask_png(8),
        "runner_up_confidences": mask_png(8),
    }
    found = record(**soft, origin="human").relabeled("new", boxes=[[0, 0, 1, 1]], classes=[3])
    assert_equal(
        found,
        records.ImageRecord(
            5, png(), 4, 6, "a.png", [[0, 0, 1, 1]], [3],
            origin="pseudo", dataset="d", teacher="new",
        ),
    )  # fmt: skip


def test_area_is_computed_in_pixels():
    np.testing.assert_allclose(record().areas, [2 * 3, 3 * 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[0, 0, 3, 4], [0, 0, 1, 1]]}, "fractions of the image.*pixels"),
        ({"boxes": [[0.5, 0, 0.2, 1], [0, 0, 1, 1]]}, "ends before it begins"),
        ({"boxes": [[0, 0, np.nan, 1], [0, 0, 1, 1]]}, "not a finite number"),
        ({"classes": [0, 1]}, "class ids start at 1"),
        ({"classes": [1]}, "2 boxes but 1 classes"),
    ],
)
def test_bad_records_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"image a.png: .*{message}"):
        record(**changes)


def test_released_record_is_read(golden):
    file = str(golden / "parsers/detection.tfrecord")
    expected = load(golden / "parsers/detection_predict_with_gt.npz")
    (found,) = records.read([file])
    count = int(expected["groundtruths__num_detections"][0])
    assert found.image_id == int(expected["groundtruths__source_id"])
    assert (found.height, found.width) == (
        expected["groundtruths__height"], expected["groundtruths__width"],
    )  # fmt: skip
    pixels = found.boxes * np.tile([found.height, found.width], 2)
    np.testing.assert_allclose(pixels, expected["groundtruths__boxes"][:count], rtol=1e-5)
    np.testing.assert_array_equal(found.classes, expected["groundtruths__classes"][:count])
    np.testing.assert_array_equal(found.is_crowd, expected["groundtruths__is_crowds"][:count] > 0)
    np.testing.assert_allclose(found.areas, expected["groundtruths__areas"][:count], rtol=1e-5)


def test_model_garden_record_is_read():
    """The features that its COCO converter writes, more than are needed."""

    def feature(*values):
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(values[0])]
        return tf.train.Feature(**{kind: {"value": values}})

    content = {
        "image/height": feature(4), "image/width": feature(6),
        "image/filename": feature(b"000000000139.jpg"), "image/source_id": feature(b"139"),
        "image/key/sha256": feature(b"0" * 64), "image/encoded": feature(png()),
        "image/format": feature(b"png"),
        "image/object/bbox/xmin": feature(0.5), "image/object/bbox/xmax": feature(1.0),
        "image/object/bbox/ymin": feature(0.0), "image/object/bbox/ymax": feature(0.5),
        "image/object/class/text": feature(b"dog"), "image/object/class/label": feature(18),
        "image/object/is_crowd": feature(1), "image/object/area": feature(5.5),
    }  # fmt: skip
    serialized = tf.train.Example(features=tf.train.Features(feature=content)).SerializeToString()
    found = records.from_example(serialized)
    assert (found.image_id, found.name, found.label) == (139, "000000000139.jpg", -1)
    np.testing.assert_allclose(found.boxes, [[0.0, 0.5, 0.5, 1.0]])
    assert found.classes.tolist() == [18] and found.is_crowd.tolist() == [True]
    assert found.areas.tolist() == [5.5] and found.scores.tolist() == [1.0]
    decoded = records.decode(tf.constant(serialized))
    np.testing.assert_allclose(decoded["boxes"], found.boxes)


def test_decode_matches_the_record():
    empty = record(boxes=[], classes=[], scores=None, is_crowd=None, mask=b"", label=-1)
    for original in (record(), empty):
        example = records.decode(tf.constant(records.to_example(original)))
        np.testing.assert_array_equal(example["image"], np.full((4, 6, 3), 7))
        for key in ("boxes", "classes", "scores", "is_crowd"):
            np.testing.assert_array_equal(example[key], getattr(original, key))
        assert example["label"] == original.label
        expected = np.full((4, 6), 3) if original.mask else np.zeros((0, 0))
        np.testing.assert_array_equal(example["mask"], expected)


def test_write_is_all_or_nothing(tmp_path):
    file = tmp_path / "a.tfrecord"

    def broken():
        yield record()
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        records.write(file, broken())
    assert not file.exists()
    assert records.write(file, [record()]) == 1
    assert len(list(records.read([str(file)]))) == 1


def test_errors_of_the_source_are_not_blamed_on_the_output(tmp_path):
    def broken():
        yield record()
        raise OSError(5, "the camera is off")

    with pytest.raises(OSError, match="^.Errno 5. the camera is off$"):
        records.write(tmp_path / "a.tfrecord", broken())
    assert not list(tmp_path.iterdir())


# --- Damaged files ---------------------------------------------------------------------------


def shard(path, count=5):
    records.write(path, [record(image_id=index) for index in range(count)])
    content = path.read_bytes()
    return content, len(content) // count


def read(path, **settings):
    return [found.image_id for found in records.read(path, **settings)]


def flip(content, place):
    changed = bytearray(content)
    changed[place] ^= 0x10
    return bytes(changed)


@pytest.mark.parametrize(
    ("change", "left", "faults"),
    [
        (lambda c, n: c, [0, 1, 2, 3, 4], []),
        (lambda c, n: flip(c, 2 * n + 50), [0, 1, 3, 4], ["record 2 of .* is damaged"]),
        (lambda c, n: flip(c, 3 * n - 2), [0, 1, 3, 4], ["record 2 of .* is damaged"]),
        (lambda c, n: flip(c, 50), [1, 2, 3, 4], ["record 0 of .* is damaged"]),
        (lambda c, n: flip(flip(c, 50), 4 * n + 20), [1, 2, 3], ["record 0", "record 4"]),
        (lambda c, n: flip(c, 2 * n + 1), [0, 1], ["breaks off at record 2"]),
        (lambda c, n: flip(c, 2 * n + 9), [0, 1], ["breaks off at record 2"]),
        (lambda c, n: flip(flip(c, n + 30), 3 * n), [0, 2], ["record 1", "breaks off at record 3"]),
        (lambda c, n: c[:-10], [0, 1, 2, 3], ["breaks off at record 4: it was cut"]),
        (lambda c, n: c[: 3 * n + 5], [0, 1, 2], ["breaks off at record 3"]),
        (lambda c, n: c[: 3 * n], [0, 1, 2], []),
        (lambda c, n: c + b"text", [0, 1, 2, 3, 4], ["breaks off at record 5"]),
        (lambda c, n: b"text" * 99, [], ["breaks off at record 0.* is not a TFRecord file"]),
        (lambda c, n: b"", [], []),
        (lambda c, n: gzip.compress(c), [0, 1, 2, 3, 4], []),
        (lambda c, n: zlib.compress(c), [0, 1, 2, 3, 4], []),
        (lambda c, n: gzip.compress(c)[:-200], None, ["breaks off at record"]),
        (lambda c, n: gzip.compress(flip(c, n + 50)), [0], ["breaks off at record 1"]),
    ],
)
def test_a_damaged_record_costs_itself_where_its_length_is_whole(tmp_path, change, left, faults):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(change(*shard(path)))
    told = []
    found = read(path, on_fault=lambda error: told.append(str(error)))
    assert left is None or found == left
    assert len(told) == len(faults)
    for message, expected in zip(told, faults, strict=True):
        assert re.search(expected, message) and "a.tfrecord" in message, message
    if faults:
        with pytest.raises(UserError, match=faults[0]):
            read(path)


def test_a_length_that_fits_into_no_memory_is_refused(tmp_path):
    """TensorFlow would end the process."""
    path = tmp_path / "a.tfrecord"
    content, length = shard(path)
    header = struct.pack("<Q", 2**40)
    header += struct.pack("<I", records._checksum(header))
    path.write_bytes(content[:length] + header + content[length + 12 :])
    with pytest.raises(UserError, match="breaks off at record 1"):
        read(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read .*a.tfrecord: No such file"),
        (lambda path: path.mkdir(), "a.tfrecord is not a regular file"),
        (lambda path: os.mkfifo(path), "a.tfrecord is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a.tfrecord is not a regular file"),
    ],
)
def test_what_is_no_file_is_told(tmp_path, make, message):
    make(tmp_path / "a.tfrecord")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.tfrecord")


def changed(**features):
    """A serialized record with other features: bytes, or lists of numbers."""
    example = tf.train.Example.FromString(records.to_example(record()))
    for key, values in features.items():
        feature = example.features.feature["image/" + key.replace("__", "/")]
        feature.Clear()
        if isinstance(values, bytes):
            feature.bytes_list.value.append(values)
        elif values and isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return example.SerializeToString()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"filename": b"\xff\xfe"}, "'image/filename' is not UTF-8 text: b'.xff.xfe'"),
        ({"source_id": b"\xff"}, "'image/source_id' is not UTF-8 text"),
        ({"teacher": b"\xff"}, "'image/teacher' is not UTF-8 text"),
        ({"object__class__text": b"\xff"}, "class/text' is not UTF-8 text"),
        ({"object__bbox__ymin": [0.1]}, "columns of different lengths: 1 ymin, 2 xmin"),
        ({"object__bbox__ymin": [1, 2]}, "bbox/ymin' is a int64_list, and must be a float_list"),
        ({"object__class__label": [1.5, 2.5]}, "label' is a float_list, and must be a int64"),
        ({"object__class__label": b"cat"}, "label' is a bytes_list"),
        ({"object__is_crowd": b"1"}, "is_crowd' is a bytes_list"),
        ({"object__class__label": [1, 2, 3]}, "2 boxes but 3 classes"),
        ({"object__class__label": [0, 1]}, "class ids start at 1"),
        ({"object__score": [0.5]}, "2 boxes but 1 scores"),
        ({"object__score": [0.5, float("nan")]}, "scores must be finite"),
        ({"object__area": [-1.0, 5.0]}, "areas must be finite and not negative"),
        ({"object__bbox__xmax": [float("inf"), 1.0]}, "not a finite number"),
        ({"object__bbox__xmax": [40.0, 50.0]}, "are these pixels"),
        ({"encoded": b""}, "it has no image"),
        ({"encoded": b"hello"}, "its image cannot be decoded: it is not an image"),
        ({"segmentation__class__encoded": b"hello"}, "its mask cannot be decoded"),
        ({"segmentation__class__encoded": mask_png(3, 3)}, r"its mask has \(3, 3\) pixels"),
    ],
)
def test_faults_inside_a_record_are_told_with_its_place(tmp_path, features, message):
    with pytest.raises(UserError, match=f"^record 7 of x( .*)?: .*{message}"):
        records.from_example(changed(**features), "record 7 of x")


def test_the_size_is_that_of_the_image_whatever_the_record_says():
    found = records.from_example(changed(height=[400], width=[400]))
    assert (found.height, found.width) == (4, 6)


@pytest.mark.parametrize(
    ("source_id", "expected"),
    [
        (b"139", 139), ([139], 139), (b"0007", 7), (b"img_7", records.hashed_id("img_7")),
        (b"9" * 30, records.hashed_id("9" * 30)), (b"-5", records.hashed_id("-5")),
        (b"", records.hashed_id(png())),
    ],
)  # fmt: skip
def test_ids_are_numbers_or_hashed(source_id, expected):
    assert records.from_example(changed(source_id=source_id)).image_id == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[0, 0, 1]], "classes": [1]}, "boxes have four numbers each; given 3"),
        ({"boxes": "text"}, "boxes cannot be float32"),
        ({"classes": [10**30, 1]}, "classes cannot be int64"),
        ({"classes": ["cat", "dog"]}, "classes cannot be int64"),
        ({"classes": [[1], [2]]}, "2 boxes but 2 classes"),
        ({"areas": ["a", "b"]}, "areas cannot be float32"),
        ({"name": "\udcff.jpg"}, "its name is not UTF-8"),
    ],
)
def test_whatever_a_record_is_made_of_the_fault_is_told(changes, message):
    with pytest.raises(UserError, match=f"^image .*{message}"):
        record(**{"scores": None, "is_crowd": None, **changes})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a,b/x-*.tfrecord", ["runs/a,b/x-0.tfrecord", "runs/a,b/x-1.tfrecord"]),
        ("runs/a,b/x-0.tfrecord,y [1].tfrecord", ["runs/a,b/x-0.tfrecord", "y [1].tfrecord"]),
        ("y [1].tfrecord, runs/a,b/x-1.tfrecord", ["y [1].tfrecord", "runs/a,b/x-1.tfrecord"]),
        ("*/*/x-0.tfrecord", ["c/d/x-0.tfrecord", "runs/a,b/x-0.tfrecord"]),
        ("**/x-0.tfrecord", ["c/d/x-0.tfrecord", "runs/a,b/x-0.tfrecord"]),
        ("runs/a,b", ["runs/a,b/x-0.tfrecord", "runs/a,b/x-1.tfrecord"]),
        ("y [1].tfrecord,y*.tfrecord", ["y [1].tfrecord"]),
        (["c/d/x-*", "runs/a,b/x-1*"], ["c/d/x-0.tfrecord", "runs/a,b/x-1.tfrecord"]),
        (pathlib.Path("c/d/x-0.tfrecord"), ["c/d/x-0.tfrecord"]),
    ],
)
def test_patterns_mean_the_files_that_exist(tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    names = [
        "runs/a,b/x-0.tfrecord", "runs/a,b/x-1.tfrecord", "runs/a,b/._x-0.tfrecord",
        "c/d/x-0.tfrecord", "y [1].tfrecord",
    ]  # fmt: skip
    for name in names:
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(name).write_bytes(b"")
    assert records.matching_files(given) == expected
    with pytest.raises(UserError, match="no file matches 'gone'"):
        records.matching_files("y [1].tfrecord,gone")
    with pytest.raises(UserError, match=r"the folder c has no file \*.tfrecord"):
        records.matching_files("c")


EXAMPLE = records.to_example(record(texts=("cat", "dog")))


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=5),
    end=st.integers(1, len(EXAMPLE)),
)
def test_changed_examples_are_a_record_or_a_user_error(changes, end):
    content = bytearray(EXAMPLE)
    for place, value in changes:
        content[place % len(content)] = value
    for data in (bytes(content), bytes(content[:end])):
        with contextlib.suppress(UserError):
            assert records.from_example(data).height > 0


def test_stranger_bytes_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="record 3 is not a tf.train.Example"):
        records.from_example(b"\xff\xff", "record 3")
    with pytest.raises(UserError, match="no image"):
        records.from_example(tf.train.Example().SerializeToString())
    with pytest.raises(UserError, match="no file matches"):
        records.matching_files(str(tmp_path / "*.tfrecord"))
    with pytest.raises(UserError, match="cannot write"):
        records.write("/proc/none/a.tfrecord", [record()])

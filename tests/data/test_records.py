import numpy as np
import pytest
import tensorflow as tf
from conftest import load
from helpers import mask_png, png, record

from official_selftrain.data import records
from official_selftrain.errors import UserError


def assert_equal(a, b):
    for field in a.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


@pytest.mark.parametrize(
    "original",
    [
        record(),
        record(boxes=[], classes=[], scores=None, is_crowd=None, mask=b""),
        record(confidence=mask_png(), next_masks=mask_png(8), next_confidences=mask_png(8, 6, 1)),
    ],
    ids=["boxes", "empty", "soft mask"],
)
def test_serialising_gives_the_record_back(original):
    assert_equal(records.from_example(records.to_example(original)), original)


def test_a_teachers_labels_replace_every_label():
    soft = {"confidence": mask_png(), "next_masks": mask_png(8), "next_confidences": mask_png(8)}
    found = record(**soft, origin="human").relabelled("new", boxes=[[0, 0, 1, 1]], classes=[3])
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


def test_truncated_file_is_named(tmp_path):
    file = tmp_path / "a.tfrecord"
    records.write(file, [record(), record()])
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a.tfrecord breaks off at record 1"):
        list(records.read([str(file)]))


def test_stranger_bytes_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="record 3 is not a tf.train.Example"):
        records.from_example(b"\xff\xff", "record 3")
    with pytest.raises(UserError, match="no image"):
        records.from_example(tf.train.Example().SerializeToString())
    with pytest.raises(UserError, match="no file matches"):
        records.matching_files(str(tmp_path / "*.tfrecord"))
    with pytest.raises(UserError, match="cannot write"):
        records.write("/proc/none/a.tfrecord", [record()])

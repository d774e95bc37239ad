"""tensorflow-datasets by name: small sets with the features of the real ones, prepared here."""

import numpy as np
import pytest
import tensorflow as tf

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.data.sources.tfds import COCO_IDS
from official_selftrain.utils.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

BOXES = np.array([[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]], "float32")


def image(index):
    return np.full((20, 30, 3), 40 * index, "uint8")


def coco(index):
    return {
        "image": image(index),
        "image/filename": f"{index:012d}.jpg",
        "image/id": 100 + index,
        "objects": {
            "area": np.array([48, 600]), "bbox": BOXES, "id": np.array([1, 2]),
            "is_crowd": np.array([False, True]), "label": np.array([11, 79]),
        },
    }  # fmt: skip


def voc(index):
    return {
        "image": image(index),
        "image/filename": f"2007_{index:06d}.jpg",
        "labels": np.array([11]), "labels_no_difficult": np.array([11]),
        "objects": {
            "bbox": BOXES, "is_difficult": np.array([False, True]),
            "is_truncated": np.array([False, False]), "label": np.array([0, 19]),
            "pose": np.array([0, 1]),
        },
    }  # fmt: skip


def open_images(index):
    flag = np.array([0, 1], "int8")
    labels = {"confidence": np.array([10]), "label": np.array([3]), "source": np.array([1])}
    return {
        "image": image(index),
        "image/filename": f"{index:016x}.jpg",
        "bobjects": {
            "bbox": BOXES, "label": np.array([0, 600]), "source": np.array([0, 1]),
            "is_depiction": flag, "is_group_of": flag, "is_inside": flag, "is_occluded": flag,
            "is_truncated": flag,
        },
        "objects": labels, "objects_trainable": labels,
    }  # fmt: skip


def imagenet(index):
    return {"image": image(index), "file_name": f"n_{index}.JPEG", "label": 7 * index}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A function that prepares three images under the name of a real data set."""
    real = tfds.builder

    def make(name, example, split="train"):
        features = real(name, data_dir=str(tmp_path / "empty")).info.features
        examples = [example(index) for index in range(3)]
        data = tf.data.Dataset.from_generator(
            lambda: iter(examples),
            output_signature=tf.nest.map_structure(
                lambda x: tf.TensorSpec(np.shape(x), tf.convert_to_tensor(x).dtype), examples[0]
            ),
        )
        builder = tfds.dataset_builders.TfDataBuilder(
            name=name.split("/")[0], version="1.0.0", split_datasets={split: data},
            features=features, data_dir=str(tmp_path / "tfds"),
        )  # fmt: skip
        builder.download_and_prepare()
        monkeypatch.setattr(tfds, "builder", lambda _: builder)

    return make


def prepare(tmp_path, **settings):
    return sources.prepare(SourceConfig(**settings), str, str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("name", "example", "classes", "ids"),
    [
        ("coco/2017", coco, COCO_IDS, [13, 90]),
        ("voc/2012", voc, range(1, 21), [1, 20]),
        ("open_images_v4", open_images, range(1, 602), [1, 601]),
    ],
)
def test_boxes_by_name(prepared, tmp_path, name, example, classes, ids):
    prepared(name, example)
    summary = prepare(tmp_path, tfds=name)
    assert (summary["images"], summary["boxes"]) == (3, 6)
    assert list(summary["classes"]) == list(classes)
    found = sorted(records.read(summary["files"]), key=lambda record: record.name)
    for index, record in enumerate(found):
        np.testing.assert_allclose(record.boxes, BOXES, atol=1e-6)
        assert record.classes.tolist() == ids
        assert record.is_crowd.tolist() == [False, True]
        assert record.name == example(index)["image/filename"]
        assert record.image_id == (100 + index if name == "coco/2017" else record.image_id)
        assert (record.height, record.width) == (20, 30)
        np.testing.assert_array_equal(tf.io.decode_image(record.encoded), image(index))


def test_classes_by_name(prepared, tmp_path):
    prepared("imagenet2012", imagenet, "validation")
    summary = prepare(tmp_path, tfds="imagenet2012", split="validation")
    assert len(summary["classes"]) == 1000
    found = list(records.read(summary["files"]))
    assert sorted(record.label for record in found) == [0, 7, 14]
    assert all(record.origin == "human" and not len(record.boxes) for record in found)


def test_coco_keeps_its_own_ids():
    assert len(COCO_IDS) == 80 and COCO_IDS[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert COCO_IDS[-1] == 90


def test_unknown_data_sets_and_splits_are_named(prepared, tmp_path):
    with pytest.raises(UserError, match="cannot load the data set 'cooc'"):
        prepare(tmp_path, tfds="cooc")
    prepared("coco/2017", coco)
    with pytest.raises(UserError, match="has no split 'trian'; did you mean 'train'"):
        prepare(tmp_path, tfds="coco/2017", split="trian")


def test_lists_take_images_of_a_data_set(prepared, tmp_path):
    prepared("coco/2017", coco)
    (tmp_path / "list.txt").write_text("000000000002.jpg\n")
    summary = prepare(tmp_path, tfds="coco/2017", image_list=str(tmp_path / "list.txt"))
    assert [r.image_id for r in records.read(summary["files"])] == [102]

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Three images with COCO labels; the second has no box."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        picture = np.random.default_rng(index).integers(0, 255, (40, 60, 3), "uint8")
        Image.fromarray(picture).save(images / f"im_{index}.jpg")
    content = {
        "images": [
            {"id": 10 + i, "file_name": f"im_{i}.jpg", "width": 60, "height": 40} for i in range(3)
        ],
        "categories": [{"id": 1, "name": "fish"}, {"id": 4, "name": "shark"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 1, "bbox": [6, 4, 30, 20], "area": 500},
            {"id": 2, "image_id": 12, "category_id": 4, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
    }
    write_json(tmp_path, content)
    return tmp_path


def write_json(folder, content):
    (folder / "labels.json").write_text(json.dumps(content))


def edit(folder, change):
    content = json.loads((folder / "labels.json").read_text())
    change(content)
    write_json(folder, content)


def prepare(folder, name="out/train", **changes):
    source = SourceConfig(**{"images": "images", "annotations": "labels.json", **changes})
    return sources.prepare(source, lambda p: str(folder / p), str(folder / name))


def test_coco_becomes_records(folder):
    summary = prepare(folder)
    assert (summary["images"], summary["boxes"], summary["empty"]) == (3, 2, 1)
    assert summary["largest_class"] == 4
    assert summary["classes"] == {1: "fish", 4: "shark"}
    found = list(records.read(summary["files"]))
    # [6, 4, 30, 20] in 60 x 40: y from 4 to 24, x from 6 to 36.
    np.testing.assert_allclose(found[0].boxes, [[0.1, 0.1, 0.6, 0.6]], rtol=1e-6)
    assert found[0].areas.tolist() == [500]
    assert found[1].boxes.shape == (0, 4)
    assert found[2].is_crowd.tolist() == [True]
    assert [r.image_id for r in found] == [10, 11, 12]
    assert found[0].encoded == (folder / "images/im_0.jpg").read_bytes()


def test_finished_work_is_used_again_until_a_file_changes(folder):
    first = prepare(folder)
    stamp = pathlib.Path(first["files"][0]).stat().st_mtime_ns
    prepare(folder)
    assert pathlib.Path(first["files"][0]).stat().st_mtime_ns == stamp
    edit(folder, lambda c: c["annotations"].pop())
    assert prepare(folder)["boxes"] == 1


def test_image_list_takes_names_and_stems(folder):
    (folder / "list.txt").write_text("im_0\nim_2.jpg\n")
    assert prepare(folder, image_list="list.txt")["images"] == 2
    (folder / "list.txt").write_text("im_0\nim_7\n")
    with pytest.raises(UserError, match="1 images of the image list are not in .*'im_7'"):
        prepare(folder, image_list="list.txt")


def test_bare_folder(folder):
    (folder / "images/sub").mkdir()
    Image.new("CMYK", (8, 6)).save(folder / "images/sub/c.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 6)).save(folder / "images/turned.jpg", exif=exif)
    summary = prepare(folder, annotations=None)
    found = {r.name: r for r in records.read(summary["files"])}
    assert len(found) == 5 and summary["boxes"] == 0
    assert found["sub/c.jpg"].encoded.startswith(b"\x89PNG")
    assert (found["turned.jpg"].height, found["turned.jpg"].width) == (8, 6)
    assert found["im_0.jpg"].origin == "none"


def test_a_box_of_one_pixel_in_the_corner_is_no_fraction(folder):
    edit(folder, lambda c: c["annotations"][0].update(bbox=[0, 1, 1, 1]))
    first = next(records.read(prepare(folder)["files"]))
    np.testing.assert_allclose(first.boxes, [[1 / 40, 0, 2 / 40, 1 / 60]], rtol=1e-6)


def test_records_are_a_source_too(folder):
    prepare(folder)
    summary = prepare(folder, "copy", images=None, annotations=None, records="out/train-*.tfrecord")
    assert summary["images"] == 3 and summary["files"] == prepare(folder)["files"]


MISTAKES = [
    (lambda c: c["annotations"][0].update(category_id=9), "unknown category id 9; known: 1 fish"),
    (lambda c: c["annotations"][0].update(bbox=[20, 10, 58, 38]), "leaves the 60 x 40.*corners"),
    (lambda c: c["annotations"][0].update(bbox=[50, 4, 30, 20]), "leaves the 60 x 40 image$"),
    (lambda c: c["annotations"][0].update(bbox=[0.1, 0.1, 0.5, 0.5]), "looks like fractions"),
    (lambda c: c["annotations"][0].update(bbox=[5, 5, -3, 4]), "no positive, finite width"),
    (lambda c: c["annotations"][0].update(bbox=[5, 5, float("nan"), 4]), "no positive, finite"),
    (lambda c: c["annotations"][0].update(bbox=[5, 5, 4]), "four numbers"),
    (lambda c: c["annotations"][0].update(image_id=99), "not in its list of images, the first 99"),
    (lambda c: c["images"][1].update(id=10), "two images have the id 10"),
    (lambda c: c["images"][0].update(width=61), "says im_0.jpg is 61 x 40.*60 x 40"),
    (lambda c: c["images"][0].update(file_name="gone.jpg"), "gone.jpg does not exist"),
    (lambda c: c["images"][0].pop("file_name"), "item 0 of 'images' has no 'file_name'"),
    (lambda c: c.pop("categories"), "not a COCO file: it has no list called 'categories'"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_in_annotations_are_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError) as error:
        prepare(folder)
    text = str(error.value).replace(" (on_bad_record=skip goes on without it)", "")
    assert pytest.importorskip("re").search(message, text), text
    assert not (folder / "out/train.json").exists()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_corrupt_images_stop_or_are_counted(folder, content):
    file = folder / "images/im_1.jpg"
    file.write_bytes(file.read_bytes()[:500] if content is None else content)
    with pytest.raises(UserError, match=r"im_1.jpg cannot be decoded"):
        prepare(folder)
    summary = prepare(folder, on_bad_record="skip")
    assert summary["images"] == 2
    assert len(summary["skipped"]) == 1 and "im_1.jpg" in summary["skipped"][0]


def test_folders_without_images_are_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no usable image in .*empty"):
        prepare(folder, images="empty", annotations=None)
    with pytest.raises(UserError, match="does not exist; did you mean 'images'"):
        prepare(folder, images="imagse", annotations=None)
    (folder / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        prepare(folder, annotations="broken.json")


def test_real_data(shared_data, tmp_path):
    source = SourceConfig(
        images="images",
        annotations="annotations/instances_train.json",
        image_list="splits/train_10.txt",
    )
    path = lambda p: str(shared_data / "aquarium" / p)  # noqa: E731
    summary = sources.prepare(source, path, str(tmp_path / "train"))
    assert summary["images"] == 30
    assert len(summary["classes"]) == 7

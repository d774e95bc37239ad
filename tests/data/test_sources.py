import json
import pathlib
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import read_source, told
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError


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
    (
        lambda c: c["annotations"][0].update(bbox=[20, 10, 58, 38]),
        "extends beyond the 60 x 40.*corners",
    ),
    (
        lambda c: c["annotations"][0].update(bbox=[50, 4, 30, 20]),
        "extends beyond the 60 x 40 image$",
    ),
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
    text = str(error.value).replace(" (on_bad_record=skip continues without it)", "")
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


# --- What people have in COCO files ------------------------------------------------------------


def first_image(**changes):
    return lambda c: c["images"][0].update(changes)


def first_object(**changes):
    return lambda c: c["annotations"][0].update(changes)


def everywhere(value):
    """Another id for the first image, in its annotation too."""

    def change(content):
        content["images"][0]["id"] = value
        content["annotations"][0]["image_id"] = value

    return change


def category(index, **changes):
    return lambda c: c["categories"][index].update(changes)


def more_categories(*categories):
    return lambda c: c["categories"].extend(categories)


def put(**values):
    return lambda c: c.update(values)


# All of these are read like the file as it was.
ACCEPTED = [
    first_object(category_id="1"),
    first_object(category_id=1.0),
    first_object(image_id="10"),
    first_object(image_id=10.0),
    first_object(bbox=["6", "4.0", "3e1", "20"]),
    first_object(bbox=[6.0, 4, 30.000001, 20]),
    first_object(iscrowd="0"),
    first_object(iscrowd=False),
    first_object(iscrowd=None),
    first_object(iscrowd=0.0),
    first_object(area="500"),
    first_object(id="a"),
    first_object(id=None),
    first_object(segmentation={"counts": "abc", "size": [40, 60]}),
    first_object(bbox=None, segmentation=[[6, 4, 36, 4, 36, 24], [10, 10, 12, 10, 12, 12]]),
    first_object(bbox=[], segmentation=[6, 4, 36, 4, 36, 24, 6, 24]),
    first_object(attributes={"occluded": True}, score=0.3),
    first_image(width="60"),
    first_image(width=60.0, height=40.0),
    first_image(width=0, height=0),
    first_image(width=None, height=None),
    first_image(id="10"),
    first_image(id=10.0),
    first_image(file_name="images/im_0.jpg"),
    first_image(file_name="C:\\data\\im_0.JPG"),
    first_image(image_id=10),
    category(0, id="1"),
    category(0, id=1.0),
    category(0, supercategory=None),
    category(0, name=" fish\n"),
    more_categories({"id": 1, "name": "fish"}),
    more_categories({"id": 0, "name": "background"}),
    put(info=None, licenses="x"),
]


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_leaves_no_doubt_is_accepted(folder, change):
    edit(folder, change)
    found, problems = read_source(folder, annotations="labels.json")
    assert sorted(found) == ["im_0.jpg", "im_1.jpg", "im_2.jpg"]
    first = found["im_0.jpg"]
    np.testing.assert_allclose(first.boxes, [[0.1, 0.1, 0.6, 0.6]], rtol=1e-6)
    assert first.image_id == 10 and not first.is_crowd[0] and first.areas[0] == 500
    assert problems.class_names == {1: "fish", 4: "shark"}
    assert not problems.messages and not problems.left_out


def test_ids_that_are_no_small_numbers_are_hashed_like_names(folder):
    for key in ("frame_a", 10**30, -4, "010"):
        edit(folder, everywhere(key))
        found, _ = read_source(folder, annotations="labels.json")
        assert found["im_0.jpg"].image_id == records.hashed_id(str(key))
        assert len(found["im_0.jpg"].boxes) == 1
    prepare(folder)
    index = {name: image_id for name, image_id, *_ in sources.read_index(folder / "out/train")}
    assert index["im_0.jpg"] == records.hashed_id("010")


def test_a_box_without_an_area_is_left_out_and_counted_alone(folder):
    for box in ([29.65, 8.33, 1.03, 0.0], [0, 0, 0, 0], [60.5, 4, 1, 3], [5, 5, 1e-9, 3]):
        edit(folder, first_object(bbox=box))
        found, problems = read_source(folder, annotations="labels.json")
        assert len(found) == 3 and len(found["im_0.jpg"].boxes) == 0
        where = f"{folder}/labels.json: annotation 1 of image 10"
        assert problems.left_out == {"boxes without an area": [1, where]}


def test_categories_from_0_are_numbered_from_1_and_told(folder, caplog):
    edit(folder, put(categories=[{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]))
    edit(folder, lambda c: c["annotations"][1].update(category_id=0))
    found, problems = read_source(folder, annotations="labels.json")
    assert problems.class_names == {1: "cat", 2: "dog"}
    assert found["im_0.jpg"].classes.tolist() == [2] and found["im_2.jpg"].classes.tolist() == [1]
    assert "labels.json numbers its categories from 0" in caplog.text


def test_the_group_that_roboflow_numbers_0_is_no_class(folder):
    edit(folder, put(categories=[
        {"id": 0, "name": "fish", "supercategory": "none"},
        {"id": 1, "name": "fish", "supercategory": "fish"},
        {"id": 4, "name": "shark", "supercategory": "fish"},
    ]))  # fmt: skip
    found, problems = read_source(folder, annotations="labels.json")
    assert problems.class_names == {1: "fish", 4: "shark"}
    assert found["im_0.jpg"].classes.tolist() == [1]


def test_names_of_categories_that_are_numbers_are_text(folder):
    edit(folder, category(1, name=7))
    assert read_source(folder, annotations="labels.json")[1].class_names == {1: "fish", 4: "7"}


def test_an_area_that_is_missing_is_that_of_the_box(folder):
    edit(folder, lambda c: c["annotations"][0].pop("area"))
    edit(folder, lambda c: c["annotations"][1].update(area=7))
    found, _ = read_source(folder, annotations="labels.json")
    np.testing.assert_allclose(found["im_0.jpg"].areas, [600], rtol=1e-6)
    assert found["im_2.jpg"].areas.tolist() == [7]


def test_null_in_place_of_annotations_means_images_without_labels(folder, caplog):
    edit(folder, put(annotations=None))
    found, _ = read_source(folder, annotations="labels.json")
    assert "labels.json is null: its images have no labels" in caplog.text
    assert [record.origin for record in found.values()] == ["none"] * 3


# Changes, words of the message, and how many images and boxes skipping leaves; None where the
# fault is one of the whole file and nothing can be skipped.
FAULTS = [
    (first_object(category_id=9), "annotation 1 of image 10 has the unknown category id 9", (3, 1)),
    (first_object(category_id=True), "category_id must be the whole number.*given true", (3, 1)),
    (first_object(category_id=1.5), "category_id must be.*given 1.5", (3, 1)),
    (first_object(category_id="fish"), 'category_id must be.*given "fish"', (3, 1)),
    (first_object(category_id=[1]), r"category_id must be.*given \[1\]", (3, 1)),
    (first_object(category_id=10**30), "unknown category id 1000+; known: 1 fish, 4 shark", (3, 1)),
    (first_object(bbox=5), "bbox must be four numbers .*given 5", (3, 1)),
    (first_object(bbox="6 4 30 20"), "bbox must be four numbers", (3, 1)),
    (first_object(bbox=[6, 4, 30]), "bbox must be four numbers", (3, 1)),
    (first_object(bbox=[6, 4, 30, 20, 1]), "bbox must be four numbers", (3, 1)),
    (first_object(bbox=[6, 4, True, 20]), "bbox must be four numbers.*true", (3, 1)),
    (first_object(bbox=[6, 4, 10**400, 20]), "bbox must be four numbers", (3, 1)),
    (first_object(bbox=[6, 4, None, 20]), "bbox must be four numbers", (3, 1)),
    (first_object(bbox=[1e308, 4, 1e308, 20]), "extends beyond the 60 x 40 image", (3, 1)),
    (first_object(bbox=[6, 4, float("inf"), 20]), "no positive, finite width", (3, 1)),
    (first_object(bbox=[6, 4, -30, 20]), "no positive, finite width", (3, 1)),
    (first_object(bbox=[50, 4, 13, 20]), "extends beyond the 60 x 40 image", (3, 1)),
    (first_object(bbox=None), "has neither a bbox nor polygons", (3, 1)),
    (first_object(bbox=None, segmentation=[]), "has neither a bbox nor polygons", (3, 1)),
    (first_object(bbox=None, segmentation={"counts": []}), "a mask in run lengths", (3, 1)),
    (first_object(bbox=None, segmentation=[[1, 2, 3]]), "is no list of polygons", (3, 1)),
    (first_object(bbox=None, segmentation=[["a", "b"]]), "is no list of polygons", (3, 1)),
    (first_object(bbox=None, segmentation="x"), "is no list of polygons", (3, 1)),
    (first_object(iscrowd=2), "iscrowd must be 0 or 1; given 2", (3, 1)),
    (first_object(iscrowd="maybe"), "iscrowd must be 0 or 1", (3, 1)),
    (first_object(iscrowd=[0]), "iscrowd must be 0 or 1", (3, 1)),
    (first_object(area="large"), 'area must be a number of square pixels.*given "large"', (3, 1)),
    (first_object(area=float("nan")), "area must be.*given NaN", (3, 1)),
    (first_object(area=-5), "area must be.*given -5", (3, 1)),
    (first_object(image_id=None), "item 0 of 'annotations' .id 1.: image_id must be a", (3, 1)),
    (first_object(image_id=[10]), "image_id must be a whole number or a text", (3, 1)),
    (first_object(image_id=10.5), "image_id must be a whole number or a text", (3, 1)),
    (first_object(image_id=77), "1 image ids of annotations .1 ann.*not in.*first 77", (3, 1)),
    (lambda c: c["annotations"][0].pop("image_id"), "item 0 of 'annot.*has no 'image_id'", (3, 1)),
    (lambda c: c["annotations"].insert(0, 5), "item 0 of 'annotations' must be an obj", (3, 2)),
    (lambda c: c["annotations"].insert(0, None), "item 0 of 'annotations' must be an", (3, 2)),
    (lambda c: c["annotations"].append([]), "item 2 of 'annotations' must be an object", (3, 2)),
    (lambda c: c["images"].insert(0, 5), "item 0 of 'images' must be an object.*given 5", (3, 2)),
    (lambda c: c["images"][0].pop("file_name"), "item 0 of 'images' has no 'file_n", (2, 1)),
    (lambda c: c["images"][0].pop("id"), "item 0 of 'images' has no 'id'", None),
    (first_image(file_name=7), "file_name must be a text, the path of the image; given 7", (2, 1)),
    (first_image(file_name=None), "file_name must be a text.*given null", (2, 1)),
    (first_image(file_name=""), 'file_name must be a text.*given ""', (2, 1)),
    (first_image(file_name="im\0.jpg"), "not a possible file name", (2, 1)),
    (first_image(file_name="\ud800.jpg"), "file_name must be a text", (2, 1)),
    (first_image(file_name="/dev/zero"), "is outside the folder.*labels.json lists it", (2, 1)),
    (first_image(file_name="../labels.json"), "is outside the folder", (2, 1)),
    (first_image(file_name="im_7.jpg"), "im_7.jpg does not exist.*did you mean 'im_", (2, 1)),
    (first_image(file_name="im_2"), "the images 'im_2.jpg' and 'im_2' are one file", (2, 1)),
    (first_image(file_name="im_2.jpg"), "two images have the file name 'im_2.jpg' .ids", (2, 1)),
    (everywhere(12), "two images have the id 12, 'im_0.jpg' and 'im_2.jpg'", (1, 0)),
    (first_image(id=[10]), r"item 0 of 'images': id must be a whole number.*given \[10\]", None),
    (first_image(width=61), "says im_0.jpg is 61 x 40 pixels, but the file is 60 x 40", (2, 1)),
    (first_image(height=None, width=61), r"says im_0.jpg is 61 x \? pixels", (2, 1)),
    (first_image(width="wide"), 'width must be a whole number of pixels.*given "wide"', (2, 1)),
    (first_image(width=-60), "width must be a whole number of pixels.*given -60", (2, 1)),
    (first_image(width=60.5), "width must be a whole number of pixels", (2, 1)),
    (category(0, id=None), "item 0 of 'categories': the id must be a whole number", None),
    (category(0, id=-1), "the id must be a whole number, 1 to 10000; given -1", None),
    (category(0, id=True), "the id must be a whole number, 1 to 10000; given true", None),
    (category(0, id=3_000_000_000), "1 to 10000; given 3000000000.*number the categ", None),
    (category(0, id=[1]), r"the id must be a whole number, 1 to 10000; given \[1\]", None),
    (category(0, name=None), "item 0 of 'categories', id 1: a class name must be text.*null", None),
    (category(0, name=["fish"]), "a class name must be text; given", None),
    (category(0, name="shark"), "has 'shark' twice, as class 1 and 4; names must differ", None),
    (category(0, id=4), "gives the class id 4 two names, 'fish' and 'shark'", None),
    (lambda c: c["categories"][0].pop("name"), "item 0 of 'categories' has no 'name'", None),
    (put(categories=[5]), "item 0 of 'categories' must be an object with id and name", None),
    (put(categories=[]), "'categories' is empty, but there are annotations", None),
    (put(categories={"1": "fish"}), "'categories' must be a list; given {", None),
    (put(images=None), "'images' must be a list; given null", None),
    (put(annotations={"1": {}}), "'annotations' must be a list; given {", None),
    (put(annotations="none"), "'annotations' must be a list", None),
    (lambda c: c.pop("images"), "it has no list called 'images'", None),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message", "left"), FAULTS)
def test_a_fault_is_told_and_costs_no_more_than_itself(folder, change, message, left):
    edit(folder, change)
    with pytest.raises(UserError, match=message) as error:
        read_source(folder, annotations="labels.json")
    assert "labels.json" in str(error.value)
    if left is None:
        return
    found, problems = read_source(folder, annotations="labels.json", on_bad_record="skip")
    assert (len(found), sum(len(record.boxes) for record in found.values())) == left
    assert len(problems.messages) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "must hold an object with the lists 'images'.*given 5"),
        ("null", "given null"),
        ('["images", "categories"]', "given .*images"),
        ("[" * 100_000 + "]" * 100_000, "its brackets nest too deeply"),
        ('{"images": ' + '[{"a":' * 50_000, "its brackets nest too deeply"),
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('{"images": [' + "1" * 5000 + "]}", "is not valid JSON: Exceeds the limit"),
        ('{"via_settings": {}}', "VIA, LabelMe and others have a JSON of their own"),
        ('{"image_id": 4}', "must hold an object with the lists"),
    ],
)
def test_a_json_of_another_kind_is_told_in_one_line(folder, text, message):
    (folder / "labels.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_source(folder, annotations="labels.json", on_bad_record="skip")
    assert len(str(error.value)) < 600


def test_a_name_with_a_line_break_leaves_the_message_one_line(folder):
    edit(folder, first_image(file_name="im\x1b_0\n.jpg"))
    with pytest.raises(UserError, match=r"im\\x1b_0\\n\.jpg does not exist") as error:
        read_source(folder, annotations="labels.json")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", ""])
def test_any_json_file_that_cannot_be_read_is_told(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"the state .*a\.json is (not valid JSON|nested too deep)"):
        files.read_json(tmp_path / "a.json", "state")


def test_text_with_a_byte_order_mark_or_in_utf_16_is_read(folder):
    text = (folder / "labels.json").read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / "labels.json").write_text(text, encoding=encoding)
        assert len(read_source(folder, annotations="labels.json")[0]) == 3


def test_json_in_another_encoding_is_told(folder):
    edit(folder, first_image(file_name="é.jpg"))
    content = json.loads((folder / "labels.json").read_text())
    text = json.dumps(content, ensure_ascii=False)
    (folder / "labels.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="labels.json is not UTF-8 text"):
        read_source(folder, annotations="labels.json")


def test_a_name_of_the_disk_is_never_altered(folder):
    """The JSON has the name composed, the disk decomposed; the record has that of the disk."""
    name = unicodedata.normalize("NFD", "Straße_café.jpg")
    (folder / "images/im_0.jpg").rename(folder / "images" / name)
    edit(folder, first_image(file_name=unicodedata.normalize("NFC", name)))
    assert name in read_source(folder, annotations="labels.json")[0]


# --- Whatever is in a field --------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10, "10", 0, 1, 4, 1e308, 10**400, "im_0.jpg", "\ud800", "\0", [6, 4, 9]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip
PLACES = [
    ("images",), ("annotations",), ("categories",), ("images", 0), ("annotations", 0),
    ("categories", 0),
    *(("images", 0, field) for field in ("id", "file_name", "height", "width")),
    *(("annotations", 0, field) for field in (
        "id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "area")),
    *(("categories", 0, field) for field in ("id", "name", "supercategory")),
]  # fmt: skip


@hypothesis.settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)
@hypothesis.given(place=st.sampled_from(PLACES), value=ANYTHING, skip=st.booleans())
def test_any_value_in_any_field_of_coco_is_read_or_told(folder, place, value, skip):
    original = (folder / "labels.json").read_text()

    def change(content):
        *parents, last = place
        for key in parents:
            content = content[key]
        content[last] = value

    try:
        edit(folder, change)
        with told():
            settings = {"on_bad_record": "skip"} if skip else {}
            read_source(folder, annotations="labels.json", **settings)
    finally:
        (folder / "labels.json").write_text(original)

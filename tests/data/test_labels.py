"""VOC XML, YOLO text, masks and folders of classes, and what people get wrong in them."""

import pathlib

import numpy as np
import pytest
from helpers import read_source as read
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.errors import UserError

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def voc(*objects, size=(60, 40)):
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{head}{''.join(objects)}</annotation>"


def thing(*corners, name="dog", difficult=0):
    return OBJECT.format(*corners, name=name, difficult=difficult)


@pytest.fixture
def folder(tmp_path):
    """Three images of 60 x 40 pixels."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (60, 40), (index, 0, 0)).save(tmp_path / f"images/im_{index}.jpg")
    return tmp_path


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save_mask(folder, name, pixels, mode="L"):
    path = folder / "masks" / name
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, "uint8"))
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    image.save(path)


def prepare(folder, **settings):
    source = SourceConfig(**{"images": "images", **settings})
    return sources.prepare(source, lambda p: str(folder / p), str(folder / "out/train"))


def written(summary):
    return {record.name: record for record in records.read(summary["files"])}


# --- VOC -------------------------------------------------------------------------------------


def test_voc_becomes_records(folder):
    files = {
        "xml/im_0.xml": voc(thing(7, 5, 36, 24), thing(1, 1, 60, 40, name="cat", difficult=1)),
        "xml/im_1.xml": voc(),
        "xml/im_2.xml": voc(thing(1.5, 1.5, 30.5, 20), size=None),
    }
    write(folder, files)
    summary = prepare(folder, annotations="xml")
    found = written(summary)
    # Corners count from 1: x from 6 to 36 of 60, y from 4 to 24 of 40.
    np.testing.assert_allclose(found["im_0.jpg"].boxes, [[0.1, 0.1, 0.6, 0.6], [0, 0, 1, 1]])
    assert found["im_0.jpg"].classes.tolist() == [12, 8]
    assert found["im_0.jpg"].is_crowd.tolist() == [False, True]
    assert found["im_1.jpg"].boxes.shape == (0, 4)
    expected = [[0.5 / 40, 0.5 / 60, 20 / 40, 30.5 / 60]]
    np.testing.assert_allclose(found["im_2.jpg"].boxes, expected, rtol=1e-6)
    assert summary["classes"][20] == "tvmonitor" and len(summary["classes"]) == 20
    assert summary["images_per_class"] == {8: 1, 12: 2}


# Content of im_0.xml, message, and how many of the three images skipping leaves: a fault of one
# object leaves its image.
VOC_MISTAKES = [
    (voc(thing(30, 5, 7, 24)), "im_0.xml: object 0: a box ends before it.*xmin 30.*swapped?", 3),
    (voc(thing(7, 5, 90, 24)), "xmax 90, ymax 24 leaves the 60 x 40 image", 3),
    (voc(thing("nan", 5, 9, 24)), "not a finite number", 3),
    (voc(thing("left", 5, 9, 24)), "bndbox/xmin must be a number; given 'left'", 3),
    (voc(thing("1_0", 5, 19, 24)), "bndbox/xmin must be a number; given '1_0'", 3),
    (voc("<object><name>dog</name></object>"), "bndbox/xmin must be a number; given None", 3),
    (voc("<object></object>"), "object 0: <name>: a class name must be text; given null", 3),
    (voc(thing(0.1, 0.1, 0.5, 0.5)), "looks like fractions; VOC boxes are in pixels", 3),
    (voc(thing(7, 5, 36, 24, name="dgo")), "unknown class 'dgo'; the 20 names.*need class_list", 3),
    (voc(thing(7, 5, 36, 24, difficult="x")), "difficult must be a number; given 'x'", 3),
    (voc(thing(7, 5, 36, 24), size=(40, 60)), "says the image is 40 x 60.*60 x 40", 2),
    (voc(thing(7, 5, 36, 24), size=(0, 50)), r"says the image is \? x 50 pixels", 2),
    (voc(size=("wide", 40)), "size/width must be a number; given 'wide'", 2),
    ("<annotation><object>", "im_0.xml is not valid XML", 2),
    ("", "im_0.xml is not valid XML", 2),
    ("<a>" * 20_000 + "</a>" * 20_000, "its outermost element is <a>, not <annotation>", 2),
    (f"<annotation>{'<a>' * 20_000}{'</a>' * 20_000}</annotation>", "no <object>, no <size>", 2),
    ("<annotation><filename/><all><object/></all></annotation>", "must lie directly in", 2),
    ('<!DOCTYPE a [<!ENTITY e "x">]><annotation><size/>&e;</annotation>', "XML entities", 2),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "not valid XML: unknown encod", 2),
    (None, "image im_0.jpg: it has no annotation in .*xml", 2),
]


@pytest.mark.parametrize(("content", "message", "images"), VOC_MISTAKES)
def test_mistakes_in_voc_stop_or_are_counted(folder, content, message, images):
    files = {f"xml/im_{i}.xml": voc(thing(7, 5, 36, 24)) for i in range(3)}
    write(folder, files | ({"xml/im_0.xml": content} if content is not None else {}))
    if content is None:
        (folder / "xml/im_0.xml").unlink()
    with pytest.raises(UserError, match=message):
        read(folder, annotations="xml")
    found, problems = read(folder, annotations="xml", on_bad_record="skip")
    assert len(found) == images and len(problems.messages) == 1


def test_labels_and_images_that_do_not_match_are_named(folder):
    write(folder, {f"xml/im_{i}.xml": voc() for i in range(3)} | {"xml/gone.xml": voc()})
    with pytest.raises(UserError, match=r"1 annotations in .* have no image, the first 'gone.xml'"):
        prepare(folder, annotations="xml")
    Image.new("RGB", (60, 40)).save(folder / "images/im_0.png")
    with pytest.raises(UserError, match=r"would share the labels im_0.xml"):
        prepare(folder, annotations="xml")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no .xml \(VOC\) and no .txt \(YOLO\) file"):
        prepare(folder, annotations="empty")


def test_voc_with_classes_of_ones_own(folder):
    write(folder, {f"xml/im_{i}.xml": voc(thing(7, 5, 36, 24, name="crane")) for i in range(3)})
    write(folder, {"classes.txt": "gull\ncrane\n"})
    summary = prepare(folder, annotations="xml", class_list="classes.txt")
    assert summary["classes"] == {1: "gull", 2: "crane"}
    assert written(summary)["im_0.jpg"].classes.tolist() == [2]
    write(folder, {"classes.txt": "gull\ncranes\n"})
    with pytest.raises(UserError, match="unknown class 'crane'; did you mean 'cranes'"):
        prepare(folder, annotations="xml", class_list="classes.txt")
    write(folder, {"classes.txt": "gull\ngull\n"})
    with pytest.raises(UserError, match="has 'gull' twice"):
        prepare(folder, annotations="xml", class_list="classes.txt")


# --- YOLO ------------------------------------------------------------------------------------


def test_yolo_becomes_records(folder):
    write(folder, {
        "labels/im_0.txt": "0 0.5 0.5 0.2 0.4\n2 0.1 0.1 0.3 0.1 0.3 0.6\n\n",
        "labels/im_1.txt": "",
        "labels/classes.txt": "a\nb\nc\n",
        "data.yaml": "nc: 3\nnames: {0: a, 1: b, 2: c}\n",
    })  # fmt: skip
    summary = prepare(folder, annotations="labels", class_list="data.yaml")
    found = written(summary)
    np.testing.assert_allclose(
        found["im_0.jpg"].boxes, [[0.3, 0.4, 0.7, 0.6], [0.1, 0.1, 0.6, 0.3]], rtol=1e-5
    )
    assert found["im_0.jpg"].classes.tolist() == [1, 3]
    # An image without a file, or with an empty one, has no objects.
    assert summary["empty"] == 2
    assert summary["classes"] == {1: "a", 2: "b", 3: "c"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dog 0.5 0.5 0.2 0.2", "line 1 of .*im_0.txt must be a class number"),
        ("0 0.5 0.5 0.2", "given 3 numbers after the class"),
        ("0 20 20 30 30", "YOLO boxes are fractions, 0 to 1; are these pixels?"),
        ("0 0.9 0.5 0.4 0.2", "leaves the 60 x 40 image"),
        ("0 0.5 0.5 -0.1 0.2", "no positive width and height"),
        ("0 0.5 0.5 0.2 0.2 0.97", "5 numbers after the class; the fifth.*confidence"),
        ("0.0 0.5 0.5 0.2 0.2", "write the class as a whole number, 0 .on_bad_record"),
        ("0,0.5,0.5,0.2,0.2", "must be a class number and fractions, separated by spaces"),
        ("0 0,5 0,5 0,2 0,2", "must be a class number and fractions"),
        ("1_0 0.5 0.5 0.1 0.1", "must be a class number"),
        ("100000000000000000000 0.5 0.5 0.2 0.2", "unknown class 1000000+; known"),
        ("999999999 0.5 0.5 0.2 0.2", "unknown class 999999999; known"),
        ("-1 0.5 0.5 0.2 0.2", "unknown class -1"),
        ("0 1e999 0.5 0.2 0.2", "not a finite number"),
        ("0", "given 0 numbers after the class"),
        ("0 0.5 0.5 0.2 0.2 0.5 0.5 2 0.5 0.5 2 0.1 0.1 2", "for keypoints give class_list"),
        ("0 nan 0.5 0.1 0.2", "not a finite number"),
        ("3 0.5 0.5 0.1 0.2", "unknown class 3; known are 0 to 2"),
    ],
)
def test_mistakes_in_yolo_are_named(folder, line, message):
    write(folder, {"labels/im_0.txt": line, "classes.txt": "a\nb\nc"})
    settings = {"annotations": "labels", "class_list": "classes.txt"}
    with pytest.raises(UserError, match=message):
        read(folder, **settings)
    write(folder, {"labels/im_0.txt": f"1 0.5 0.5 0.5 0.5\n{line}"})
    found, problems = read(folder, on_bad_record="skip", **settings)
    assert len(found) == 3 and len(problems.messages) == 1
    assert found["im_0.jpg"].classes.tolist() == [2]


# --- Masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_become_records(folder, mode):
    pixels = np.zeros((40, 60))
    pixels[:10], pixels[10:20], pixels[20:22] = 1, 2, 255
    for index in range(3):
        save_mask(folder, f"im_{index}.png", pixels, mode)
    write(folder, {"classes.txt": "sky\nroad\ncar\n"})
    summary = prepare(folder, masks="masks", class_list="classes.txt")
    assert summary["masks"] == 3 and summary["empty"] == 0
    assert summary["classes"] == {0: "sky", 1: "road", 2: "car"}
    assert summary["images_per_class"] == {0: 3, 1: 3, 2: 3}
    for record in records.read(summary["files"]):
        example = records.decode(records.to_example(record))
        np.testing.assert_array_equal(example["mask"], pixels)
        assert record.origin == "human"


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((40, 60), 7), "class id 7; known are 0 to 2, and 255"),
        (np.zeros((20, 30)), "is 30 x 20 pixels, its image is 60 x 40"),
        (np.full((40, 60, 3), (0, 1, 2)), r"holds colours \(mode RGB\)"),
    ],
)
def test_mistakes_in_masks_are_named(folder, pixels, message):
    for index in range(3):
        save_mask(folder, f"im_{index}.png", np.zeros((40, 60)))
    save_mask(folder, "im_1.png", pixels)
    write(folder, {"classes.txt": "sky\nroad\ncar\n"})
    settings = {"masks": "masks", "class_list": "classes.txt"}
    with pytest.raises(UserError, match=f"the mask .*im_1.png .*{message}"):
        prepare(folder, **settings)
    assert prepare(folder, on_bad_record="skip", **settings)["images"] == 2
    (folder / "masks/im_1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"im_1.png cannot be decoded"):
        prepare(folder, **settings)
    (folder / "masks/im_1.png").unlink()
    with pytest.raises(UserError, match="1 of 3 images have no mask in .*'im_1.jpg'"):
        prepare(folder, **settings)


def test_voc_segmentation_with_its_lists(folder):
    """JPEGImages, Annotations, SegmentationClass and the lists of ImageSets."""
    write(folder, {f"xml/im_{i}.xml": voc(thing(7, 5, 36, 24)) for i in range(3)})
    for index in range(2):
        save_mask(folder, f"im_{index}.png", np.full((40, 60), 12), "P")
    write(
        folder,
        {"train.txt": "im_0\n", "trainaug.txt": "im_0\nim_2\n", "dog.txt": "im_0 -1\nim_1  1\n"},
    )
    settings = {"annotations": "xml"}
    summary = prepare(folder, image_list="train.txt", masks="masks", **settings)
    assert [*written(summary)] == ["im_0.jpg"] and summary["classes"][0] == "background"
    summary = prepare(folder, image_list="trainaug.txt", exclude_lists=("train.txt",), **settings)
    assert [*written(summary)] == ["im_2.jpg"]
    assert [*written(prepare(folder, image_list="dog.txt", **settings))] == ["im_1.jpg"]


# --- Classes by folder -----------------------------------------------------------------------


def test_folders_are_classes(folder):
    for name in ("n02/a.jpg", "n01/b.jpg", "n01/c.jpg"):
        path = folder / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    summary = prepare(folder, images="classes", label_by_folder=True)
    assert summary["classes"] == {0: "n01", 1: "n02"}
    assert {n: r.label for n, r in written(summary).items()} == {
        "n01/b.jpg": 0, "n01/c.jpg": 0, "n02/a.jpg": 1,
    }  # fmt: skip
    write(folder, {"wnids.txt": "n03\nn01\n"})
    with pytest.raises(UserError, match="the class list has no 'n02'; did you mean"):
        prepare(folder, images="classes", label_by_folder=True, class_list="wnids.txt")
    with pytest.raises(UserError, match="'im_0.jpg' of .* is not in a folder of its class"):
        prepare(folder, label_by_folder=True)


def test_real_masks_and_boxes(shared_data, tmp_path):
    source = SourceConfig(
        images="images",
        annotations="annotations/instances_train.json",
        masks="masks",
        image_list="splits/train_10.txt",
    )
    path = lambda p: str(shared_data / "animals" / p)  # noqa: E731
    summary = sources.prepare(source, path, str(tmp_path / "train"))
    names = pathlib.Path(path("mask_classes.txt")).read_text().split("\n")
    assert (summary["images"], summary["masks"]) == (30, 30)
    assert list(summary["classes"].values()) == [name for name in names if name]

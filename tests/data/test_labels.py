"""VOC XML, YOLO text, masks and folders of classes, and what people get wrong in them."""

import io
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from helpers import read_source as read
from helpers import told
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import records, sources
from official_selftrain.data.sources import lists, stores
from official_selftrain.utils.errors import UserError

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
    (voc(thing(7, 5, 90, 24)), "xmax 90, ymax 24 extends beyond the 60 x 40 image", 3),
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
    with pytest.raises(UserError, match=r"would have the same labels, im_0.xml"):
        prepare(folder, annotations="xml")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains neither .xml \(VOC\) nor .txt \(YOLO\) files"):
        prepare(folder, annotations="empty")


def test_labels_of_images_that_cannot_be_read_name_what_reads_them(folder, monkeypatch):
    monkeypatch.setattr(stores, "REMEDIES", {".heic": "pip install it"})
    write(folder, {f"xml/im_{i}.xml": voc() for i in range(3)} | {"xml/c.xml": voc()})
    (folder / "images/c.heic").write_bytes(b"no image")
    remedy = r"the first 'c.xml'; left out there: 1 .heic files \(pip install it\)"
    with pytest.raises(UserError, match=remedy):
        read(folder, annotations="xml")
    listed = {"images": [{"id": 1, "file_name": "c.heic"}], "annotations": [], "categories": []}
    (folder / "t.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"c.heic cannot be decoded: .*format \(pip install it\)"):
        read(folder, annotations="t.json")


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
        ("0 0.9 0.5 0.4 0.2", "extends beyond the 60 x 40 image"),
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
        (np.full((40, 60, 3), (0, 1, 2)), r"holds colors \(mode RGB\)"),
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
    with pytest.raises(UserError, match="the class list does not contain 'n02'; did you mean"):
        prepare(folder, images="classes", label_by_folder=True, class_list="wnids.txt")
    with pytest.raises(UserError, match="'im_0.jpg' of .* is not in the folder of a class"):
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


# --- Encodings -------------------------------------------------------------------------------

VELO = voc(thing(7, 5, 36, 24, name="Vélo"))


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        (None, "utf-8"),
        (None, "utf-8-sig"),
        ("UTF-8", "utf-8"),
        ("ISO-8859-1", "latin-1"),
        ("windows-1252", "cp1252"),
        ("UTF-16", "utf-16"),
        (None, "utf-16"),
        ("utf-16", "utf-8"),  # as some programs write it
        ("gb2312", "gb2312"),
        ("Big5", "big5"),
    ],
)
def test_xml_is_read_in_the_encoding_that_it_declares(folder, declared, encoding):
    head = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    name = "自行车" if encoding == "gb2312" else "車" if encoding == "big5" else "Vélo"
    write(folder, {f"xml/im_{i}.xml": voc() for i in (1, 2)} | {"c.txt": f"x\n{name}\n"})
    data = (head + VELO.replace("Vélo", name)).encode(encoding)
    (folder / "xml/im_0.xml").write_bytes(data)
    found, _ = read(folder, annotations="xml", class_list="c.txt")
    assert found["im_0.jpg"].classes.tolist() == [2]


def test_xml_in_another_encoding_than_it_declares_is_told(folder):
    write(folder, {f"xml/im_{i}.xml": voc() for i in range(3)} | {"c.txt": "Vélo\n"})
    (folder / "xml/im_0.xml").write_bytes(VELO.encode("latin-1"))
    with pytest.raises(UserError, match="im_0.xml is not valid XML: .*is it in the encoding that"):
        read(folder, annotations="xml", class_list="c.txt")


def test_labels_with_byte_order_marks_and_any_line_ends_are_read(folder):
    write(folder, {"labels/im_1.txt": ""})
    (folder / "labels/im_0.txt").write_bytes(b"\xef\xbb\xbf0 0.5 0.5 0.2 0.4\r\n\r\n")
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n\r\n")
    (folder / "l.txt").write_bytes(b"\xef\xbb\xbfim_0.jpg\r\n\r\n im_2.jpg \r\n")
    found, problems = read(folder, annotations="labels", class_list="c.txt", image_list="l.txt")
    assert sorted(found) == ["im_0.jpg", "im_2.jpg"]
    assert problems.class_names == {1: "cat", 2: "dog"}
    assert found["im_0.jpg"].classes.tolist() == [1]


def test_voc_reads_what_exporters_write_besides(folder):
    body = (
        "<folder>else</folder><filename>other.png</filename><size><width>0</width></size>"
        "<object><name> dog </name><pose/><truncated>Unspecified</truncated><difficult/>"
        "<bndbox><xmin>7.0</xmin><ymin>5</ymin><xmax>36</xmax><ymax>2.4e1</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    )
    for size in ("<depth>3</depth>", ""):
        xml = {f"xml/im_{i}.xml": f"<annotation>{body}{size}</annotation>" for i in range(3)}
        write(folder, xml)
        found, _ = read(folder, annotations="xml")
        np.testing.assert_allclose(found["im_0.jpg"].boxes, [[0.1, 0.1, 0.6, 0.6]])
        assert not found["im_0.jpg"].is_crowd[0]


# --- What data.yaml says of a line --------------------------------------------------------------

POSE = "0 0.5 0.5 0.4 0.4 0.45 0.45 0.55 0.55 0.5 0.6"


@pytest.mark.parametrize("class_list", ["data.yaml", "classes.txt", None])
def test_keypoints_after_a_box_are_not_its_corners(folder, class_list):
    """Whether data.yaml is given or only lies above the labels."""
    write(folder, {
        "labels/im_0.txt": f"{POSE}\n0 0.5 0.5 0.4 0.4",
        "data.yaml": "names: [person]\nkpt_shape: [3, 2]\n",
        "classes.txt": "person\n",
    })  # fmt: skip
    found, _ = read(folder, annotations="labels", class_list=class_list)
    np.testing.assert_allclose(found["im_0.jpg"].boxes, [[0.3, 0.3, 0.7, 0.7]] * 2, rtol=1e-6)
    write(folder, {"labels/im_0.txt": f"{POSE} 0.1 0.1"})
    with pytest.raises(UserError, match="3 keypoints of 2 numbers; given 12 numbers after"):
        read(folder, annotations="labels", class_list=class_list)


def test_polygons_that_could_be_keypoints_are_told_unless_data_yaml_decides(folder, caplog):
    write(folder, {"labels/im_0.txt": POSE})
    found, _ = read(folder, annotations="labels")
    np.testing.assert_allclose(found["im_0.jpg"].boxes, [[0.4, 0.4, 0.6, 0.55]], rtol=1e-6)
    assert "are read as polygons; if they are keypoints, give class_list=data.yaml" in caplog.text
    caplog.clear()
    write(folder, {"data.yaml": "names: [person]\n"})
    read(folder, annotations="labels")
    write(folder, {"labels/im_0.txt": "0 0.5 0.5 0.4 0.4"})
    (folder / "data.yaml").unlink()
    read(folder, annotations="labels")
    assert "read as polygons" not in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: [a, b]", {1: "a", 2: "b"}),
        ("names: {0: a, 1: b}", {1: "a", 2: "b"}),
        ("names: {1: b, 0: a}", {1: "a", 2: "b"}),
        ("names: {0: a, 2: c}\nnc: 3", {1: "a", 3: "c"}),
        ("names: {'0': a, '7': b}", {1: "a", 8: "b"}),
        ("names: [1, 2]\nnc: 2", {1: "1", 2: "2"}),
        ("names:\n- ' a  b '\n- e\u0301\nnc: '2'", {1: "a b", 2: "é"}),
        ("train: x\nnc: 1\nnames: ['yes']\nkpt_shape: [17, 3]", {1: "yes"}),
        ("names: [yes, no]", {1: "yes", 2: "no"}),
    ],
)
def test_data_yaml_names_the_classes(folder, text, expected):
    write(folder, {"data.yaml": text})
    assert lists.read_class_list(folder / "data.yaml", 1) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b]\nnc: 3", "nc says 3 classes, names has 2"),
        ("names: [a, a]", "has 'a' twice, as class 1 and 2; names must differ"),
        (
            "names: [true, false]",
            "names, class 0: a class name must be text; given true.*in quotes",
        ),
        ("names: [a, null]", "class 1: a class name must be text; given null"),
        ("names: [a, '']", "class 1: a class name must be text; given ''"),
        ("names: [[a], [b]]", "class 0: a class name must be text"),
        ("names: {a: 0, b: 1}", "names must be a list of names, or a mapping of ids"),
        ("names: {-1: a}", "ids of names are 0 to 10000; given -1"),
        ("names: {3000000000: a}", "ids of names are 0 to 10000; given 3000000000"),
        ("names: 5", "names must be a list of names.*given 5"),
        ("names: cat", "names must be a list of names.*given cat"),
        ("names: []", "names no class"),
        ("nc: 3", "names no class"),
        ("nc: many\nnames: [a]", "nc must be the number of classes; given many"),
        ("kpt_shape: 17\nnames: [a]", r"kpt_shape must be \[number of keypoints.*given 17"),
        ("kpt_shape: [17, 5]\nnames: [a]", r"kpt_shape must be \[number of keypoints"),
        ("[a, b]", "must contain keys and values"),
        ("names: [a", "not valid YAML"),
        ("", "must contain keys and values"),
        ("names: !!python/object:os.system [a]", "not valid YAML"),
    ],
)
def test_a_wrong_data_yaml_is_refused_by_name(folder, text, message):
    write(folder, {"data.yaml": text})
    with pytest.raises(UserError, match=f"data.yaml.*{message}"):
        lists.read_class_list(folder / "data.yaml", 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "cat\n\ndog\n", "c.txt: line 2 is blank; the lines number the classes"),
        ("c.txt", "\n \n", "c.txt names no class"),
        ("c.txt", "cat\ndog\ncat \n", "has 'cat' twice, as class 1 and 3"),
        ("c.txt", "x\n" + "\n".join(map(str, range(10_000))), "names 10,001 classes; at most"),
        ("c.json", '["cat"]', "must be a text file with one name per line, or a data.yaml"),
    ],
)
def test_class_lists_that_would_number_wrongly_are_told(folder, name, text, message):
    write(folder, {name: text})
    with pytest.raises(UserError, match=message):
        lists.read_class_list(folder / name, 1)


def test_a_class_list_that_lies_near_is_mentioned(folder, caplog):
    write(folder, {"labels/train/im_0.txt": "0 0.5 0.5 0.1 0.1", "data.yaml": "names: [a]"})
    read(folder, annotations="labels/train")
    assert f"are they in {folder}/data.yaml? (class_list)" in caplog.text
    write(folder, {f"xml/im_{i}.xml": voc(thing(7, 5, 36, 24, name="a")) for i in range(3)})
    with pytest.raises(UserError, match=r"others need class_list.*\(class_list=.*data.yaml\?\)"):
        read(folder, annotations="xml")


# --- Which label belongs to which image -------------------------------------------------------


def two_cameras(folder):
    for camera in (1, 2):
        (folder / f"cams/cam{camera}").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(folder / f"cams/cam{camera}/0001.png")


def test_masks_and_labels_belong_to_the_image_of_their_path(folder):
    two_cameras(folder)
    for camera in (1, 2):
        (folder / f"masks/cam{camera}").mkdir(parents=True)
        save_mask(folder, f"cam{camera}/0001.png", np.full((40, 60), camera))
        write(folder, {f"labels/cam{camera}/0001.txt": f"{camera} 0.5 0.5 0.2 0.2"})
    found, _ = read(folder, images="cams", masks="masks")
    values = {name: np.asarray(Image.open(io.BytesIO(r.mask))).max() for name, r in found.items()}
    assert values == {"cam1/0001.png": 1, "cam2/0001.png": 2}
    found, _ = read(folder, images="cams", annotations="labels")
    assert [found[f"cam{c}/0001.png"].classes[0] for c in (1, 2)] == [2, 3]


def test_a_mask_for_two_images_is_refused(folder):
    two_cameras(folder)
    save_mask(folder, "0001.png", np.zeros((40, 60)))
    with pytest.raises(UserError, match="'cam1/0001.png' and 'cam2/0001.png' would have the same"):
        read(folder, images="cams", masks="masks")
    write(folder, {"l.txt": "cam1/0001.png\n"})
    (folder / "masks/cam1").mkdir()
    (folder / "masks/0001.png").rename(folder / "masks/cam1/0001.png")
    assert [*read(folder, images="cams", masks="masks", image_list="l.txt")[0]] == ["cam1/0001.png"]


def test_labels_without_an_image_are_skipped_where_that_is_allowed(folder):
    write(folder, {f"xml/im_{i}.xml": voc() for i in range(3)} | {"xml/gone.xml": voc()})
    found, problems = read(folder, annotations="xml", on_bad_record="skip")
    assert len(found) == 3 and "1 annotations" in problems.messages[0]


def test_hidden_files_and_links_among_labels_are_counted_or_followed(folder):
    write(folder, {"store/im_1.txt": "1 0.5 0.5 0.2 0.2", "labels/im_0.txt": ""})
    (folder / "labels/more").symlink_to(folder / "store")
    (folder / "labels/round").symlink_to(folder / "labels")
    (folder / "labels/._im_0.txt").write_bytes(b"\x00\x05\x16\x07" + bytes(40))
    (folder / "labels/notes.docx").write_bytes(b"PK")
    found, problems = read(folder, annotations="labels")
    assert found["im_1.jpg"].classes.tolist() == [2]
    assert {kind: count for kind, (count, _) in problems.left_out.items()} == {
        "hidden files and folders": 1, "links to folders that are read already": 1,
        ".docx files": 1,
    }  # fmt: skip


def test_a_folder_of_another_kind_is_told(folder):
    write(folder, {"json/train.json": "{}", "xml/im_0.xml": voc(), "xml/im_0.txt": "x"})
    with pytest.raises(UserError, match="is it the COCO file .*json/train.json?"):
        read(folder, annotations="json")
    write(folder, {f"xml/im_{i}.xml": voc() for i in range(3)})
    _, problems = read(folder, annotations="xml")
    assert problems.left_out["text files beside XML files"][0] == 1


# --- Lists of images -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("im_0\nim_0.jpg\n", ["im_0.jpg"]),
        ("./images/im_1.jpg\n", ["im_1.jpg"]),
        ("C:\\data\\IM_1.JPG\n", ["im_1.jpg"]),
        ("# the good ones\nim_2.jpg\n", ["im_2.jpg"]),
        ("im_0 1\nim_1 -1\nim_2  0\n", ["im_0.jpg", "im_2.jpg"]),
    ],
)
def test_an_image_list_takes_the_images_that_it_means(folder, text, names):
    write(folder, {"l.txt": text})
    assert sorted(read(folder, image_list="l.txt")[0]) == names


def test_names_that_end_in_a_number_are_no_columns(folder):
    for name in ("photo 0", "photo 1"):
        Image.new("RGB", (8, 8)).save(folder / f"images/{name}.jpg")
    write(folder, {"l.txt": "photo 1\n"})
    assert [*read(folder, image_list="l.txt")[0]] == ["photo 1.jpg"]


def test_repeated_and_unknown_names_of_lists_are_counted(folder):
    write(folder, {"l.txt": "im_0\nim_0.jpg\nim_1\nim_7\n", "x.txt": "im_1.jpg\nim_9.jpg\n"})
    with pytest.raises(UserError, match="1 images of the image list are not .*'im_7'; did you"):
        read(folder, image_list="l.txt")
    found, problems = read(
        folder, image_list="l.txt", exclude_lists=("x.txt",), on_bad_record="skip"
    )
    assert [*found] == ["im_0.jpg"] and len(problems.messages) == 1
    assert problems.left_out["names in exclude_lists without an image"] == [1, "im_9.jpg"]
    assert problems.left_out["names in lists of images named before"][0] == 1


def test_a_listed_stem_of_two_images_is_refused_with_both(folder):
    Image.new("RGB", (8, 8)).save(folder / "images/im_0.png")
    write(folder, {"l.txt": "im_0\n"})
    with pytest.raises(UserError, match="l.txt: 'im_0' can mean 'im_0.jpg' or 'im_0.png'"):
        read(folder, image_list="l.txt")


# --- Orientation --------------------------------------------------------------------------------


def turn(folder, orientation, size=(60, 40)):
    """im_0.jpg with pixels of `size` and an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(folder / "images/im_0.jpg", exif=exif)


@pytest.mark.parametrize(
    ("orientation", "stored", "listed", "shape", "told"),
    [
        (6, (60, 40), (40, 60), (60, 40), 0),  # listed as shown: turned
        (6, (60, 40), (60, 40), (40, 60), 0),  # listed as stored
        (6, (60, 40), None, (60, 40), 1),
        (3, (60, 40), (60, 40), (40, 60), 1),  # fits both
        (3, (60, 40), None, (40, 60), 1),
        (8, (50, 50), (50, 50), (50, 50), 1),
        (1, (60, 40), None, (40, 60), 0),
    ],
)
def test_the_annotated_size_decides_whether_an_image_is_turned(
    folder, orientation, stored, listed, shape, told
):
    turn(folder, orientation, stored)
    write(folder, {f"xml/im_{i}.xml": voc() for i in (1, 2)})
    write(folder, {"xml/im_0.xml": voc(thing(1, 1, 20, 10), size=listed)})
    found, problems = read(folder, annotations="xml")
    record = found["im_0.jpg"]
    assert (record.height, record.width) == shape and problems.turned == told
    np.testing.assert_allclose(record.boxes, [[0, 0, 10 / shape[0], 20 / shape[1]]], rtol=1e-6)
    as_stored = record.encoded == (folder / "images/im_0.jpg").read_bytes()
    assert as_stored == (orientation == 1 or (orientation == 6 and listed == stored))


def test_a_size_that_fits_neither_way_is_told_with_the_orientation(folder):
    turn(folder, 6)
    write(folder, {f"xml/im_{i}.xml": voc() for i in (1, 2)})
    write(folder, {"xml/im_0.xml": voc(thing(1, 1, 20, 10), size=(30, 30))})
    with pytest.raises(
        UserError, match="image im_0.jpg, turned as its EXIF orientation says: .*is 3"
    ):
        read(folder, annotations="xml")


def test_yolo_boxes_refer_to_the_image_as_shown_and_this_is_told(folder):
    turn(folder, 6)
    write(folder, {"labels/im_0.txt": "0 0.5 0.25 0.2 0.1"})
    found, problems = read(folder, annotations="labels")
    assert (found["im_0.jpg"].height, found["im_0.jpg"].width) == (60, 40)
    assert (problems.turned, problems.first_turned) == (1, "im_0.jpg")


@pytest.mark.parametrize(("mask", "shape"), [((60, 40), (60, 40)), ((40, 60), (40, 60))])
def test_the_size_of_a_mask_decides_too(folder, mask, shape):
    turn(folder, 6)
    for index in (1, 2):
        save_mask(folder, f"im_{index}.png", np.zeros((40, 60)))
    save_mask(folder, "im_0.png", np.zeros(mask))
    found, problems = read(folder, masks="masks")
    assert (found["im_0.jpg"].height, found["im_0.jpg"].width) == shape and not problems.turned


# --- Whatever is in a file ------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["0", "1", "0.5", "0.1", "-1", "1e999", "nan", "1_0", "0,5", "٣", "9" * 400, "\x00", "é", "#"]
) | st.text(max_size=4)
TAGS = st.sampled_from(
    ["annotation", "object", "name", "size", "width", "height", "bndbox", "xmin", "ymin", "xmax",
     "ymax", "difficult", "x:y", "é", ""]
)  # fmt: skip
XML = st.recursive(
    WORDS | st.sampled_from(["<![CDATA[<]]>", "&amp;", "&x;", "<!-- -->", "<?x?>", "<", "dog"]),
    lambda inner: st.builds(
        lambda tag, parts, end: f"<{tag}>{''.join(parts)}</{end or tag}>",
        TAGS, st.lists(inner, max_size=5), st.just("") | TAGS,
    ),
    max_leaves=12,
)  # fmt: skip
FUZZ = hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)


@FUZZ
@hypothesis.given(lines=st.lists(st.lists(WORDS, max_size=8).map(" ".join), max_size=4))
def test_any_lines_of_yolo_are_read_or_told(folder, lines):
    path = folder / "labels/im_0.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with told():
        read(folder, annotations="labels")


@FUZZ
@hypothesis.given(body=XML | st.binary(max_size=30), root=st.booleans())
def test_any_xml_is_read_or_told(folder, body, root):
    write(folder, {f"xml/im_{i}.xml": voc() for i in range(3)})
    data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    data = b"<annotation>" + data + b"</annotation>" if root else data
    (folder / "xml/im_0.xml").write_bytes(data)
    with told():
        read(folder, annotations="xml")

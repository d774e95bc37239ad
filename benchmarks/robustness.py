"""Tries faulty and unusual inputs and compares how each ended with what should happen.

    python benchmarks/robustness.py [--group=coco] [--markdown=CASES.md]

A case writes its files to a new folder and reads them as `prepare_data` would. Expected are numbers
of images and boxes, or words of the one-line message that refuses the input. Any exception other
than a `UserError` counts as a traceback and a failure. The exit status is 1 if a case failed.
"""

import argparse
import collections
import io
import json
import logging
import multiprocessing
import os
import pathlib
import resource
import struct
import sys
import tarfile
import tempfile
import traceback

import numpy as np
from PIL import Image

from official_selftrain import config as config_lib
from official_selftrain.data import records, sources
from official_selftrain.utils.errors import UserError

# Limits per case, so that one that reads without end fails without exhausting the machine.
MEMORY, SECONDS = 8 * 2**30, 40
CASES = []
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 20, 50, 40]}
ONE = {"id": 1, "file_name": "a.png", "width": 128, "height": 100}
SQUARE = [{"id": 1, "name": "square"}]


def case(group, what, **expected):
    """Registers a function folder -> fields of a source.

    Args:
        group: group of the case in the table.
        what: description of the input.
        expected: `told`, the words that the refusal must contain, separated by |; or numbers in
            the summary: `images`, `boxes`, `skipped`, `left_out`.
    """

    def register(function):
        CASES.append((group, what, function, expected))
        return function

    return register


# --- Files -----------------------------------------------------------------------------------


def picture(path, height=100, width=128, seed=0, mode=None, **settings):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), "uint8")
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **settings)


def coco(folder, images=(ONE,), annotations=(BOX,), categories=SQUARE, pictures=True, **more):
    """`t.json` and the images it lists; `more` are fields of the source."""
    if pictures:
        for image in images:
            picture(folder / "images" / str(image["file_name"]), seed=hash(str(image["id"])) % 99)
    content = {"images": images, "annotations": annotations, "categories": categories}
    return raw(folder, json.dumps(content), **more)


def raw(folder, text, **more):
    """`t.json` as given."""
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "t.json").write_bytes(data)
    if not (folder / "images").exists():
        picture(folder / "images/a.png")
    return {"images": "images", "annotations": "t.json", **more}


def per_image(folder, files, **more):
    """Label files `labels/NAME`, and an image `images/a.png` unless there are images already."""
    for name, data in files.items():
        path = folder / "labels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    if not (folder / "images").exists():
        picture(folder / "images/a.png")
    return {"images": "images", "annotations": "labels", **more}


def voc(*corners, name="cat", size="<size><width>128</width><height>100</height></size>"):
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, corners, strict=True))
    thing = f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
    return f"<annotation>{size}{thing}</annotation>"


def masks(folder, values, suffix=".png", names=("a",), **more):
    for name in names:
        picture(folder / f"images/{name}.png")
        path = folder / f"masks/{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((100, 128), "uint8")
        for index, value in enumerate(values):
            mask[20 * index : 20 * index + 20] = value
        Image.fromarray(mask).save(path)
    return {"images": "images", "masks": "masks", **more}


def tfrecord(folder, count=4, options=None, change=None, **more):
    import tensorflow as tf

    picture(folder / "a.png", 40, 50)
    encoded = (folder / "a.png").read_bytes()
    with tf.io.TFRecordWriter(str(folder / "r.tfrecord"), options) as writer:
        for index in range(count):
            one = records.ImageRecord(index, encoded, 40, 50, f"{index}.png", [[0, 0, 1, 1]], [1])
            data = records.to_example(one)
            writer.write(change(index, data) if change else data)
    return {"records": "r.tfrecord", **more}


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


# --- COCO ------------------------------------------------------------------------------------

SKIP = {"on_bad_record": "skip"}


@case("coco", "train2017's box of height 0 beside a good one", images=1, boxes=1, left_out=1)
def _(folder):
    flat = BOX | {"id": 918, "bbox": [29.65, 38.33, 1.03, 0.0], "area": 0.0}
    return coco(folder, annotations=[BOX, flat])


def _coco_annotation(what, change, told=None, **skipped):
    """A faulty annotation next to a valid one: reported, or only it is skipped if allowed."""
    annotations = [BOX, BOX | {"id": 2} | change]
    if told:
        case("coco", what, told=told)(lambda folder: coco(folder, annotations=annotations))
        case("coco", f"{what}; skip", **{"images": 1, "boxes": 1, "skipped": 1} | skipped)(
            lambda folder: coco(folder, annotations=annotations, **SKIP)
        )
    else:
        case("coco", what, **{"images": 1, "boxes": 2} | skipped)(
            lambda folder: coco(folder, annotations=annotations)
        )


_coco_annotation("box 20 pixels over the edge", {"bbox": [90, 20, 58, 40]}, "t.json|2|leaves")
_coco_annotation("bbox of three numbers", {"bbox": [1, 2, 3]}, "t.json|2|four numbers")
_coco_annotation("bbox null", {"bbox": None}, "t.json|2|bbox")
_coco_annotation("bbox of text", {"bbox": ["a", 1, 2, 3]}, "t.json|2|bbox")
_coco_annotation("bbox with 1e400", {"bbox": [1, 2, 10**400, 3]}, "t.json|2|bbox")
_coco_annotation("bbox with NaN", {"bbox": [float("nan"), 2, 3, 4]}, "t.json|2")
_coco_annotation("bbox of negative width", {"bbox": [90, 20, -50, 40]}, "t.json|2")
_coco_annotation("category unknown", {"category_id": 7}, "t.json|2|7|square")
_coco_annotation("category null", {"category_id": None}, "t.json|2|category")
_coco_annotation("category a list", {"category_id": [1]}, "t.json|2|category")
_coco_annotation("iscrowd a list", {"iscrowd": [0]}, "t.json|2|iscrowd")
_coco_annotation("area negative", {"area": -5}, "t.json|2|area")
_coco_annotation("area NaN", {"area": float("nan")}, "t.json|2|area")
_coco_annotation("area a list", {"area": [5]}, "t.json|2|area")
_coco_annotation("fractions in place of pixels", {"bbox": [0.1, 0.1, 0.5, 0.5]}, "2|fractions")
_coco_annotation("iscrowd true", {"iscrowd": True})
_coco_annotation("score and attributes of other tools", {"attributes": {"occluded": True}})


@case("coco", "polygon without bbox", images=1, boxes=1)
def _(folder):
    polygon = {k: v for k, v in BOX.items() if k != "bbox"}
    return coco(folder, annotations=[polygon | {"segmentation": [[30, 20, 80, 20, 80, 60]]}])


for _name, _content in {
    "top level a number": 5,
    "top level null": None,
    "top level a list of names": ["images", "categories"],
    "images null": {"images": None, "categories": SQUARE},
    "images a list of numbers": {"images": [1], "categories": SQUARE},
    "annotations a dict": {"images": [ONE], "annotations": {}, "categories": SQUARE},
    "annotations numbers": {"images": [ONE], "annotations": [1], "categories": SQUARE},
    "categories a dict": {"images": [ONE], "annotations": [], "categories": {"1": "a"}},
    "category id 3 000 000 000": {
        "images": [ONE],
        "annotations": [BOX | {"category_id": 3 * 10**9}],
        "categories": [{"id": 3 * 10**9, "name": "a"}],
    },
    "category id 10^30": {"images": [ONE], "categories": [{"id": 10**30, "name": "a"}]},
    "category name null": {"images": [ONE], "categories": [{"id": 1, "name": None}]},
    "two categories with one id": {
        "images": [ONE],
        "annotations": [BOX],
        "categories": [*SQUARE, {"id": 1, "name": "b"}],
    },
    "two ids with one name": {
        "images": [ONE],
        "annotations": [BOX],
        "categories": [*SQUARE, {"id": 2, "name": "square"}],
    },
    "file_name a number": {"images": [ONE | {"file_name": 5}], "categories": SQUARE},
    "file_name null": {"images": [ONE | {"file_name": None}], "categories": SQUARE},
    "file_name with NUL": {"images": [ONE | {"file_name": "a\0.png"}], "categories": SQUARE},
    "file_name with a lone surrogate": {
        "images": [ONE | {"file_name": "a\ud800.png"}],
        "categories": SQUARE,
    },
    "file_name /dev/zero": {"images": [ONE | {"file_name": "/dev/zero"}], "categories": SQUARE},
    "file_name ../../etc/passwd": {
        "images": [ONE | {"file_name": "../../../../etc/passwd"}],
        "categories": SQUARE,
    },
    "image id a list": {"images": [ONE | {"id": [1]}], "annotations": [BOX], "categories": SQUARE},
    "width text": {"images": [ONE | {"width": "wide"}], "categories": SQUARE},
    "an image twice": {
        "images": [ONE, ONE | {"id": 2}],
        "annotations": [BOX],
        "categories": SQUARE,
    },
    "an annotation of an absent image": {
        "images": [ONE],
        "annotations": [BOX, BOX | {"id": 2, "image_id": 77}],
        "categories": SQUARE,
    },
}.items():
    case("coco", _name, told="t.json")(
        lambda folder, content=_content: raw(folder, json.dumps(content))
    )


@case("coco", "an image twice; skip", images=1)
def _(folder):
    return coco(folder, images=[ONE, ONE | {"id": 2}], **SKIP)


@case("coco", "an annotation of an absent image; skip", images=1, boxes=1)
def _(folder):
    return coco(folder, annotations=[BOX, BOX | {"id": 2, "image_id": 77}], **SKIP)


@case("coco", "100,000 nested brackets", told="t.json")
def _(folder):
    return raw(folder, "[" * 100_000)


@case("coco", "half a file", told="t.json|JSON")
def _(folder):
    return raw(folder, '{"images": [')


@case("coco", "an empty file", told="t.json")
def _(folder):
    return raw(folder, "")


@case("coco", "binary garbage", told="t.json")
def _(folder):
    return raw(folder, bytes(range(256)))


@case("coco", "UTF-8 byte order mark", images=1, boxes=1)
def _(folder):
    settings = coco(folder)
    text = (folder / "t.json").read_bytes()
    (folder / "t.json").write_bytes(b"\xef\xbb\xbf" + text)
    return settings


@case("coco", "UTF-16", images=1, boxes=1)
def _(folder):
    settings = coco(folder)
    (folder / "t.json").write_text((folder / "t.json").read_text(), encoding="utf-16")
    return settings


@case("coco", "image ids that are strings", images=1, boxes=1)
def _(folder):
    return coco(folder, [ONE | {"id": "frame_a"}], [BOX | {"image_id": "frame_a"}])


@case("coco", "image ids that are whole floats", images=1, boxes=1)
def _(folder):
    return coco(folder, [ONE | {"id": 1.0}], [BOX | {"image_id": 1.0}])


@case("coco", "width 128.0 and height 0", images=1, boxes=1)
def _(folder):
    return coco(folder, [ONE | {"width": 128.0, "height": 0}])


@case("coco", "annotations null", images=1, boxes=0)
def _(folder):
    content = {"images": [ONE], "annotations": None, "categories": SQUARE}
    return raw(folder, json.dumps(content))


@case("coco", "another size, as after scaling", told="a.png|64 x 50|128 x 100")
def _(folder):
    return coco(folder, [ONE | {"width": 64, "height": 50}])


@case("coco", "no category at all", told="t.json|categor")
def _(folder):
    return coco(folder, categories=[])


# --- Names -----------------------------------------------------------------------------------


def _named(what, stored, listed, **expected):
    def build(folder):
        picture(folder / "images" / stored)
        return coco(folder, [ONE | {"file_name": listed}], pictures=False)

    case("names", what, **expected or {"images": 1, "boxes": 1})(build)


_named("composed in the list, decomposed on disk", "Cafe\u0301.png", "Caf\u00e9.png")
_named("decomposed in the list, composed on disk", "Caf\u00e9.png", "Cafe\u0301.png")
_named("backslashes", "site a/p 1.PNG", "site a\\p 1.PNG")
_named("percent escapes", "q 2.png", "q%202.png")
_named("the folder's name in front", "q 2.png", "images/q 2.png")
_named("a path of another machine", "q.png", "/data/upload/1/q.png")
_named("a bare name of a file in a sub-folder", "deep/er/q.png", "q.png")
_named("other letter case", "Q.PNG", "q.png")
_named("a no-break space", "q\u00a02.png", "q 2.png")
_named("near, but another name", "cat_1.png", "cat_2.png", told="cat_2.png|cat_1.png")
_named("./ in front", "a.png", "./a.png")


@case("names", "two files fit", told="q.png|x/q.png|y/q.png")
def _(folder):
    for place in ("x", "y"):
        picture(folder / f"images/{place}/q.png")
    return coco(folder, [ONE | {"file_name": "q.png"}], pictures=False)


@case("names", "equal stems in two folders, masks in equal folders", images=2)
def _(folder):
    return masks(folder, [0, 1], names=("cam1/0001", "cam2/0001"))


@case("names", "equal stems in two folders, YOLO labels in equal folders", images=2, boxes=2)
def _(folder):
    for cam in ("cam1", "cam2"):
        picture(folder / f"images/{cam}/0001.png")
    line = "0 0.5 0.5 0.2 0.2"
    return per_image(folder, {"cam1/0001.txt": line, "cam2/0001.txt": line})


@case("names", "equal stems in two folders, masks side by side", told="0001")
def _(folder):
    settings = masks(folder, [0, 1], names=("0001",))
    (folder / "images/0001.png").unlink()
    for cam in ("cam1", "cam2"):
        picture(folder / f"images/{cam}/0001.png")
    return settings


@case("names", "a name that is not UTF-8", told="xff")
def _(folder):
    picture(folder / "images/a.png")
    name = os.fsencode(folder) + b"/images/\xff\xfe.png"
    pathlib.Path(os.fsdecode(name)).write_bytes((folder / "images/a.png").read_bytes())
    return {"images": "images"}


@case("names", "a name that is not UTF-8; skip", images=1, skipped=1)
def _(folder):
    picture(folder / "images/a.png")
    name = os.fsencode(folder) + b"/images/\xff\xfe.png"
    pathlib.Path(os.fsdecode(name)).write_bytes((folder / "images/a.png").read_bytes())
    return {"images": "images", **SKIP}


for _folder in ("trip [2023]", "a,b", "a*b", "q?", "{x}", "100%", "lr=0.01", "tab\there", "é"):

    @case("names", f"images in a folder called {_folder!r}", images=1)
    def _(folder, name=_folder):
        picture(folder / name / "a.png")
        return {"images": name}

    @case("names", f"TFRecords in a folder called {_folder!r}", images=4, boxes=4)
    def _(folder, name=_folder):
        tfrecord(folder)
        (folder / name).mkdir()
        (folder / "r.tfrecord").rename(folder / name / "r.tfrecord")
        return {"records": f"{name}/r.tfrecord"}


@case("names", "a glob over folders of TFRecords", images=8)
def _(folder):
    for place in ("x", "y"):
        (folder / place).mkdir()
        tfrecord(folder)
        (folder / "r.tfrecord").rename(folder / place / "r.tfrecord")
    return {"records": "*/r.tfrecord"}


@case("names", "an image list with a byte order mark and CRLF", images=1)
def _(folder):
    picture(folder / "images/a.png")
    picture(folder / "images/b.png")
    (folder / "l.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n")
    return {"images": "images", "image_list": "l.txt"}


@case("names", "an image list with an absent image", told="b.png")
def _(folder):
    picture(folder / "images/a.png")
    (folder / "l.txt").write_text("a.png\nb.png\n")
    return {"images": "images", "image_list": "l.txt"}


# --- VOC and YOLO ----------------------------------------------------------------------------

CAT = {"class_list": "c.txt"}


def _classes(folder, data=b"cat\ndog\n"):
    (folder / "c.txt").write_bytes(data)


def _voc(what, data, more=None, classes=b"cat\ndog\n", **expected):
    def build(folder):
        _classes(folder, classes)
        return per_image(folder, {"a.xml": data}, **CAT, **more or {})

    case("voc", what, **expected)(build)


LATIN = f"<?xml version='1.0' encoding='ISO-8859-1'?>{voc(1, 1, 20, 20, name='Vélo')}"
_voc("ISO-8859-1, declared", LATIN.encode("latin-1"), classes="Vélo".encode(), images=1, boxes=1)
_voc("UTF-16", f"<?xml version='1.0' encoding='UTF-16'?>{voc(1, 1, 20, 20)}".encode("utf-16"),
     images=1, boxes=1)  # fmt: skip
_voc("byte order mark", b"\xef\xbb\xbf" + voc(1, 1, 20, 20).encode(), images=1, boxes=1)
_voc("class list with a byte order mark", voc(1, 1, 20, 20), classes=b"\xef\xbb\xbfcat\r\n",
     images=1, boxes=1)  # fmt: skip
_voc("no size, float corners", voc(1.5, 1.5, 20.2, 20.7, size=""), images=1, boxes=1)
_voc("half a file", voc(1, 1, 20, 20)[:60], told="a.xml|XML")
_voc("another schema", "<kml><a/></kml>", told="a.xml|kml")
_voc("200,000 nested elements", "<a>" * 200_000 + "</a>" * 200_000, told="a.xml")
_voc("corners as text", voc("left", 1, 20, 20), told="a.xml|xmin")
_voc("corners NaN", voc("nan", 1, 20, 20), told="a.xml")
_voc("corners 1e400", voc("1e400", 1, 20, 20), told="a.xml")
_voc("corners swapped", voc(20, 20, 1, 1), told="a.xml")
_voc("corners swapped; skip", voc(20, 20, 1, 1), SKIP, images=1, boxes=0, skipped=1)
_voc("unknown class", voc(1, 1, 20, 20, name="catt"), told="a.xml|catt|cat")
_voc("entities that grow", '<!DOCTYPE l [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
     + voc(1, 1, 20, 20, name="&b;"), told="a.xml")  # fmt: skip


@case("voc", "macOS copies ._a.jpg and ._a.xml", images=1, boxes=1)
def _(folder):
    _classes(folder)
    picture(folder / "images/a.png")
    (folder / "images/._a.png").write_bytes(b"\0\5\x16\7" + bytes(40))
    junk = b"\0\5\x16\7" + bytes(40)
    return per_image(folder, {"a.xml": voc(1, 1, 20, 20), "._a.xml": junk}, **CAT)


def _yolo(what, text, yaml=None, more=None, **expected):
    def build(folder):
        _classes(folder)
        if yaml:
            (folder / "data.yaml").write_text(yaml)
        lists = {"class_list": "data.yaml"} if yaml else CAT
        return per_image(folder, {"a.txt": text}, **lists, **more or {})

    case("yolo", what, **expected)(build)


_yolo("byte order mark", "\ufeff0 0.5 0.5 0.2 0.2", images=1, boxes=1)
_yolo("a confidence at the end", "0 0.5 0.5 0.2 0.2 0.9", told="a.txt|confidence")
_yolo("class 0.0", "0.0 0.5 0.5 0.2 0.2", told="a.txt")
_yolo("class 10^20", f"{10**20} 0.5 0.5 0.2 0.2", told="a.txt")
_yolo("pixels", "0 50 50 20 20", told="a.txt|fractions")
_yolo("commas", "0,0.5,0.5,0.2,0.2", told="a.txt")
_yolo("one bad line of two; skip", "0 0.5 0.5 0.2 0.2\n0 x", more=SKIP, images=1, skipped=1)
_yolo("a box without an area", "0 0.5 0.5 0 0.2", images=1, boxes=0, left_out=1)
_yolo("an empty file", "", images=1, boxes=0)
_yolo("blank lines", "\n\n0 0.5 0.5 0.2 0.2\n\n", images=1, boxes=1)
_yolo("polygon", "0 0.1 0.1 0.5 0.1 0.5 0.5", images=1, boxes=1)
_yolo("pose with (x, y) points", "0 0.5 0.5 0.4 0.4 0.45 0.45 0.55 0.55 0.5 0.6",
      "names: [cat]\nkpt_shape: [3, 2]\n", images=1, boxes=1)  # fmt: skip
_yolo("names as a mapping", "3 0.5 0.5 0.2 0.2", "names: {0: a, 3: d}\n", images=1, boxes=1)
_yolo("names a number", "0 0.5 0.5 0.2 0.2", "names: 5\n", told="data.yaml|names")
_yolo("names of names", "0 0.5 0.5 0.2 0.2", "names: [[a], [b]]\n", told="data.yaml|names")
_yolo("nc of another number", "0 0.5 0.5 0.2 0.2", "nc: 3\nnames: [a]\n", told="data.yaml|nc")
_yolo("data.yaml that is no YAML", "0 0.5 0.5 0.2 0.2", "names: [a\n", told="data.yaml")


# --- Images ----------------------------------------------------------------------------------


def _file(what, name, data, more=None, **expected):
    def build(folder):
        picture(folder / "images/a.png")
        (folder / "images" / name).write_bytes(data)
        return {"images": "images", **(more or {})}

    case("images", what, **expected)(build)


_file("an empty JPEG", "b.jpg", b"", told="b.jpg|empty")
_file("text called .jpg", "b.jpg", b"<html>not found</html>", told="b.jpg")
_file("an empty JPEG; skip", "b.jpg", b"", images=1, skipped=1, more=SKIP)
_file("hidden files", ".b.jpg", b"x", images=1, left_out=1)
_file("a suffix nobody reads", "b.xyz", b"x", images=1, left_out=1)


def _half_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), "uint8")).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()[:2000]


_file("half a JPEG", "b.jpg", _half_jpeg(), told="b.jpg")


def _saved(what, name, image, **expected):
    def build(folder):
        (folder / "images").mkdir()
        image().save(folder / "images" / name)
        return {"images": "images"}

    case("images", what, **expected or {"images": 1})(build)


def _noise(dtype, scale=1):
    return Image.fromarray((np.random.default_rng(0).random((60, 80)) * scale).astype(dtype))


_saved("float TIFF of 0 to 1", "f.tif", lambda: _noise("float32"))
_saved("float TIFF of 0 to 1e6", "f.tif", lambda: _noise("float32", 1e6), told="f.tif")
_saved("16-bit PNG", "f.png", lambda: _noise("uint16", 65535))
_saved("1 bit", "f.png", lambda: Image.new("1", (50, 40), 1))
_saved("CMYK JPEG", "f.jpg", lambda: Image.new("CMYK", (50, 40)))
_saved("palette GIF", "f.gif", lambda: Image.new("P", (50, 40)))
_saved("transparent PNG", "f.png", lambda: Image.new("RGBA", (50, 40)))
_saved(".jfif", "f.jfif", lambda: Image.new("RGB", (50, 40)).convert("RGB"))
_saved(".jpe", "f.jpe", lambda: Image.new("RGB", (50, 40)))
_saved("one pixel", "f.png", lambda: Image.new("RGB", (1, 1)))


@case("images", "a PNG that says 50,000 x 50,000", told="b.png|50000|pixels")
def _(folder):
    picture(folder / "images/a.png")
    import zlib

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    (folder / "images/b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + pixels)
    return {"images": "images"}


@case("images", "189 megapixels of one bit", images=1)
def _(folder):
    (folder / "images").mkdir()
    Image.new("1", (14_000, 13_500)).save(folder / "images/big.png")
    return {"images": "images"}


@case("images", "a link to /dev/zero", told="x.jpg")
def _(folder):
    picture(folder / "images/a.png")
    (folder / "images/x.jpg").symlink_to("/dev/zero")
    return {"images": "images", "image_list": _list(folder, "x.jpg")}


@case("images", "a pipe", told="f.jpg")
def _(folder):
    picture(folder / "images/a.png")
    os.mkfifo(folder / "images/f.jpg")
    return {"images": "images", "image_list": _list(folder, "f.jpg")}


def _list(folder, *names):
    (folder / "l.txt").write_text("".join(f"{name}\n" for name in names))
    return "l.txt"


@case("images", "a link that leads nowhere", images=1, left_out=1)
def _(folder):
    picture(folder / "images/a.png")
    (folder / "images/x.jpg").symlink_to("nowhere.jpg")
    return {"images": "images"}


@case("images", "a linked sub-folder", images=3)
def _(folder):
    picture(folder / "images/c.png")
    for name in "ab":
        picture(folder / f"store/cam1/{name}.png")
    (folder / "images/cam1").symlink_to(folder / "store/cam1")
    return {"images": "images"}


@case("images", "a link to the folder itself", images=1)
def _(folder):
    picture(folder / "images/c.png")
    (folder / "images/again").symlink_to(folder / "images")
    return {"images": "images"}


@case("images", "a hidden folder as a class", images=1)
def _(folder):
    for name in ("cat", ".ipynb_checkpoints"):
        picture(folder / f"images/{name}/a.png")
    return {"images": "images", "label_by_folder": True}


@case("images", "a folder without images", told="images")
def _(folder):
    (folder / "images").mkdir()
    return {"images": "images"}


@case("images", "a folder that does not exist", told="imagess|images")
def _(folder):
    (folder / "images").mkdir()
    return {"images": "imagess"}


@case("images", "orientation 6, annotated as shown", images=1, boxes=1)
def _(folder):
    _turned(folder)
    return coco(folder, [ONE | {"file_name": "p.jpg", "width": 100, "height": 160}], pictures=False)


@case("images", "orientation 6, annotated as stored", images=1, boxes=1)
def _(folder):
    _turned(folder)
    return coco(folder, [ONE | {"file_name": "p.jpg", "width": 160, "height": 100}], pictures=False)


@case("images", "orientation 6, YOLO labels", images=1, boxes=1)
def _(folder):
    _turned(folder)
    _classes(folder)
    return per_image(folder, {"p.txt": "0 0.5 0.5 0.2 0.2"}, **CAT)


def _turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "images/p.jpg", 100, 160, exif=exif)


# --- Masks -----------------------------------------------------------------------------------


@case("masks", "class ids", images=1)
def _(folder):
    return masks(folder, [0, 1, 2])


@case("masks", "JPEG", told="a.jpg|JPEG")
def _(folder):
    return masks(folder, [0, 40, 80], ".jpg")


@case("masks", "0 and 255", told="255")
def _(folder):
    (folder / "c.txt").write_text("background\nobject\n")
    return masks(folder, [0, 255], **CAT)


@case("masks", "colors", told="a.png|color")
def _(folder):
    settings = masks(folder, [0])
    picture(folder / "masks/a.png")
    return settings


@case("masks", "another size", told="a.png|50 x 40")
def _(folder):
    settings = masks(folder, [0])
    Image.new("L", (50, 40)).save(folder / "masks/a.png")
    return settings


@case("masks", "a class that the list lacks", told="a.png|7")
def _(folder):
    (folder / "c.txt").write_text("background\nobject\n")
    return masks(folder, [0, 7], **CAT)


@case("masks", "no mask for an image", told="b.png")
def _(folder):
    settings = masks(folder, [0, 1])
    picture(folder / "images/b.png")
    return settings


@case("masks", "the mask is empty", told="a.png")
def _(folder):
    settings = masks(folder, [0, 1])
    (folder / "masks/a.png").write_bytes(b"")
    return settings


# --- Tars ------------------------------------------------------------------------------------


def tar(folder, change=None, count=2):
    with tarfile.open(folder / "t.tar", "w") as archive:
        for index in range(count):
            picture(folder / f"{index}.png", seed=index)
            archive.add(folder / f"{index}.png", f"{index}.png")
        if change:
            change(archive)
    return {"images": "t.tar"}


@case("tar", "a hard link to a member", images=3)
def _(folder):
    def change(archive):
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(member)

    return tar(folder, change)


@case("tar", "a symbolic link out of the archive", images=2, left_out=1)
def _(folder):
    def change(archive):
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)

    return tar(folder, change)


@case("tar", "cut at the end of a member", told="t.tar")
def _(folder):
    settings = tar(folder, count=6)
    with tarfile.open(folder / "t.tar") as archive:
        end = archive.getmembers()[3].offset
    data = (folder / "t.tar").read_bytes()
    (folder / "t.tar").write_bytes(data[:end])
    return settings


@case("tar", "cut in a member", told="t.tar")
def _(folder):
    settings = tar(folder, count=6)
    data = (folder / "t.tar").read_bytes()
    (folder / "t.tar").write_bytes(data[: len(data) // 2])
    return settings


@case("tar", "compressed", told="t.tar|compress")
def _(folder):
    import gzip

    settings = tar(folder)
    (folder / "t.tar").write_bytes(gzip.compress((folder / "t.tar").read_bytes()))
    return settings


@case("tar", "no tar", told="t.tar")
def _(folder):
    (folder / "t.tar").write_bytes(b"hello" * 1000)
    return {"images": "t.tar"}


# --- TFRecords -------------------------------------------------------------------------------


@case("tfrecord", "ours", images=4, boxes=4)
def _(folder):
    return tfrecord(folder)


@case("tfrecord", "gzip", images=4, boxes=4)
def _(folder):
    return tfrecord(folder, options="GZIP")


@case("tfrecord", "a flipped bit in record 2", told="r.tfrecord|record")
def _(folder):
    settings = tfrecord(folder)
    flipped(folder / "r.tfrecord", os.path.getsize(folder / "r.tfrecord") * 5 // 8)
    return settings


@case("tfrecord", "a flipped bit in record 2; skip", images=3, skipped=1)
def _(folder):
    settings = tfrecord(folder, **SKIP)
    flipped(folder / "r.tfrecord", os.path.getsize(folder / "r.tfrecord") * 5 // 8)
    return settings


@case("tfrecord", "cut in the middle", told="r.tfrecord|record")
def _(folder):
    settings = tfrecord(folder)
    data = (folder / "r.tfrecord").read_bytes()
    (folder / "r.tfrecord").write_bytes(data[: len(data) * 5 // 8])
    return settings


@case("tfrecord", "not an example", told="r.tfrecord|record 1")
def _(folder):
    return tfrecord(folder, change=lambda i, data: b"hello" if i == 1 else data)


@case("tfrecord", "no TFRecord at all", told="r.tfrecord")
def _(folder):
    (folder / "r.tfrecord").write_bytes(b"hello world, this is text" * 10)
    return {"records": "r.tfrecord"}


def _example(what, **features):
    """Record 1 with these bytes features, or lists of floats."""
    told = features.pop("told", "r.tfrecord|1")

    def change(index, data):
        import tensorflow as tf

        example = tf.train.Example.FromString(data)
        if index == 1:
            for key, value in features.items():
                name = "image/" + key.replace("__", "/")
                example.features.feature[name].Clear()
                if isinstance(value, bytes):
                    example.features.feature[name].bytes_list.value.append(value)
                elif all(isinstance(v, int) for v in value):
                    example.features.feature[name].int64_list.value.extend(value)
                else:
                    example.features.feature[name].float_list.value.extend(value)
        return example.SerializeToString()

    case("tfrecord", what, told=told)(lambda folder: tfrecord(folder, change=change))
    case("tfrecord", f"{what}; skip", images=3, skipped=1)(
        lambda folder: tfrecord(folder, change=change, **SKIP)
    )


_example("a file name that is not UTF-8", filename=b"\xff\xfe")
_example("an id that is not UTF-8", source_id=b"\xff\xfe")
_example("columns of unequal length", object__bbox__ymin=[0.1, 0.2])
_example("more classes than boxes", object__class__label=[1, 2, 3])
_example("class 0", object__class__label=[0])
_example("boxes in pixels", object__bbox__xmax=[40.5])
_example("an image that is text", encoded=b"hello")
_example("a corner that is NaN", object__bbox__xmax=[float("nan")])
_example("a class as a float", object__class__label=[1.5])


# --- Settings --------------------------------------------------------------------------------


def settings_case(what, *overrides, told):
    def build(folder):
        config_lib.resolve("folder", None, overrides)
        return None

    case("settings", what, told=told)(build)


settings_case("a misspelt key", "task.anchor_sise=3", told="task.anchor_sise|anchor_size")
settings_case("a key at the wrong place", "on_bad_record=skip", told="on_bad_record|human.on_bad")
settings_case("anchor_size -1", "task.anchor_size=-1", told="task.anchor_size")
settings_case("a seed of 1e20", "trainer.seed=1e20", told="trainer.seed")
settings_case("a batch of 1e9", "human.batch_size=1000000000", told="human.batch_size")
settings_case("a buffer of 1e11", "human.shuffle_buffer=100000000000", told="shuffle_buffer")
settings_case("1e9 threads", "runtime.input_threads=1000000000", told="input_threads")
settings_case("an infinite epsilon", "task.bn_epsilon=.inf", told="task.bn_epsilon")
settings_case("1e9 classes", "task.num_classes=1000000000", told="task.num_classes")
settings_case("a size of 100", "task.image_size=[100,100]", told="task.image_size|128")
settings_case("a size of a million", "task.image_size=[1280000,128]", told="task.image_size")
settings_case("5000 nested brackets", "task=" + "[" * 5000, told="")
settings_case("steps 0", "trainer.steps=0", told="trainer.steps")
settings_case("steps as text", "trainer.steps=many", told="trainer.steps|many")
settings_case("a section that is a number", "task=5", told="task")
settings_case("NaN as a rate", "optimizer.learning_rate=.nan", told="optimizer.learning_rate")


# --- Running them ----------------------------------------------------------------------------


def ended(function):
    """(kind, text, numbers) of a case, tried in a process of its own; the kind is `read`,
    `refused`, `traceback` or `no end`."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_child, args=(function, pathlib.Path(folder), sender))
        process.start()
        result = ("no end", f"within {SECONDS} s", {})
        if receiver.poll(SECONDS):
            try:
                result = receiver.recv()
            except EOFError:
                result = ("traceback", "the process died", {})
        process.kill()
        process.join()
    return result


def _child(function, folder, sender):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sender.send(_ended(function, folder))


def _ended(function, folder):
    try:
        fields = function(folder)
        if fields is None:
            return "read", "accepted", {}
        source = config_lib.model_from_dict(config_lib.SourceConfig, fields)
        summary = sources.prepare(source, lambda p: str(folder / p), str(folder / "o/x"))
    except UserError as error:
        return "refused", str(error).replace(str(folder), "…"), {}
    except Exception:
        return "traceback", traceback.format_exc(limit=-3), {}
    found = {
        "images": summary["images"],
        "boxes": summary["boxes"],
        "skipped": len(summary["skipped"]),
        "left_out": sum(count for count, _ in summary.get("left_out", {}).values()),
    }
    return "read", ", ".join(f"{count} {name}" for name, count in found.items() if count), found


def as_expected(kind, text, found, expected):
    if "told" in expected:
        return kind == "refused" and all(word in text for word in expected["told"].split("|"))
    return kind == "read" and all(found[name] == value for name, value in expected.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", help="run only this group of cases")
    parser.add_argument("--markdown", help="file to write a table of all cases to")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    counts, rows = collections.defaultdict(collections.Counter), []
    for group, what, function, expected in CASES:
        if options.group not in (None, group):
            continue
        kind, text, found = ended(function)
        good = as_expected(kind, text, found, expected)
        counts[group][kind] += 1
        counts[group]["not as expected"] += not good
        rows.append((group, what, kind, " ".join(text.split())))
        if not good:
            print(f"{group}: {what}: expected {expected}, {kind}: {text}\n")
    if options.markdown:
        shown = [f"| {g} | {w} | {k} | {t[:160].replace('|', '/')} |\n" for g, w, k, t in rows]
        head = "| group | input | ended | how |\n| --- | --- | --- | --- |\n"
        pathlib.Path(options.markdown).write_text(head + "".join(shown), encoding="utf-8")
    for group, count in counts.items():
        print(f"{group:<10} {dict(count)}")
    total = sum(counts.values(), collections.Counter())
    print(f"{len(rows)} cases: {dict(total)}")
    sys.exit(bool(total["not as expected"]))


if __name__ == "__main__":
    main()

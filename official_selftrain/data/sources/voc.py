"""PASCAL VOC XML as fields of records."""

import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from official_selftrain.data.sources.boxes import (
    Boxes,
    are_fractions,
    check_size,
    finite,
    number,
)
from official_selftrain.data.sources.lists import class_name, near_class_list
from official_selftrain.data.sources.per_image import PerImage
from official_selftrain.data.sources.record_errors import LeftOut, RecordErrors
from official_selftrain.utils.errors import UserError, did_you_mean
from official_selftrain.utils.files import read_bytes

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = {"": 0.0, "true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
# Every annotation has at least one of these.
KNOWN = ("object", "size", "filename")
ENCODING = re.compile(rb"""<\?xml[^>]*encoding=["']([A-Za-z0-9._-]+)["']""")


class Voc(PerImage):
    """PASCAL VOC XML, one file per image; corners are in pixels that count from 1.

    Objects marked difficult are read as crowds: not trained on, and neither right nor wrong in an
    evaluation. The path of a file tells its image; the `filename` in it is often wrong.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        paths: list[pathlib.Path],
        left_out: LeftOut,
        class_names: Mapping[int, str],
    ) -> None:
        names = class_names or dict(enumerate(("background", *CLASSES)))
        super().__init__(
            folder, paths, left_out, {key: name for key, name in names.items() if key > 0}
        )
        self._ids = {name: key for key, name in self.class_names.items()}
        self._default = not class_names

    def listed_size(self, path: pathlib.Path | None) -> tuple[float, float] | None:
        """(height, width) of an image in pixels as its XML states it, or None."""
        size = self._size(_root(path), path) if path else (0, 0)
        return size if all(size) else None

    def fields(
        self, path: pathlib.Path | None, height: int, width: int, errors: RecordErrors
    ) -> dict[str, Any]:
        """Labels of one image; see `annotations.Annotations`."""
        if path is None:
            raise UserError(
                f"it has no annotation in {self.folder}; an image without objects needs an XML "
                "without <object>; leave out other images by image_list"
            )
        root = _root(path)
        check_size(self._size(root, path), height, width, f"{path} says the image")
        boxes = Boxes(height, width, errors)
        for index, item in enumerate(root.findall("object")):
            try:
                self._add(boxes, item, path, f"{path}: object {index}")
            except UserError as error:
                errors.add(error)
        return {"dataset": self.folder.parent.name, **boxes.fields()}

    def _size(self, root: ElementTree.Element, path: pathlib.Path) -> tuple[float, float]:
        where = str(path)
        return _number(root, "size/height", where, 0.0), _number(root, "size/width", where, 0.0)

    def _add(self, boxes, item, path, where):
        label = self._class(item, where)
        corners = [_number(item, f"bndbox/{key}", where) for key in CORNERS]
        given = ", ".join(f"{k} {v:g}" for k, v in zip(CORNERS, corners, strict=True))
        if not finite(corners):
            raise UserError(f"{where}: a box coordinate is not a finite number; given {given}")
        x1, y1, x2, y2 = corners
        if x2 < x1 or y2 < y1:
            raise UserError(
                f"{where}: a box ends before it begins; given {given}. Are the corners swapped?"
            )
        if are_fractions(corners, boxes.height, boxes.width):
            raise UserError(f"{where}: {given} looks like fractions; VOC boxes are in pixels")
        difficult = _number(item, "difficult", where, 0.0) > 0
        boxes.add(where, given, (x1 - 1, y1 - 1, x2, y2), label, difficult)

    def _class(self, item, where):
        name = class_name(item.findtext("name"), f"{where}: <name>")
        if name in self._ids:
            return self._ids[name]
        if not self._default:
            raise UserError(f"{where}: unknown class {name!r}{did_you_mean(name, list(self._ids))}")
        near = near_class_list(self.folder)
        raise UserError(
            f"{where}: unknown class {name!r}; the 20 names of PASCAL VOC are known, others need "
            f"class_list, a file with one name per line{f' (class_list={near}?)' if near else ''}"
        )


def _root(path):
    """The element `annotation` of a file, in the encoding that it declares."""
    data = read_bytes(path, "annotations")
    if b"<!ENTITY" in data.replace(b"\0", b""):
        raise UserError(f"{path} defines XML entities, which annotations do not need; remove them")
    try:
        root = _parse(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(
            f"{path} is not valid XML: {error or 'it is empty'}; is it in the encoding that its "
            "first line declares (UTF-8 where it declares none)?"
        ) from None
    if root.tag != "annotation":
        raise UserError(
            f"{path} is not a VOC annotation: its outermost element is <{root.tag[:80]}>, not "
            "<annotation>"
        )
    objects = root.findall("object")
    if sum(1 for _ in root.iter("object")) > len(objects):
        raise UserError(f"{path}: every <object> must lie directly in <annotation>")
    if all(root.find(key) is None for key in KNOWN):
        raise UserError(
            f"{path} is not a VOC annotation: it has no <object>, no <size> and no <filename>"
        )
    return root


def _parse(data):
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError):
        # The parser knows no encodings of several bytes, such as gb2312; and some programs declare
        # UTF-16 and write UTF-8.
        declared = ENCODING.match(data.removeprefix(b"\xef\xbb\xbf"))
        encoding = declared[1].decode() if declared else "utf-8"
        if encoding.lower().startswith("utf-16"):
            encoding = "utf-8-sig"
        if encoding.lower() in ("utf-8", "utf8"):
            raise
        return ElementTree.fromstring(data.decode(encoding))


def _number(item: ElementTree.Element, key: str, where: str, default: float | None = None) -> float:
    text: Any = item.findtext(key)
    if text is None and default is not None:
        return default
    try:
        flag = FLAGS.get(text.strip().lower()) if default is not None else None
        return number(text) if flag is None else flag
    except (AttributeError, ValueError):
        raise UserError(f"{where}: {key} must be a number; given {text!r}") from None

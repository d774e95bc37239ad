"""Label files: COCO JSON, PASCAL VOC XML and YOLO text, each as fields of an `ImageRecord`.

A format has `class_names`, `entries(names)`, which finds the raw labels of images and refuses what
is wrong with the whole, and `fields(raw, height, width)`, which reads those of one image.
"""

import json
import pathlib
import xml.etree.ElementTree as ElementTree

import numpy as np

from official_selftrain.config import did_you_mean, load_yaml
from official_selftrain.errors import UserError
from official_selftrain.files import read_text

# Annotation tools round; a box may leave its image by this many pixels and is clipped.
PIXEL_TOLERANCE = 2.0
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


def open_labels(place, class_names):
    """The format of a label file or folder.

    Args:
        place: a JSON file, or a folder of XML or of text files.
        class_names: `{class id: name}`, or {} where the user gave none.

    Raises:
        UserError: if it is none of them.
    """
    path = pathlib.Path(place)
    if path.is_dir():
        if any(path.rglob("*.xml")):
            return Voc(path, class_names)
        if any(path.rglob("*.txt")):
            return Yolo(path, class_names)
        raise UserError(f"the annotation folder {path} holds no .xml (VOC) and no .txt (YOLO) file")
    if path.suffix.lower() in (".xml", ".txt"):
        raise UserError(f"annotations: give the folder of the {path.suffix} files, not {path}")
    if class_names:
        raise UserError(f"class_list is not for COCO: {path} names its categories itself")
    return Coco(path)


def read_class_list(path, first):
    """`{class id: name}` of a text file with one name a line, or of a YOLO `data.yaml`.

    Args:
        path: of the file.
        first: id of the first name.

    Raises:
        UserError: if it cannot be read, is empty or names a class twice.
    """
    text = read_text(path, "class list")
    if str(path).endswith((".yaml", ".yml")):
        content = load_yaml(text, path)
        found = content.get("names") if isinstance(content, dict) else None
        names = list(found.values() if isinstance(found, dict) else found or [])
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"the class list {path} names no class")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"the class list {path} has {twice[0]!r} twice")
    return {first + index: str(name) for index, name in enumerate(names)}


def _box(where, given, corners, height, width, hint=""):
    """(ymin, xmin, ymax, xmax) fractions from (x1, y1, x2, y2) pixels, clipped after a check."""
    x1, y1, x2, y2 = corners
    outside = max(-x1, -y1, x2 - width, y2 - height)
    if outside > PIXEL_TOLERANCE:
        raise UserError(f"{where}: {given} leaves the {width} x {height} image{hint}")
    fractions = (y1 / height, x1 / width, y2 / height, x2 / width)
    return [min(max(value, 0.0), 1.0) for value in fractions]


def _finite(values):
    return all(value == value and abs(value) != float("inf") for value in values)


# --- COCO ------------------------------------------------------------------------------------


class Coco:
    """COCO JSON: boxes [x, y, width, height] in pixels, crowds and areas."""

    def __init__(self, path):
        self.path = path
        content = self._load()
        self.class_names = {category["id"]: category["name"] for category in content["categories"]}

    def entries(self, names):
        """`{file name: raw}` of the images that the file lists, whatever `names` there are."""
        content = self._load()
        by_image = {}
        for annotation in content.get("annotations", []):
            by_image.setdefault(annotation.get("image_id"), []).append(annotation)
        self._check_ids(content["images"], by_image)
        labelled = "annotations" in content
        return {
            image["file_name"]: (image, by_image.get(image["id"], []), labelled)
            for image in content["images"]
        }

    def fields(self, raw, height, width):
        image, objects, labelled = raw
        self._check_size(image, height, width)
        return {
            "image_id": image["id"],
            "boxes": [self._box(a, height, width) for a in objects],
            "classes": [self._class(a) for a in objects],
            "is_crowd": _column(objects, "iscrowd", 0, bool),
            "areas": _column(objects, "area", None, "float32"),
            "origin": "human" if labelled else "none",
            "dataset": pathlib.Path(self.path).stem,
        }

    def _load(self):
        path = self.path
        try:
            content = json.loads(read_text(path, "annotations"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        missing = [key for key in ("images", "categories") if key not in content]
        if not isinstance(content, dict) or missing:
            raise UserError(f"{path} is not a COCO file: it has no list called {missing[0]!r}")
        for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
            for index, item in enumerate(content[key]):
                for field in fields:
                    if field not in item:
                        raise UserError(f"{path}: item {index} of {key!r} has no {field!r}")
        return content

    def _check_ids(self, images, by_image):
        for field, what in (("id", "the id"), ("file_name", "the file name")):
            values = [image[field] for image in images]
            if len(set(values)) != len(values):
                twice = next(i for i in values if values.count(i) > 1)
                raise UserError(f"{self.path}: two images have {what} {twice}")
        strangers = set(by_image) - {image["id"] for image in images}
        if strangers:
            raise UserError(
                f"{self.path}: {len(strangers)} image ids of annotations are not in its list of "
                f"images, the first {sorted(strangers, key=str)[0]!r}"
            )

    def _check_size(self, image, height, width):
        listed = (image.get("height", height), image.get("width", width))
        if listed != (height, width):
            raise UserError(
                f"{self.path} says {image['file_name']} is {listed[1]} x {listed[0]} pixels, the "
                f"file is {width} x {height}; the boxes would be off. Was the image scaled or "
                "turned later?"
            )

    def _class(self, annotation):
        given = annotation.get("category_id")
        if given not in self.class_names:
            known = ", ".join(f"{i} {n}" for i, n in list(self.class_names.items())[:20])
            raise UserError(
                f"{self.path}: annotation {annotation.get('id')} has the unknown category id "
                f"{given}; known: {known}"
            )
        return given

    def _box(self, annotation, height, width):
        box = annotation.get("bbox")
        where = (
            f"{self.path}: annotation {annotation.get('id')} of image {annotation.get('image_id')}"
        )
        try:
            x, y, w, h = (float(value) for value in box)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}: bbox must be four numbers [x, y, width, height]; given {box}"
            ) from None
        if not _finite((x, y, w, h)) or w <= 0 or h <= 0:
            raise UserError(f"{where}: bbox has no positive, finite width and height; given {box}")
        if max(x, y, w, h) <= 1 and min(height, width) > 16:
            raise UserError(f"{where}: bbox {box} looks like fractions; COCO boxes are in pixels")
        corners = 0 <= x < w <= width and 0 <= y < h <= height
        hint = "; are these corners (x1, y1, x2, y2)?" if corners else ""
        given = f"bbox [x, y, width, height] = {box}"
        return _box(where, given, (x, y, x + w, y + h), height, width, hint)


def _column(objects, key, default, dtype):
    values = [annotation.get(key, default) for annotation in objects]
    return None if any(value is None for value in values) else np.array(values, dtype)


# --- One file an image -----------------------------------------------------------------------


class _PerImage:
    """Labels in one file an image, with its stem."""

    suffix = ""

    def __init__(self, folder, class_names):
        self.folder, self.class_names = folder, class_names

    def entries(self, names):
        """`{image name: path of its labels or None}`.

        Raises:
            UserError: for labels without an image, or two images with one stem.
        """
        files = {path.stem: path for path in sorted(self.folder.rglob(f"*{self.suffix}"))}
        by_stem = {}
        for name in names:
            stem = pathlib.PurePath(name).stem
            if stem in by_stem:
                raise UserError(
                    f"{by_stem[stem]!r} and {name!r} would share the labels {stem}{self.suffix}"
                )
            by_stem[stem] = name
        strangers = sorted(files.keys() - by_stem.keys() - {"classes"})
        if strangers:
            raise UserError(
                f"{len(strangers)} annotations in {self.folder} have no image, the first "
                f"{files[strangers[0]].name!r}"
            )
        return {name: files.get(stem) for stem, name in by_stem.items()}


class Voc(_PerImage):
    """PASCAL VOC XML, one file an image; corners in pixels that count from 1.

    Objects marked difficult are read as crowds: not trained on, and neither right nor wrong in an
    evaluation.
    """

    suffix = ".xml"

    def __init__(self, folder, class_names):
        names = class_names or dict(enumerate(("background", *VOC_CLASSES)))
        super().__init__(folder, {key: name for key, name in names.items() if key > 0})
        self._ids = {name: key for key, name in self.class_names.items()}
        self._default = not class_names

    def fields(self, path, height, width):
        if path is None:
            raise UserError(f"it has no annotation in {self.folder}")
        try:
            root = ElementTree.fromstring(read_text(path, "annotations"))
        except ElementTree.ParseError as error:
            raise UserError(f"{path} is not valid XML: {error}") from None
        listed = tuple(self._number(root, f"size/{k}", path, 0) for k in ("height", "width"))
        if all(listed) and listed != (height, width):
            raise UserError(
                f"{path} says the image is {listed[1]:g} x {listed[0]:g} pixels, the file is "
                f"{width} x {height}; the boxes would be off. Was the image scaled or turned later?"
            )
        objects = root.findall("object")
        return {
            "boxes": [self._box(item, path, height, width) for item in objects],
            "classes": [self._class(item, path) for item in objects],
            "is_crowd": np.array(
                [self._number(item, "difficult", path, 0) > 0 for item in objects], bool
            ),
            "dataset": self.folder.parent.name,
        }

    def _number(self, item, key, path, default=None):
        text = item.findtext(key)
        if text is None and default is not None:
            return default
        try:
            return float(text)
        except (TypeError, ValueError):
            raise UserError(f"{path}: {key} must be a number; given {text!r}") from None

    def _class(self, item, path):
        name = (item.findtext("name") or "").strip()
        if name not in self._ids:
            hint = (
                "; the 20 names of PASCAL VOC are known, others need class_list, a file with one "
                "name a line"
                if self._default
                else did_you_mean(name, list(self._ids))
            )
            raise UserError(f"{path}: unknown class {name!r}{hint}")
        return self._ids[name]

    def _box(self, item, path, height, width):
        keys = ("xmin", "ymin", "xmax", "ymax")
        corners = [self._number(item, f"bndbox/{key}", path) for key in keys]
        given = ", ".join(f"{k} {v:g}" for k, v in zip(keys, corners, strict=True))
        if not _finite(corners):
            raise UserError(f"{path}: a box coordinate is not a finite number; given {given}")
        x1, y1, x2, y2 = corners
        if x2 < x1 or y2 < y1:
            raise UserError(f"{path}: a box ends before it begins; given {given}; swapped?")
        if max(corners) <= 1 and min(height, width) > 16:
            raise UserError(f"{path}: {given} looks like fractions; VOC boxes are in pixels")
        return _box(path, given, (x1 - 1, y1 - 1, x2, y2), height, width)


class Yolo(_PerImage):
    """YOLO text, one file an image, a line an object: class from 0, then x y width height of a box
    round (x, y), or the corners of a polygon, as fractions. An image without a file has no objects.
    """

    suffix = ".txt"

    def fields(self, path, height, width):
        lines = read_text(path, "annotations").splitlines() if path else []
        rows = [
            self._row(line.split(), f"line {number} of {path}", height, width)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        return {
            "boxes": [box for _, box in rows],
            "classes": [label for label, _ in rows],
            "dataset": self.folder.parent.name,
        }

    def _row(self, words, where, height, width):
        try:
            label, numbers = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise UserError(
                f"{where} must be a class number and fractions; given {' '.join(words)!r}"
            ) from None
        if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            raise UserError(
                f"{where} must be `class x y width height`, or a class and three or more corners "
                f"of a polygon; given {len(numbers)} numbers after the class"
            )
        if not _finite(numbers):
            raise UserError(f"{where}: a box coordinate is not a finite number")
        if max(numbers) > 2:
            raise UserError(f"{where}: YOLO boxes are fractions, 0 to 1; are these pixels?")
        if label < 0 or (self.class_names and label + 1 not in self.class_names):
            known = f"; known are 0 to {len(self.class_names) - 1}" if self.class_names else ""
            raise UserError(f"{where} has the unknown class {label}{known}")
        if len(numbers) == 4:
            x, y, w, h = numbers
            if w <= 0 or h <= 0:
                raise UserError(f"{where}: the box has no positive width and height")
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        else:
            xs, ys = numbers[::2], numbers[1::2]
            corners = (min(xs), min(ys), max(xs), max(ys))
        pixels = [value * side for value, side in zip(corners, (width, height) * 2, strict=True)]
        return label + 1, _box(where, f"the box {numbers}", pixels, height, width)

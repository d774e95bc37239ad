"""COCO JSON as fields of records."""

import collections
import itertools
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias

import pydantic

from official_selftrain.data import records
from official_selftrain.data.sources.boxes import (
    LARGEST_CLASS,
    Boxes,
    Number,
    Whole,
    are_fractions,
    check_size,
    finite,
    number,
    whole,
)
from official_selftrain.data.sources.lists import class_names
from official_selftrain.data.sources.names import Names
from official_selftrain.data.sources.record_errors import LeftOut, RecordErrors
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_text
from official_selftrain.utils.types import StrPath

BACKGROUND = ("background", "__background__", "_background_")


class _Annotation(NamedTuple):
    """The fields of an annotation that are read, as they are in the file."""

    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    segmentation: Any  # only where there is no bbox
    iscrowd: Any
    area: Any


def _keep(item):
    """Turns the annotations of a JSON into tuples as soon as they are parsed.

    Their polygons and other fields, most of the file, are then never in memory together.
    """
    if "image_id" not in item or "file_name" in item:
        return item
    get = item.get
    box = get("bbox") or None
    outline = get("segmentation") if box is None else None
    return _Annotation(
        get("id"), get("image_id"), get("category_id"), box, outline, get("iscrowd"), get("area")
    )


def _identity(value):
    """The id of an image as a key: 7, 7.0 and "7" are the same."""
    try:
        return whole(value)
    except ValueError:
        if isinstance(value, str) and value:
            return value
        raise


def _side(value):
    side = whole(value)
    if not 0 <= side < 1_000_000:
        raise ValueError("not a size of an image")
    return side


_Side = Annotated[Any, pydantic.AfterValidator(_side)]
_ID = Annotated[Any, pydantic.AfterValidator(_identity)]
_Name = Annotated[str, pydantic.Strict(), pydantic.Field(min_length=1)]


@pydantic.dataclasses.dataclass(slots=True, frozen=True)
class _Image:
    id: _ID
    file_name: _Name
    height: _Side | None = None
    width: _Side | None = None


_Area = Annotated[Number, pydantic.Field(ge=0, lt=1e30)]  # what float32 can hold
_Box = tuple[Number, Number, Number, Number]
_IMAGES = pydantic.TypeAdapter(list[_Image])
_CATEGORY = pydantic.TypeAdapter(Whole)
_ANNOTATIONS = pydantic.TypeAdapter(
    list[tuple[Any, Any, Whole, _Box | None, Any, bool | None, _Area | None]]
)
_Raw: TypeAlias = tuple[_Image, list[_Annotation], bool]  # the last: whether it is labeled
EXPECTED = {
    "id": "a whole number or a text",
    "file_name": "a text, the path of the image",
    "height": "a whole number of pixels, or null",
    "width": "a whole number of pixels, or null",
    "category_id": "the whole number of a category",
    "bbox": "four numbers [x, y, width, height]",
    "iscrowd": "0 or 1",
    "area": "a number of square pixels from 0, or null",
}


class Coco:
    """COCO JSON: boxes [x, y, width, height] in pixels, crowds and areas.

    An annotation with polygons and no bbox gets the box around them. If the categories count from
    0, all ids are raised by 1, since 0 is the background.

    Attributes:
        class_names: `{class id: name}`, once `entries` has read the file.
        files: paths that the labels are read from.
        left_out: always empty.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = pathlib.Path(path)
        self.files: list[Any] = [self.path]
        self.left_out: LeftOut = {}
        self.class_names: Mapping[int, str] = {}
        self._ids: dict[int, int] = {}  # category id of the file: class id

    def entries(self, names: Names, errors: RecordErrors) -> dict[str, _Raw]:
        """`{image name: raw}` of the images that the file lists.

        Args:
            names: names of the existing images; an image that does not exist keeps its name in
                the file.
            errors: receives errors of single images and annotations.

        Raises:
            UserError: for errors of the file as a whole.
        """
        content = self._load()
        self._read_categories(content["categories"], bool(content.get("annotations")))
        labeled = "annotations" in content
        images, faulty = self._images(content["images"], errors)
        objects = self._by_image(content.pop("annotations", []), images, faulty, errors)
        named = self._named(images, names, errors)
        return {name: (image, objects.get(image.id, []), labeled) for name, image in named.items()}

    def listed_size(self, raw: _Raw) -> tuple[float, float] | None:
        """(height, width) of an image in pixels as the file states it, or None."""
        image = raw[0]
        return (image.height, image.width) if image.height and image.width else None

    def fields(self, raw: _Raw, height: int, width: int, errors: RecordErrors) -> dict[str, Any]:
        """Labels of one image; see `annotations.Annotations`."""
        image, objects, labeled = raw
        check_size(
            (image.height, image.width), height, width, f"{self.path} says {image.file_name}"
        )
        boxes = Boxes(height, width, errors)
        for item in self._checked(objects, errors):
            try:
                self._add(boxes, item)
            except UserError as error:
                errors.add(error)
        return {
            "image_id": self._image_id(image.id),
            "origin": "human" if labeled else "none",
            "dataset": self.path.stem,
            **boxes.fields(),
        }

    # --- The file ----------------------------------------------------------------------------

    def _load(self):
        path = self.path
        text = read_text(path, "annotations")
        try:
            content = json.loads(text, object_hook=_keep)
        except RecursionError:
            raise UserError(f"{path} is not a COCO file: its brackets nest too deeply") from None
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise UserError(
                f"{path} is not a COCO file: it must hold an object with the lists 'images', "
                f"'categories' and 'annotations'; given {_shown(content)}"
            )
        if content.get("annotations", ()) is None:
            logging.warning("'annotations' of %s is null: its images have no labels", path)
            del content["annotations"]
        for key in ("images", "categories", "annotations"):
            if key not in content and key != "annotations":
                hint = " (VIA, LabelMe and others have a JSON of their own; export as COCO)"
                raise UserError(
                    f"{path} is not a COCO file: it has no list called {key!r}"
                    f"{'' if content.keys() & {'images', 'annotations'} else hint}"
                )
            if not isinstance(content.get(key, []), list):
                raise UserError(f"{path}: {key!r} must be a list; given {_shown(content[key])}")
        return content

    def _read_categories(self, categories, any_objects):
        triples = []
        for index, item in enumerate(categories):
            where = f"{self.path}: item {index} of 'categories'"
            if not isinstance(item, dict):
                raise UserError(f"{where} must be an object with id and name; given {_shown(item)}")
            for field in ("id", "name"):
                if field not in item:
                    raise UserError(f"{where} has no {field!r}")
            try:
                key = _CATEGORY.validate_python(item["id"])
            except pydantic.ValidationError:
                key = -1
            if not 0 <= key <= LARGEST_CLASS:
                raise UserError(
                    f"{where}: the id must be a whole number, 1 to {LARGEST_CLASS}; given "
                    f"{_shown(item['id'])}. A network has outputs for every id up to the largest: "
                    "number the categories from 1"
                )
            if not (key == 0 and _is_background(item, categories)):
                triples.append((key, item["name"], f"{where}, id {key}"))
        if any_objects and not triples:
            raise UserError(f"{self.path}: 'categories' is empty, but there are annotations")
        names = class_names(triples, str(self.path))
        shift = 1 if 0 in names else 0
        if shift:
            logging.warning(
                "%s numbers its categories from 0; 0 is the background in this package, so all "
                "ids are raised by 1: %s", self.path,
                ", ".join(f"{key + 1} {name}" for key, name in itertools.islice(names.items(), 5)),
            )  # fmt: skip
        self._ids = {key: key + shift for key in names}
        self.class_names = {key + shift: name for key, name in names.items()}

    def _images(self, items, errors):
        """Images of the file, without those that are at fault, and the ids of these."""
        faults = {}
        try:
            images = _IMAGES.validate_python(items)
        except pydantic.ValidationError as error:
            faults = _first_faults(error)
            images = _IMAGES.validate_python([x for i, x in enumerate(items) if i not in faults])
        faulty = set()
        for index, fault in faults.items():
            errors.add(UserError(self._image_fault(index, items[index], fault)))
            if isinstance(items[index], dict) and isinstance(items[index].get("id"), (int, str)):
                faulty.add(_identity_or_none(items[index]["id"]))
        counts = collections.Counter(image.id for image in images)
        # The annotations of such an image could belong to either of the two files.
        twice = {key: [] for key, count in counts.items() if count > 1}
        for image in images:
            if image.id in twice:
                twice[image.id].append(image.file_name)
        for key, (first, second, *_) in twice.items():
            errors.add(
                UserError(
                    f"{self.path}: two images have the id {key}, {first!r} and {second!r}; it is "
                    "unknown which of them the annotations belong to"
                )
            )
        return [image for image in images if image.id not in twice], faulty | twice.keys()

    def _image_fault(self, index, item, fault):
        where = f"{self.path}: item {index} of 'images'"
        if not isinstance(item, dict):
            return f"{where} must be an object with id and file_name; given {_shown(item)}"
        field = fault["loc"][1]
        if field not in item:
            return f"{where} has no {field!r}"
        name = f" (id {_shown(item['id'])})" if field != "id" and "id" in item else ""
        return f"{where}{name}: {field} must be {EXPECTED[field]}; given {_shown(item[field])}"

    def _by_image(self, annotations, images, faulty, errors):
        """`{image id: annotations}`."""
        by_image = collections.defaultdict(list)
        for index, item in enumerate(annotations):
            if type(item) is not _Annotation:
                errors.add(UserError(self._annotation_fault(index, item)))
                continue
            key = item.image_id
            if type(key) is not int:
                key = _identity_or_none(key)
                if key is None:
                    errors.add(
                        UserError(
                            f"{self.path}: item {index} of 'annotations' (id {_shown(item.id)}): "
                            f"image_id must be {EXPECTED['id']}; given {_shown(item.image_id)}"
                        )
                    )
                    continue
            by_image[key].append(item)
        strangers = by_image.keys() - {image.id for image in images} - faulty
        if strangers:
            count = sum(len(by_image[key]) for key in strangers)
            errors.add(
                UserError(
                    f"{self.path}: {len(strangers)} image ids of annotations ({count} annotations) "
                    "are not in its list of images, the first "
                    f"{_shown(sorted(strangers, key=str)[0])}"
                )
            )
        return by_image

    def _annotation_fault(self, index, item):
        where = f"{self.path}: item {index} of 'annotations'"
        if not isinstance(item, dict):
            return f"{where} must be an object with image_id, category_id and bbox; given " + (
                _shown(item)
            )
        if "segments_info" in item:
            return f"{where} belongs to a panoptic file; give masks as PNG files with `masks`"
        return f"{where} (id {_shown(item.get('id'))}) has no 'image_id'"

    def _named(self, images, names, errors):
        """`{image name: image}`; a name that the store has as it stands comes first."""
        named, given = {}, {}
        # Exact names first, so that a similar name cannot claim their file.
        for image in sorted(images, key=lambda image: image.file_name not in names):
            try:
                name = names.find(image.file_name) or image.file_name
                if name in named:
                    others = (
                        f"two images have the file name {image.file_name!r}"
                        if given[name] == image.file_name
                        else f"the images {given[name]!r} and {image.file_name!r} are one file, "
                        f"{name!r}"
                    )
                    raise UserError(
                        f"{self.path}: {others} (ids {_shown(named[name].id)} and "
                        f"{_shown(image.id)})"
                    )
            except UserError as error:
                errors.add(error)
                continue
            named[name], given[name] = image, image.file_name
        # The shards, and so their checksums, follow the order of the file.
        order = {image.id: place for place, image in enumerate(images)}
        return dict(sorted(named.items(), key=lambda item: order[item[1].id]))

    # --- One image ---------------------------------------------------------------------------

    def _image_id(self, key):
        return key if isinstance(key, int) and 0 <= key < 2**63 else records.hashed_id(str(key))

    def _checked(self, objects, errors):
        """Annotations as the schema has them."""
        try:
            return map(_Annotation._make, _ANNOTATIONS.validate_python(objects))
        except pydantic.ValidationError as error:
            faults = _first_faults(error)
        # Pydantic checks the whole list at once, which is fast; only lists with errors come here.
        for index, fault in faults.items():
            item, field = objects[index], _Annotation._fields[fault["loc"][1]]
            errors.add(
                UserError(
                    f"{self._where(item)}: {field} must be {EXPECTED[field]}; given "
                    f"{_shown(getattr(item, field))}"
                )
            )
        good = [item for index, item in enumerate(objects) if index not in faults]
        return map(_Annotation._make, _ANNOTATIONS.validate_python(good))

    def _where(self, item):
        return f"{self.path}: annotation {_shown(item.id)} of image {_shown(item.image_id)}"

    def _add(self, boxes, item):
        where = self._where(item)
        if item.category_id not in self._ids:
            known = ", ".join(
                f"{key} {self.class_names[label]}" for key, label in list(self._ids.items())[:20]
            )
            raise UserError(
                f"{where} has the unknown category id {_shown(item.category_id)}; known: {known}"
            )
        box = list(item.bbox) if item.bbox else _extent(where, item.segmentation)
        given = f"bbox [x, y, width, height] = {box}"
        x, y, w, h = box
        height, width = boxes.height, boxes.width
        if not finite(box) or w < 0 or h < 0:
            raise UserError(f"{where}: bbox has no positive, finite width and height; given {box}")
        if are_fractions(box, height, width):
            raise UserError(f"{where}: bbox {box} looks like fractions; COCO boxes are in pixels")
        corners = 0 <= x < w <= width and 0 <= y < h <= height
        hint = "; are these corners (x1, y1, x2, y2)?" if corners else ""
        boxes.add(
            where, given, (x, y, x + w, y + h), self._ids[item.category_id],
            bool(item.iscrowd), item.area, hint,
        )  # fmt: skip


def _is_background(item, categories):
    """Whether the category with id 0 is not a class.

    It is the background, or the group that contains all others, which Roboflow writes.
    """
    others = [other for other in categories if other is not item and isinstance(other, dict)]
    name = item["name"]
    if isinstance(name, str) and name.strip().lower() in BACKGROUND:
        return True
    return (
        bool(others)
        and item.get("supercategory") == "none"
        and all(other.get("supercategory") == name for other in others)
    )


def _identity_or_none(value):
    try:
        return _identity(value)
    except ValueError:
        return None


def _first_faults(error):
    """`{index: first error}` of a list that pydantic refused."""
    faults = {}
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        faults.setdefault(fault["loc"][0], fault)
    return faults


def _extent(where, outline):
    """[x, y, width, height] around the polygons of an annotation without a bbox."""
    if not outline:
        raise UserError(f"{where} has neither a bbox nor polygons")
    if isinstance(outline, dict):
        raise UserError(
            f"{where} has a mask in run lengths and no bbox; write its box, "
            "[x, y, width, height], as bbox"
        )
    try:
        flat = [outline] if not isinstance(outline[0], list) else outline
        values = [[number(value) for value in polygon] for polygon in flat]
        xs = [x for polygon in values for x in polygon[::2]]
        ys = [y for polygon in values for y in polygon[1::2]]
        if any(len(polygon) % 2 for polygon in values) or len(xs) < 2:
            raise ValueError
    except (TypeError, ValueError, LookupError):
        raise UserError(
            f"{where} has no bbox, and its segmentation is no list of polygons "
            f"[x1, y1, x2, y2, ...]; given {_shown(outline)}"
        ) from None
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _shown(value):
    """A JSON value for a message, shortened."""
    if type(value) is int and abs(value) < 1e18:
        return str(value)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."

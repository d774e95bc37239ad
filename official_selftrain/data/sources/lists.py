"""Text files beside the labels: class lists, the `data.yaml` of YOLO, and lists of images."""

import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import pydantic

from official_selftrain.config import load_yaml
from official_selftrain.data.sources.boxes import LARGEST_CLASS, Whole
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_text
from official_selftrain.utils.types import StrPath

CLASS_LISTS = (
    "data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "predefined_classes.txt",
    "labels.txt", "label_map.txt",
)  # fmt: skip
# VOC's list of a single class has a second column: 1 has it, -1 has not, 0 is difficult.
WITH_COLUMN = re.compile(r"(\S+)\s+(-1|0|1)")


# --- Classes ---------------------------------------------------------------------------------


def class_name(value: Any, where: str) -> str:
    """The name of a class as text, in composed Unicode and with single spaces; 7 is "7".

    Raises:
        UserError: for anything that is not a name, such as null, true or a list.
    """
    if isinstance(value, bool):
        raise UserError(
            f"{where}: a class name must be text; given {str(value).lower()}; write it in quotes"
        )
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        shown = "null" if value is None else repr(value)[:80]
        raise UserError(f"{where}: a class name must be text; given {shown}")
    return " ".join(unicodedata.normalize("NFC", value).split())


def class_names(triples: Iterable[tuple[int, Any, str]], origin: str) -> dict[int, str]:
    """Checked `{class id: name}` of (id, name, where) triples.

    Raises:
        UserError: if an id has two names or a name two ids.
    """
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    for key, value, where in triples:
        name = class_name(value, where)
        if names.setdefault(key, name) != name:
            raise UserError(
                f"{origin} gives the class id {key} two names, {names[key]!r} and {name!r}"
            )
        if ids.setdefault(name, key) != key:
            raise UserError(
                f"{origin} has {name!r} twice, as class {ids[name]} and {key}; names must differ"
            )
    return names


# Number of keypoints, and 2 or 3 numbers for each.
_KeypointShape = tuple[
    Annotated[int, pydantic.Field(ge=1)], Annotated[int, pydantic.Field(ge=2, le=3)]
]


def is_yaml(path: StrPath | None) -> bool:
    """Whether a class list is a YAML file by its suffix."""
    return path is not None and pathlib.PurePath(path).suffix.lower() in (".yaml", ".yml")


class DataYaml(pydantic.BaseModel):
    """The fields of a `data.yaml` that say how YOLO labels are to be read."""

    names: list[Any] | dict[Whole, Any] | None = None
    nc: Whole | None = None
    kpt_shape: _KeypointShape | None = None  # keypoints that follow a box


EXPECTED = {
    "names": "a list of names, or a mapping of ids from 0 to names",
    "nc": "the number of classes",
    "kpt_shape": "[number of keypoints, 2 or 3 numbers each]",
}


def read_data_yaml(path: StrPath) -> DataYaml:
    """Reads a `data.yaml`.

    Raises:
        UserError: if it cannot be read, or a field has another type.
    """
    content = load_yaml(read_text(path, "class list"), path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain keys and values, among them `names: [cat, dog]`")
    try:
        # Other keys, such as paths and download scripts, are none of our business.
        return DataYaml.model_validate({key: content.get(key) for key in EXPECTED})
    except pydantic.ValidationError as error:
        field = error.errors()[0]["loc"][0]
        raise UserError(
            f"{path}: {field} must be {EXPECTED[str(field)]}; given {str(content[field])[:80]}"
        ) from None


def read_class_list(path: StrPath, first: int) -> dict[int, str]:
    """`{class id: name}` of a text file with one name per line, or of a YOLO `data.yaml`.

    Args:
        path: path of the file.
        first: id of the first name, or of id 0 in a `data.yaml`.

    Raises:
        UserError: if it cannot be read, is empty, or names a class twice.
    """
    if is_yaml(path):
        names = _yaml_names(path)
    elif pathlib.PurePath(path).suffix.lower() in (".json", ".xml", ".csv"):
        raise UserError(
            f"the class list {path} must be a text file with one name per line, or a data.yaml"
        )
    else:
        lines = read_text(path, "class list").rstrip().splitlines()
        blank = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
        if blank:
            raise UserError(
                f"the class list {path}: line {blank} is blank; the lines number the classes, so "
                "delete it, or write the missing name"
            )
        names = dict(enumerate(lines))
    if not names:
        raise UserError(f"the class list {path} names no class")
    if first and len(names) > LARGEST_CLASS:
        raise UserError(
            f"the class list {path} names {len(names):,} classes; at most {LARGEST_CLASS:,} are "
            "possible. Is it a list of something else?"
        )
    return class_names(
        ((first + key, name, f"{path}: names, class {key}") for key, name in names.items()),
        f"the class list {path}",
    )


def _yaml_names(path):
    content = read_data_yaml(path)
    names = content.names or {}
    if isinstance(names, list):
        names = dict(enumerate(names))
    if names and (min(names) < 0 or max(names) > LARGEST_CLASS):
        raise UserError(
            f"{path}: the ids of names are 0 to {LARGEST_CLASS}; given "
            f"{min(names) if min(names) < 0 else max(names)}"
        )
    if names and content.nc is not None and content.nc not in (len(names), max(names) + 1):
        raise UserError(f"{path}: nc says {content.nc} classes, names has {len(names)}")
    return names


def near_class_list(folder: StrPath) -> pathlib.Path | None:
    """Finds a class list in a folder of labels or up to two folders above it; else None."""
    folder = pathlib.Path(folder)
    for place in (folder, *folder.absolute().parents[:2]):
        for name in CLASS_LISTS:
            if (place / name).is_file():
                return place / name
    return None


# --- Images ----------------------------------------------------------------------------------


def read_image_list(path: StrPath, exists: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Reads the names of a text file with one name per line, in order.

    VOC's lists of a single class have a second column; -1 means that the image is not in the list.

    Args:
        path: path of the file.
        exists: function that tells whether a whole line names an image; names can end in " 1".
    """
    lines = [line.strip() for line in read_text(path, "image list").splitlines()]
    lines = [line for line in lines if line]
    columns = [WITH_COLUMN.fullmatch(line) for line in lines]
    # One line that is a name as a whole shows that the numbers are part of the names.
    if lines and all(columns) and not any(map(exists, lines)):
        return [column[1] for column in columns if column and column[2] != "-1"]
    return lines

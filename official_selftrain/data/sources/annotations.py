"""Label files: COCO JSON, PASCAL VOC XML and YOLO text, each as fields of an `ImageRecord`."""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from official_selftrain.data.sources import stores
from official_selftrain.data.sources.coco import Coco
from official_selftrain.data.sources.names import Names
from official_selftrain.data.sources.record_errors import LeftOut, RecordErrors
from official_selftrain.data.sources.voc import Voc
from official_selftrain.data.sources.yolo import Yolo
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

# Class lists and images may be in the same folder as the labels.
BESIDE = (".yaml", ".yml", ".names")


class Annotations(Protocol):
    """A label format.

    Attributes:
        class_names: `{class id: name}`; complete once `entries` has been called.
        files: paths that the labels are read from.
        left_out: what else is in the folder of the labels.
    """

    class_names: Mapping[int, str]
    files: list[Any]
    left_out: LeftOut

    def entries(self, names: Names, errors: RecordErrors) -> dict[str, Any]:
        """Finds the raw labels of images, `{image name: raw}`.

        Raises:
            UserError: if something is wrong with the labels as a whole.
        """

    def listed_size(self, raw: Any) -> tuple[float, float] | None:
        """The (height, width) in pixels of the image that the labels refer to, None if unknown."""

    def fields(self, raw: Any, height: int, width: int, errors: RecordErrors) -> dict[str, Any]:
        """Reads the labels of one image, without the annotations that have an error.

        Args:
            raw: a value of `entries`.
            height, width: size of the image in pixels.
            errors: receives the errors of single annotations.
        """


def open_labels(
    place: StrPath, class_names: Mapping[int, str], class_list: StrPath | None = None
) -> Annotations:
    """Opens a label file or folder, whose format its suffixes tell.

    Args:
        place: a JSON file, or a folder of XML or text files.
        class_names: `{class id: name}`, or {} if the user gave none.
        class_list: path of the file that the class names come from.

    Raises:
        UserError: if it is neither.
    """
    path = pathlib.Path(place)
    if path.is_dir():
        return _open_folder(path, class_names, class_list)
    if path.suffix.lower() in (".xml", ".txt"):
        raise UserError(f"annotations: give the folder of the {path.suffix} files, not {path}")
    if class_names:
        raise UserError(
            f"class_list cannot be used with COCO: {path} names its categories itself; leave it out"
        )
    return Coco(path)


def _open_folder(
    folder: pathlib.Path, class_names: Mapping[int, str], class_list: StrPath | None
) -> Annotations:
    paths, left_out = stores.walk(folder, (".xml", ".txt", ".json", *BESIDE, *stores.SUFFIXES))
    by_suffix: dict[str, list[pathlib.Path]] = {".xml": [], ".txt": [], ".json": []}
    for path in paths:
        by_suffix.get(path.suffix.lower(), []).append(path)
    if by_suffix[".xml"]:
        texts = [path for path in by_suffix[".txt"] if path.stem != "classes"]
        if texts:
            left_out = left_out | {"text files beside XML files": [len(texts), str(texts[0])]}
        return Voc(folder, by_suffix[".xml"], left_out, class_names)
    if by_suffix[".txt"]:
        return Yolo(folder, by_suffix[".txt"], left_out, class_names, class_list)
    found = by_suffix[".json"]
    hint = f"; is it the COCO file {found[0]}?" if len(found) == 1 else ""
    raise UserError(
        f"the annotation folder {folder} contains neither .xml (VOC) nor .txt (YOLO) files{hint}"
    )

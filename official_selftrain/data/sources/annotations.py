"""Label files: COCO JSON, PASCAL VOC XML and YOLO text, each as fields of an `ImageRecord`.

A format has
- `entries(names, errors)`, which finds the raw labels of images and refuses what is wrong with
  the whole;
- `fields(raw, height, width, errors)`, which reads those of one image. What is wrong with one
  annotation goes to `errors`, and only that annotation is left out;
- `listed_size(raw)`, the (height, width) of the image that the labels refer to, or None;
- `class_names`, `files` (what the labels are read from) and `left_out` (`{kind: [count, first]}`).
"""

import pathlib

from official_selftrain.data.sources import stores
from official_selftrain.data.sources.coco import Coco
from official_selftrain.data.sources.voc import Voc
from official_selftrain.data.sources.yolo import Yolo
from official_selftrain.utils.errors import UserError

# Class lists and images may lie beside the labels.
BESIDE = (".yaml", ".yml", ".names")


def open_labels(place, class_names, class_list=None):
    """The format of a label file or folder.

    Args:
        place: a JSON file, or a folder of XML or of text files.
        class_names: `{class id: name}`, or {} where the user gave none.
        class_list: path of the file that they come from.

    Raises:
        UserError: if it is none of them.
    """
    path = pathlib.Path(place)
    if path.is_dir():
        return _open_folder(path, class_names, class_list)
    if path.suffix.lower() in (".xml", ".txt"):
        raise UserError(f"annotations: give the folder of the {path.suffix} files, not {path}")
    if class_names:
        raise UserError(f"class_list is not for COCO: {path} names its categories itself")
    return Coco(path)


def _open_folder(folder, class_names, class_list):
    paths, left_out = stores.walk(folder, (".xml", ".txt", ".json", *BESIDE, *stores.SUFFIXES))
    by_suffix = {".xml": [], ".txt": [], ".json": []}
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
        f"the annotation folder {folder} holds no .xml (VOC) and no .txt (YOLO) file{hint}"
    )

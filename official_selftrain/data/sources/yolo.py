"""YOLO text as fields of records."""

import contextlib
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from official_selftrain.data.sources import lists
from official_selftrain.data.sources.boxes import LARGEST_CLASS, Boxes, finite, number, whole
from official_selftrain.data.sources.per_image import PerImage
from official_selftrain.data.sources.record_errors import LeftOut, RecordErrors
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_text
from official_selftrain.utils.types import StrPath

LOOKED_AT = 100  # files that are searched for polygons


class Yolo(PerImage):
    """YOLO text: one file per image, one line per object. An image without a file has no objects.

    A line is a class id from 0, and x y width height of a box with its center at (x, y), or the
    corners of a polygon, all as fractions. If `data.yaml` has `kpt_shape`, the numbers after the
    box are keypoints, which are not read.

    Args:
        folder, paths, left_out, class_names: see `PerImage`.
        class_list: path of the class list; None takes a `data.yaml` in or above their folder.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        paths: list[pathlib.Path],
        left_out: LeftOut,
        class_names: Mapping[int, str],
        class_list: StrPath | None = None,
    ) -> None:
        super().__init__(folder, paths, left_out, class_names)
        near = lists.near_class_list(folder)
        if near and not class_list:
            logging.warning("the classes have no names; are they in %s? (class_list)", near)
        self._yaml = next((p for p in (class_list, near) if lists.is_yaml(p)), None)
        self._keypoints = None
        if self._yaml:
            self.files = [*self.files, self._yaml]
            self._keypoints = self._keypoint_shape(given=self._yaml == class_list)
        elif self._any_polygons():
            logging.warning(
                "lines in %s with more than four numbers after the class are read as polygons; if "
                "they are keypoints, give class_list=data.yaml with kpt_shape in it", folder
            )  # fmt: skip

    def _any_polygons(self) -> bool:
        """Whether one of the first files has a line that could also be a box with keypoints."""
        for path in self._paths[:LOOKED_AT]:
            with contextlib.suppress(UserError):  # reported when its image is read
                lines = read_text(path, "annotations").splitlines()
                if any(len(line.split()) > 6 for line in lines):
                    return True
        return False

    def _keypoint_shape(self, given):
        try:
            return lists.read_data_yaml(self._yaml).kpt_shape
        except UserError as error:
            if given:
                raise
            logging.warning("%s; it is not used", error)
            return None

    def listed_size(self, path: pathlib.Path | None) -> None:
        """None: YOLO knows no sizes."""
        return None

    def fields(
        self, path: pathlib.Path | None, height: int, width: int, errors: RecordErrors
    ) -> dict[str, Any]:
        """Labels of one image; faults of a line go to `errors`."""
        boxes = Boxes(height, width, errors)
        lines = read_text(path, "annotations").splitlines() if path else []
        for index, line in enumerate(lines, 1):
            try:
                if line.strip():
                    self._add(boxes, line.split(), f"line {index} of {path}")
            except UserError as error:
                errors.add(error)
        return {"dataset": self.folder.parent.name, **boxes.fields()}

    def _add(self, boxes, words, where):
        label, numbers = self._class(words[0], words, where), self._numbers(words, where)
        if self._keypoints:
            numbers = numbers[:4]
        if len(numbers) == 4:
            x, y, w, h = numbers
            if w < 0 or h < 0:
                raise UserError(f"{where}: the box has no positive width and height")
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        else:
            xs, ys = numbers[::2], numbers[1::2]
            corners = (min(xs), min(ys), max(xs), max(ys))
        sides = (boxes.width, boxes.height) * 2
        pixels = [value * side for value, side in zip(corners, sides, strict=True)]
        boxes.add(where, f"the box {numbers}", pixels, label)

    def _class(self, word, words, where):
        try:
            label = whole(word)
        except ValueError:
            hint = ""
            with contextlib.suppress(ValueError):
                hint = f"; write the class as a whole number, {whole(number(word))}"
            raise UserError(
                f"{where} must be a class number and fractions, separated by spaces; given "
                f"{' '.join(words)[:200]!r}{hint}"
            ) from None
        if label < 0 or label >= LARGEST_CLASS:
            raise UserError(
                f"{where} has the unknown class {word[:50]}; known are 0 to {LARGEST_CLASS - 1}"
            )
        if self.class_names and label + 1 not in self.class_names:
            known = [key - 1 for key in self.class_names]
            raise UserError(
                f"{where} has the unknown class {label}; known are {min(known)} to {max(known)}"
            )
        return label + 1

    def _numbers(self, words, where):
        try:
            numbers = [number(word) for word in words[1:]]
        except ValueError:
            raise UserError(
                f"{where} must be a class number and fractions, separated by spaces; given "
                f"{' '.join(words)[:200]!r}"
            ) from None
        count = len(numbers)
        if self._keypoints:
            points, values = self._keypoints
            if count not in (4, 4 + points * values):
                raise UserError(
                    f"{where} must be `class x y width height` and, by kpt_shape of {self._yaml}, "
                    f"{points} keypoints of {values} numbers; given {count} numbers after the class"
                )
        elif count != 4 and (count < 6 or count % 2):
            raise UserError(
                f"{where} must be `class x y width height`, or a class and three or more corners "
                f"of a polygon; given {count} numbers after the class{self._count_hint(count)}"
            )
        if not finite(numbers):
            raise UserError(f"{where}: a box coordinate is not a finite number")
        if max(numbers[:4] if self._keypoints else numbers) > 2:
            raise UserError(f"{where}: YOLO boxes are fractions, 0 to 1; are these pixels?")
        return numbers

    def _count_hint(self, count):
        if count == 5:
            return (
                "; the fifth is perhaps the confidence of a prediction: remove it (predict without "
                "save_conf), or label the images by a teacher of your own"
            )
        if count > 6 and (count - 4) % 3 == 0:
            return "; for keypoints give class_list=data.yaml, with kpt_shape in it"
        return ""

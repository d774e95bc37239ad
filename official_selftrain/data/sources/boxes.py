"""What the label formats share: numbers as exporters write them, and checks of single boxes."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic

from official_selftrain.data.sources.record_errors import RecordErrors
from official_selftrain.utils.errors import UserError

# Annotation tools round, so a box may extend beyond its image by this many pixels; it is clipped.
PIXEL_TOLERANCE = 2.0
# As a fraction of the image; thinner boxes have no area in float32.
THINNEST = 1e-7
# A network has outputs for all ids up to the largest one, so a typo could exhaust the memory.
LARGEST_CLASS = 10_000

_WHOLE = re.compile("-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf|nan", re.I)


def whole(value: Any) -> int:
    """The integer that 7, 7.0 or "7" stands for.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str) and len(value) < 100 and _WHOLE.fullmatch(value.strip()):
        return int(value)
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError("not a whole number")


def number(value: Any) -> float:
    """The float that a number or its text stands for; "inf" and "nan" are numbers.

    Raises:
        ValueError: for anything else, such as true or "1_0", which Python would accept.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308:
        return float(value)
    raise ValueError("not a number")


def _or_else(strict: Any, lenient: Any) -> Any:
    """A lenient type; Pydantic first tries the strict one, which is fast."""
    return Annotated[
        Annotated[strict, pydantic.Strict()] | Annotated[Any, pydantic.AfterValidator(lenient)],
        pydantic.Field(union_mode="left_to_right"),
    ]


Whole: Any = _or_else(int, whole)
Number: Any = _or_else(float, number)


def check_size(listed: Sequence[float | None], height: int, width: int, where: str) -> None:
    """Checks that an image has the size that its labels state.

    Args:
        listed: stated (height, width) in pixels; None or 0 if unknown.
        height, width: size of the image in pixels.
        where: what states it, for the message.

    Raises:
        UserError: if they differ.
    """
    for given, found in zip(listed, (height, width), strict=True):
        if given and given != found:
            text = " x ".join(f"{side:g}" if side else "?" for side in listed[::-1])
            raise UserError(
                f"{where} is {text} pixels, but the file is {width} x {height}, so the boxes would "
                "be wrong. Was the image scaled or turned later?"
            )


class Boxes:
    """The boxes of one image.

    Args:
        height, width: size of the image in pixels.
        errors: counts boxes without an area.
    """

    def __init__(self, height: int, width: int, errors: RecordErrors) -> None:
        self.height, self.width, self.errors = height, width, errors
        self._rows: list[tuple[tuple[float, ...], int, bool, float]] = []

    def add(
        self,
        where: str,
        given: str,
        corners: Sequence[float],
        label: int,
        is_crowd: bool = False,
        area: float | None = None,
        hint: str = "",
    ) -> None:
        """Adds a box, clipped to the image, unless it has no area.

        Args:
            where, given: the annotation and its box, for messages.
            corners: (x1, y1, x2, y2) in pixels, x1 <= x2 and y1 <= y2.
            label: class id from 1.
            is_crowd: whether it is neither trained on nor counted in an evaluation.
            area: area in square pixels; None takes that of the box.
            hint: why the box could be outside the image, for the message.

        Raises:
            UserError: if it extends beyond the image by more than rounding.
        """
        height, width = self.height, self.width
        x1, y1, x2, y2 = corners
        outside = max(-x1, -y1, x2 - width, y2 - height)
        if x1 < x2 and y1 < y2 and outside > PIXEL_TOLERANCE:
            raise UserError(f"{where}: {given} extends beyond the {width} x {height} image{hint}")
        fractions = (y1 / height, x1 / width, y2 / height, x2 / width)
        top, left, bottom, right = (min(max(value, 0.0), 1.0) for value in fractions)
        # The network learns the logarithms of the sides.
        if bottom - top < THINNEST or right - left < THINNEST:
            self.errors.leave_out("boxes without an area", where)
            return
        if area is None:
            area = (bottom - top) * height * (right - left) * width
        self._rows.append(((top, left, bottom, right), label, is_crowd, area))

    def fields(self) -> dict[str, np.ndarray]:
        """The boxes as fields of an `ImageRecord`."""
        boxes, classes, is_crowd, areas = zip(*self._rows, strict=True) if self._rows else [()] * 4
        return {
            "boxes": np.array(boxes, "float32").reshape(-1, 4),
            "classes": np.array(classes, "int64"),
            "is_crowd": np.array(is_crowd, bool),
            "areas": np.array(areas, "float32"),
        }


def are_fractions(values: Sequence[float], height: int, width: int) -> bool:
    """Whether numbers that should be pixels are fractions: all at most 1, and not all whole.

    All are whole for a box of one pixel in the corner.
    """
    return max(values) <= 1 and min(height, width) > 16 and any(v % 1 for v in values)


def finite(values: Iterable[float]) -> bool:
    """Whether no number is infinite or NaN."""
    return all(map(math.isfinite, values))

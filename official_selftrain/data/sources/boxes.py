"""What the label formats share: numbers as exporters write them, and boxes checked one by one."""

import math
import re
from typing import Annotated, Any

import numpy as np
import pydantic

from official_selftrain.utils.errors import UserError

# Annotation tools round; a box may leave its image by this many pixels and is clipped.
PIXEL_TOLERANCE = 2.0
# As a fraction of the image; thinner boxes have no area in float32.
THINNEST = 1e-7
# A network has outputs for every id up to the largest: a mistyped one would fill the memory.
LARGEST_CLASS = 10_000

_WHOLE = re.compile("-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf|nan", re.I)


def whole(value):
    """The integer that 7, 7.0 or "7" stands for.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, str) and len(value) < 100 and _WHOLE.fullmatch(value.strip()):
        return int(value)
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise ValueError("not a whole number")


def number(value):
    """The float that a number or its text stands for; "1_0" and true are none.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308:
        return float(value)
    raise ValueError("not a number")


def _or_else(strict, lenient):
    """A type that pydantic checks fast where JSON has it as it should be."""
    return Annotated[
        Annotated[strict, pydantic.Strict()] | Annotated[Any, pydantic.AfterValidator(lenient)],
        pydantic.Field(union_mode="left_to_right"),
    ]


Whole = _or_else(int, whole)
Number = _or_else(float, number)


def check_size(listed, height, width, where):
    """Refuses an image of another size than its labels say.

    Args:
        listed: (height, width) in pixels; None or 0 where not known.
        where: what says so.
    """
    for given, found in zip(listed, (height, width), strict=True):
        if given and given != found:
            text = " x ".join(f"{side:g}" if side else "?" for side in listed[::-1])
            raise UserError(
                f"{where} is {text} pixels, the file is {width} x {height}; the boxes would be "
                "off. Was the image scaled or turned later?"
            )


class Boxes:
    """The boxes of one image.

    Args:
        height, width: of the image in pixels.
        errors: `record_errors.RecordErrors`; boxes without an area are counted there.
    """

    def __init__(self, height, width, errors):
        self.height, self.width, self.errors = height, width, errors
        self._rows = []

    def add(self, where, given, corners, label, is_crowd=False, area=None, hint=""):
        """Takes a box, clipped to the image, unless it has no area.

        Args:
            where, given: the annotation and its box, for messages.
            corners: (x1, y1, x2, y2) in pixels, x1 <= x2 and y1 <= y2.
            label: class id from 1.
            area: in square pixels; None takes that of the box.
            hint: why the box may be outside of the image.

        Raises:
            UserError: if it leaves the image by more than rounding.
        """
        height, width = self.height, self.width
        x1, y1, x2, y2 = corners
        outside = max(-x1, -y1, x2 - width, y2 - height)
        if x1 < x2 and y1 < y2 and outside > PIXEL_TOLERANCE:
            raise UserError(f"{where}: {given} leaves the {width} x {height} image{hint}")
        fractions = (y1 / height, x1 / width, y2 / height, x2 / width)
        top, left, bottom, right = (min(max(value, 0.0), 1.0) for value in fractions)
        if bottom - top < THINNEST or right - left < THINNEST:
            self.errors.leave_out("boxes without an area", where)
            return
        if area is None:
            area = (bottom - top) * height * (right - left) * width
        self._rows.append(((top, left, bottom, right), label, is_crowd, area))

    def fields(self):
        """Fields of an `ImageRecord`."""
        boxes, classes, is_crowd, areas = zip(*self._rows, strict=True) if self._rows else [()] * 4
        return {
            "boxes": np.array(boxes, "float32").reshape(-1, 4),
            "classes": np.array(classes, "int64"),
            "is_crowd": np.array(is_crowd, bool),
            "areas": np.array(areas, "float32"),
        }


def are_fractions(values, height, width):
    """Whether numbers said to be pixels are fractions of an image: none above 1, and not all whole,
    as those of a box of one pixel in the corner are."""
    return max(values) <= 1 and min(height, width) > 16 and any(v % 1 for v in values)


def finite(values):
    return all(map(math.isfinite, values))

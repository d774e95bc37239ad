"""Kinds of values: every number has a limit, so that none brings a machine to a halt."""

from typing import Annotated

import pydantic


def _limits(highest=None, why=""):
    """Validators that refuse truth values, and more than `highest`; `why` is told with it."""

    def check(value):
        if isinstance(value, bool):
            raise ValueError("must be a number")
        if highest is not None and isinstance(value, (int, float)) and value > highest:
            raise ValueError(f"must be at most {highest:,}: {why}")
        return value

    # Before, since more than 64 bits are no number to Pydantic; after, for numbers given as text.
    return pydantic.BeforeValidator(check), pydantic.AfterValidator(check)


def whole(highest, why, lowest=1):
    """Whole numbers from `lowest` to `highest`."""
    return Annotated[(int, pydantic.Field(ge=lowest), *_limits(highest, why))]


def real(highest, why, zero=False):
    """Finite numbers above 0, or from 0 on, to `highest`."""
    above = pydantic.Field(ge=0) if zero else pydantic.Field(gt=0)
    return Annotated[(float, above, *_limits(highest, why))]


def _text(value):
    if isinstance(value, (list, tuple)):
        raise ValueError("must be one text; several files are a glob, or joined by commas: 'a,b'")
    if isinstance(value, (bool, int, float)):
        raise ValueError("must be a text; put it in quotes if it is a name")
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a NUL character, which no file name can")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("is not UTF-8, so that it cannot be saved with the run")
    return value


def _name(value):
    if value == "":
        raise ValueError("is an empty text; leave it out, or set it to null")
    return value


Words = Annotated[str, pydantic.BeforeValidator(_text)]
Text = Annotated[str, pydantic.BeforeValidator(_text), pydantic.AfterValidator(_name)]
Fraction = Annotated[(float, pydantic.Field(ge=0, le=1), *_limits())]
BelowOne = Annotated[(float, pydantic.Field(ge=0, lt=1), *_limits())]

MAX_CLASSES, MAX_SIDE = 10_000, 8192
Classes = whole(MAX_CLASSES, "each class has weights of its own in the last layer", 2)
Side = whole(MAX_SIDE, "memory grows with the pixels of an image")
Batch = whole(16_384, "all images of a batch are in memory at a time")
Buffer = whole(1_000_000, "so many encoded images are kept in memory")
Threads = whole(1024, "more threads than cores gain nothing", 0)
Filters = whole(8192, "memory grows with the filters")
Convs = whole(100, "memory and time grow with the layers")
Repeats = whole(32, "memory and time grow with the layers")
Factor = real(32.0, "memory grows with the square of the factor")
Steps = whole(1_000_000_000, "steps are counted in 32 bits")
Interval = whole(1_000_000_000, "steps are counted in 32 bits", 0)
Loop = whole(100_000, "nothing is reported or saved before a loop ends")
Boxes = whole(10_000, "memory grows with the number of boxes")
Candidates = whole(1_000_000, "memory grows with the number of boxes")
Seed = whole(2**32 - 1, "random generators take 32 bits", 0)
Count = whole(10_000, "time and disk grow with it")
Rate = real(1000.0, "no network learns at such a rate")
RateOrZero = real(1000.0, "no network learns at such a rate", zero=True)
Weight = real(1e6, "float32 has seven digits", zero=True)
Sigma = real(100.0, "nothing would be suppressed", zero=True)
Level = whole(7, "no network has more levels", 0)
Magnitude = real(100.0, "nothing would be left of an image", zero=True)
Scale = real(16.0, "memory grows with the square of the scale")
Scales = Annotated[tuple[Scale, ...], pydantic.Field(min_length=1, max_length=64)]

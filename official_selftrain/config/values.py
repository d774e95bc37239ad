"""Types of values. Every number has an upper limit, so that no typing error exhausts a machine."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import annotated_types
import pydantic


@dataclasses.dataclass(frozen=True)
class Limits(annotated_types.GroupedMetadata):
    """The range of a number, to be used in `Annotated[int, Limits(...)]`.

    Attributes:
        bounds: what Pydantic checks by itself.
        highest: the largest value; None if `bounds` has it.
        why: the reason, which the error message gives.
    """

    bounds: tuple[annotated_types.BaseMetadata, ...]
    highest: float | None = None
    why: str = ""

    def __iter__(self) -> Iterator[Any]:
        """Yields what Pydantic applies one by one."""
        # Before, because Pydantic refuses integers beyond 64 bits with a message of its own; after,
        # for numbers that are given as text.
        yield from self.bounds
        yield pydantic.BeforeValidator(self._check)
        yield pydantic.AfterValidator(self._check)

    def _check(self, value: Any) -> Any:
        # Pydantic would read true as 1.
        if isinstance(value, bool):
            raise ValueError("must be a number")
        if self.highest is not None and isinstance(value, (int, float)) and value > self.highest:
            raise ValueError(f"must be at most {self.highest:,}: {self.why}")
        return value


def whole(highest: int, why: str, lowest: int = 1) -> Limits:
    """Limits of integers from `lowest` to `highest`."""
    return Limits((annotated_types.Ge(lowest),), highest, why)


def real(highest: float, why: str, zero: bool = False) -> Limits:
    """Limits of finite numbers up to `highest`, and above 0, or from 0 on if `zero`."""
    return Limits((annotated_types.Ge(0) if zero else annotated_types.Gt(0),), highest, why)


def _text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        raise ValueError("must be one text; write several files as a glob, or as 'a,b'")
    if isinstance(value, (bool, int, float)):
        raise ValueError("must be a text; put it in quotes if it is a name")
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("contains a NUL character, which no file name can")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("is not valid UTF-8, so it cannot be saved with the run")
    return value


def _name(value: str) -> str:
    if value == "":
        raise ValueError("is an empty text; leave it out, or set it to null")
    return value


Words = Annotated[str, pydantic.BeforeValidator(_text)]
Text = Annotated[str, pydantic.BeforeValidator(_text), pydantic.AfterValidator(_name)]
Fraction = Annotated[float, Limits((annotated_types.Ge(0), annotated_types.Le(1)))]
_AUTO_OR_NUMBER = pydantic.Discriminator(
    lambda value: "auto" if isinstance(value, str) else "number"
)
AutoOrFraction = Annotated[
    Annotated[Literal["auto"], pydantic.Tag("auto")] | Annotated[Fraction, pydantic.Tag("number")],
    _AUTO_OR_NUMBER,
]
BelowOne = Annotated[float, Limits((annotated_types.Ge(0), annotated_types.Lt(1)))]

MAX_CLASSES, MAX_SIDE = 10_000, 8192
Classes = Annotated[int, whole(MAX_CLASSES, "each class has weights in the last layer", 2)]
Side = Annotated[int, whole(MAX_SIDE, "memory grows with the number of pixels")]
Batch = Annotated[int, whole(16_384, "all images of a batch are in memory at the same time")]
AutoOrBatch = Annotated[
    Annotated[Literal["auto"], pydantic.Tag("auto")] | Annotated[Batch, pydantic.Tag("number")],
    _AUTO_OR_NUMBER,
]
Buffer = Annotated[int, whole(1_000_000, "as many encoded images are kept in memory")]
Threads = Annotated[int, whole(1024, "more threads than cores gain nothing", 0)]
Filters = Annotated[int, whole(8192, "memory grows with the number of filters")]
Convs = Annotated[int, whole(100, "memory and time grow with the number of layers")]
Repeats = Annotated[int, whole(32, "memory and time grow with the number of layers")]
Factor = Annotated[float, real(32.0, "memory grows with the square of the factor")]
Steps = Annotated[int, whole(1_000_000_000, "steps are counted in 32 bits")]
Interval = Annotated[int, whole(1_000_000_000, "steps are counted in 32 bits", 0)]
Passes = Annotated[float, real(1e6, "no training takes that long")]
Loop = Annotated[int, whole(100_000, "nothing is reported or saved before a loop ends")]
Boxes = Annotated[int, whole(10_000, "memory grows with the number of boxes")]
Candidates = Annotated[int, whole(1_000_000, "memory grows with the number of boxes")]
Seed = Annotated[int, whole(2**32 - 1, "random generators take 32 bits", 0)]
Count = Annotated[int, whole(10_000, "time and disk space grow with it")]
Rate = Annotated[float, real(1000.0, "no network learns at such a rate")]
RateOrZero = Annotated[float, real(1000.0, "no network learns at such a rate", zero=True)]
Weight = Annotated[float, real(1e6, "float32 has seven digits", zero=True)]
Sigma = Annotated[float, real(100.0, "nothing would be suppressed", zero=True)]
Level = Annotated[int, whole(7, "no network has more levels", 0)]
Magnitude = Annotated[float, real(100.0, "nothing would be left of an image", zero=True)]
Scale = Annotated[float, real(16.0, "memory grows with the square of the scale")]
Scales = Annotated[tuple[Scale, ...], pydantic.Field(min_length=1, max_length=64)]

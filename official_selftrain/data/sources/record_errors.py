"""Errors of single records and annotations, and counts of what is left out of a source."""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from official_selftrain.utils.errors import UserError

SHOWN = 5  # skipped records that are named on the screen
LeftOut: TypeAlias = dict[str, list[Any]]  # {kind, in the plural: [count, first example]}


@contextlib.contextmanager
def hints(prefix: str) -> Iterator[None]:
    """Gives `on_bad_record` in error messages the full name that the user can write.

    Args:
        prefix: what is before the name, such as "human." in a config or "--" of a flag.

    Raises:
        UserError: the one that is raised inside, with the hint of `RecordErrors.add` changed.
    """
    try:
        yield
    except UserError as error:
        if HINT not in str(error):
            raise
        raise UserError(str(error).replace(HINT, f"({prefix}{HINT[1:]}")) from None


HINT = "(on_bad_record=skip continues without it)"


class Unskipped(UserError):
    """An error that ends the reading, because it may not be skipped."""


class RecordErrors:
    """Collects errors of single records: raises the first, or counts them if on_bad_record=skip.

    Args:
        skip: whether on_bad_record=skip.

    Attributes:
        messages: messages of the errors that were skipped.
        left_out: what is always left out, because it is no error but nothing to learn from either,
            such as hidden files and boxes without an area.
        turned: number of labeled images that are turned as their EXIF orientation says, although
            no annotated size tells whether the labels refer to the turned image.
        first_turned: name of the first of these images.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.messages: list[str] = []
        self.left_out: LeftOut = {}
        self.turned = 0
        self.first_turned: str | None = None

    def add(self, error: UserError) -> None:
        """Adds an error of the smallest thing that can be skipped: an annotation, image or record.

        Raises:
            Unskipped: if skipping is not allowed.
        """
        if isinstance(error, Unskipped):
            raise error
        if not self.skip:
            raise Unskipped(f"{error} {HINT}") from None
        self.messages.append(str(error))

    def leave_out(self, kind: str, example: object) -> None:
        """Counts something that is always left out.

        Args:
            kind: plural noun, such as "boxes without an area".
            example: where this one is.
        """
        self.left_out.setdefault(kind, [0, str(example)])[0] += 1

    def turn(self, name: str) -> None:
        """Counts a labeled image whose EXIF orientation no annotated size confirms."""
        self.first_turned = self.first_turned or name
        self.turned += 1


def merged(counts: Iterable[LeftOut]) -> LeftOut:
    """Adds up several `left_out`."""
    total: LeftOut = {}
    for kind, (count, first) in itertools.chain.from_iterable(c.items() for c in counts):
        total.setdefault(kind, [0, first])[0] += count
    return total


def tell(
    name: str,
    skipped: list[str],
    left_out: LeftOut,
    turned: int = 0,
    first_turned: str | None = None,
) -> None:
    """Logs in a few lines what of a source was skipped, left out or turned."""
    lines = [f"skipped: {message}" for message in skipped[:SHOWN]]
    if len(skipped) > SHOWN:
        lines.append(f"skipped {len(skipped)} in total; {name}.json lists them")
    if left_out:
        kinds = (
            f"{count} {kind} (the first: {first})" for kind, (count, first) in left_out.items()
        )
        lines.append(f"left out of {name}: {'; '.join(kinds)}")
    if turned:
        lines.append(
            f"{turned} labeled images of {name} have an EXIF orientation, and no annotated size "
            "tells whether the labels refer to the image as shown or as stored; they are taken as "
            f"shown (the first: {first_turned})"
        )
    for line in lines:
        logging.warning("%s", line)

"""What is wrong with single records and annotations, and what of a source is left out."""

import contextlib
import itertools
import logging

from official_selftrain.utils.errors import UserError

SHOWN = 5  # skipped records that are named on the screen


@contextlib.contextmanager
def hints(prefix):
    """Names the option that goes on without a bad record as it is called where the user is.

    Args:
        prefix: such as "human." in a run, or "--" of a flag.

    Raises:
        UserError: what is raised inside, with the hint of `RecordErrors.add` changed.
    """
    try:
        yield
    except UserError as error:
        if HINT not in str(error):
            raise
        raise UserError(str(error).replace(HINT, f"({prefix}{HINT[1:]}")) from None


HINT = "(on_bad_record=skip goes on without it)"


class Unskipped(UserError):
    """A fault that ends the reading, since the user does not allow to skip it."""


class RecordErrors:
    """Faults of single records or annotations: raised, or counted where the user allows skipping.

    Args:
        skip: `on_bad_record=skip`.

    Attributes:
        messages: of what was skipped.
        left_out: `{kind: [count, first example]}` of what is left out whatever `skip` says, because
            it cannot teach anything: hidden files, boxes without an area.
        turned: number of labeled images that are taken as they are shown, turned as their EXIF
            orientation says, although no annotated size tells what their labels refer to.
        first_turned: name of the first of them.
    """

    def __init__(self, skip):
        self.skip = skip
        self.messages = []
        self.left_out = {}
        self.turned, self.first_turned = 0, None

    def add(self, error):
        """A fault of the smallest thing that can be left out: an annotation, an image, a record.

        Raises:
            Unskipped: unless skipping is allowed.
        """
        if isinstance(error, Unskipped):
            raise error
        if not self.skip:
            raise Unskipped(f"{error} {HINT}") from None
        self.messages.append(str(error))

    def leave_out(self, kind, example):
        """Counts something that is left out by default.

        Args:
            kind: plural noun, such as "boxes without an area".
            example: where the first one is.
        """
        self.left_out.setdefault(kind, [0, str(example)])[0] += 1

    def turn(self, name):
        """Counts a labeled image whose EXIF orientation no annotated size confirms."""
        self.first_turned = self.first_turned or name
        self.turned += 1


def merged(counts):
    """`{kind: [count, first]}` of several such."""
    total = {}
    for kind, (count, first) in itertools.chain.from_iterable(c.items() for c in counts):
        total.setdefault(kind, [0, first])[0] += count
    return total


def tell(name, skipped, left_out, turned=0, first_turned=None):
    """Says in a few lines what of a source was skipped, left out or turned."""
    lines = [f"skipped: {message}" for message in skipped[:SHOWN]]
    if len(skipped) > SHOWN:
        lines.append(f"skipped {len(skipped)} in all; {name}.json names them")
    if left_out:
        kinds = (
            f"{count} {kind} (the first: {first})" for kind, (count, first) in left_out.items()
        )
        lines.append(f"left out of {name}: {'; '.join(kinds)}")
    if turned:
        lines.append(
            f"{turned} labeled images of {name} have an EXIF orientation, and no annotated size "
            "tells whether the labels refer to the image as shown or as stored; taken as shown, "
            f"the first {first_turned}"
        )
    for line in lines:
        logging.warning("%s", line)

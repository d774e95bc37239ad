"""What is wrong with single records and annotations, and what of a source is left out."""

import logging

from official_selftrain.errors import UserError


class Problems:
    """Faults of single records or annotations: raised, or counted where the user allows skipping.

    Args:
        skip: `on_bad_record=skip`.

    Attributes:
        messages: of what was skipped.
        left_out: `{kind: [count, first example]}` of what is left out whatever `skip` says, because
            it cannot teach anything: hidden files, boxes without an area.
    """

    def __init__(self, skip):
        self.skip = skip
        self.messages = []
        self.left_out = {}

    def add(self, error):
        """A fault of the smallest thing that can be left out: an annotation, an image, a record.

        Raises:
            UserError: unless skipping is allowed.
        """
        if not self.skip:
            raise UserError(f"{error} (on_bad_record=skip goes on without it)") from None
        logging.warning("skipped: %s", error)
        self.messages.append(str(error))

    def leave_out(self, kind, example):
        """Counts something that is left out by default.

        Args:
            kind: plural noun, such as "boxes without an area".
            example: where the first one is.
        """
        self.left_out.setdefault(kind, [0, str(example)])[0] += 1

"""Exceptions, and the parts of messages that several modules use."""

import difflib
from collections.abc import Collection
from typing import Any


def printable(text: Any) -> str:
    """`text` on one line, with control characters and lone surrogates as escape sequences.

    A file name may contain characters that clear the terminal or break the line.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


class UserError(ValueError):
    """A mistake in the user's options, files or labels.

    The message says what was given, what was expected, the likely cause and how to fix it. It is
    always a single line, whatever characters the names and values in it contain. Commands print it
    and exit with status 2, without a stack trace.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Damaged(UserError):
    """A file has changed since it was written, such as by a bad copy."""


class TrainingInterrupted(BaseException):
    """The process was asked to end, and its work is saved.

    Commands print the message and exit with status 128 + `signal`, as shells report a process that
    a signal has ended: 130 for Ctrl-C, 143 for SIGTERM. Not an `Exception`, so that code which
    survives any failure does not survive this.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int = 15) -> None:
        super().__init__(message)
        self.signal = signal


def one_line(error: Any, limit: int | None = 200) -> str:
    """The text of an error on one line, cut after `limit` characters.

    Messages of TensorFlow and of parsers span many lines, and one of ours never does. An error
    without text is called by its type, as otherwise the message would give no reason at all.

    Args:
        error: an exception or a string.
        limit: largest number of characters; None keeps all.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def short(value: Any) -> str:
    """A value as it is written in Python, cut to at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def nearest(name: Any, known: Collection[str], cutoff: float = 0.6) -> str | None:
    """The name among `known` that is spelled most like `name`.

    Args:
        name: what was given.
        known: the names that exist.
        cutoff: smallest similarity in 0 to 1; a name that differs only in case always counts.

    Returns:
        The nearest name, or None if all are too different.
    """
    name = str(name)
    same = [other for other in known if other.lower() == name.lower()]
    return next(iter(same or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def or_nearest(name: Any, known: Collection[str]) -> str:
    """The end of an error message: the nearest of the `known` names, or an empty string."""
    near = nearest(name, known, 0.5)
    return f"; did you mean {near!r}?" if near else ""


def did_you_mean(name: Any, known: Collection[str]) -> str:
    """The end of an error message: the nearest of the `known` names, or a list of all of them."""
    return or_nearest(name, known) or (f"; known: {', '.join(known)}" if known else "")


def duration(seconds: float) -> str:
    """A duration to be printed: "40 s", "12 min", or "1.6 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

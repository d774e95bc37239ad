"""What is read by the person at the keyboard: exceptions, and the words of their messages."""

import difflib


def printable(text):
    """`text` in one line, with control characters and lone surrogates shown as escapes.

    A file name can hold what clears a terminal or breaks a line.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


class UserError(ValueError):
    """A mistake in what was given: options, files or labels.

    The message says what was given, what was expected, the likely cause and how to mend it. It is
    one line, whatever the names and values in it hold. Commands print it and leave with exit
    status 2, without a stack trace.
    """

    def __init__(self, message):
        super().__init__(printable(message))


class Damaged(UserError):
    """A file is not as it was written."""


class TrainingInterrupted(BaseException):
    """The process was asked to end, and what it had done is saved.

    Commands print the message and leave with exit status 128 + `signal`, as the signal itself would
    have it: 130 for Ctrl-C, 143 for SIGTERM.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message, signal=15):
        super().__init__(message)
        self.signal = signal


def short(value):
    """A value as it would be written in Python, in at most 80 letters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def nearest(name, known, cutoff=0.6):
    """The one of the `known` names that is nearest to `name`, or None."""
    name = str(name)
    same = [other for other in known if other.lower() == name.lower()]
    return next(iter(same or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def or_nearest(name, known):
    """The end of an error message: the nearest of the `known` names, or nothing."""
    near = nearest(name, known, 0.5)
    return f"; did you mean {near!r}?" if near else ""


def did_you_mean(name, known):
    """The end of an error message: the nearest of the `known` names, or all of them."""
    return or_nearest(name, known) or (f"; known: {', '.join(known)}" if known else "")

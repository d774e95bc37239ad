"""The exceptions that are meant to be read by the person at the keyboard."""


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


class Stopped(BaseException):
    """The process was asked to end, and what it had done is saved.

    Commands print the message and leave with exit status 128 + `signal`, as the signal itself would
    have it: 130 for Ctrl-C, 143 for SIGTERM.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message, signal=15):
        super().__init__(message)
        self.signal = signal

"""The exceptions that are meant to be read by the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what was given: options, files or labels.

    The message says what was given, what was expected, the likely cause and how to mend it.
    Commands print it as one line and leave with exit status 2, without a stack trace.
    """


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

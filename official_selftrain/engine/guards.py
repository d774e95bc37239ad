"""What ends a training early, or says why it stands still: signals, stalls, NaN."""

import faulthandler
import logging
import math
import signal
import sys
import threading


class GracefulShutdown:
    """Records Ctrl-C and SIGTERM instead of letting them end the process.

    Schedulers send SIGTERM before they preempt a machine. A Ctrl-C after either ends the process at
    once. Context manager. Does nothing outside the main thread, where Python cannot install signal
    handlers.

    Attributes:
        received: number of the last signal, 0 before.
    """

    received = 0

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        logging.warning(
            "%s: saving as soon as possible, at the latest when this loop of steps ends; Ctrl-C "
            "ends the process at once, without saving",
            "Ctrl-C" if number == signal.SIGINT else "SIGTERM",
        )


class Watchdog:
    """Warns repeatedly while no step finishes; a stuck input would otherwise hang silently.

    Each warning is followed by where every thread stands.

    Args:
        seconds: between two signs of life, or two warnings; 0 never warns.
    """

    def __init__(self, seconds):
        self.seconds = seconds
        self.step = None
        self._life = threading.Event()
        self._ended = False

    def __enter__(self):
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended = True
        self._life.set()

    def alive(self, step):
        self.step = step
        self._life.set()

    def _watch(self):
        waited = 0
        while not self._ended:
            if self._life.wait(self.seconds):
                self._life.clear()
                waited = 0
                continue
            waited += self.seconds
            logging.warning(
                "no loop of steps has ended for %d s, since step %s: the input is stuck, another "
                "worker is gone, or %d s are too few for a loop (runtime.stall_seconds)",
                waited, self.step, self.seconds,
            )  # fmt: skip
            # Notebooks and pytest replace `sys.stderr` by what has no file descriptor.
            faulthandler.dump_traceback(sys.__stderr__)


class NonFiniteLossError(Exception):
    """A loss or the gradient norm is NaN or infinite.

    Attributes:
        name: of the scalar.
        step: number of updates made when it was detected.
    """

    def __init__(self, name, step):
        super().__init__(f"{name} is not finite before step {step}")
        self.name, self.step = name, step


def check_finite(scalars, step):
    """Raises `NonFiniteLossError` for the first loss or gradient norm that is not finite."""
    for name in ("loss", "human_loss", "pseudo_loss", "gradient_norm"):
        if not math.isfinite(scalars.get(name, 0.0)):
            raise NonFiniteLossError(name, step)

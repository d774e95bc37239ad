"""Guards of a training: signals that end it early, stalls, and losses that are not finite."""

from __future__ import annotations

import faulthandler
import logging
import math
import signal
import threading
from types import FrameType
from typing import Any

STDERR = 2
DIVERGED = "diverged.json"  # in the folder of a training that ended because it diverged


class GracefulShutdown:
    """Context manager that records Ctrl-C and SIGTERM instead of letting them end the process.

    Schedulers send SIGTERM before they preempt a machine. A Ctrl-C after either signal ends the
    process immediately. Does nothing outside the main thread, where Python cannot install signal
    handlers.

    Attributes:
        received: number of the last signal, 0 before the first.
    """

    received = 0

    def __enter__(self) -> GracefulShutdown:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        # Schedulers repeat SIGTERM, but only a person presses Ctrl-C again.
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        logging.warning(
            "%s: saving as soon as possible, at the latest at the end of this loop of steps. "
            "Another Ctrl-C ends the process immediately, without saving.",
            "Ctrl-C" if number == signal.SIGINT else "SIGTERM",
        )


class Watchdog:
    """Context manager that warns repeatedly while no step finishes.

    A stuck input pipeline would otherwise hang silently. Each warning is followed by the stack
    traces of all threads, which show where the process hangs.

    Args:
        seconds: time without a call of `alive` before a warning, and between two warnings; 0 turns
            the warnings off.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.step: int | None = None
        self._life = threading.Event()
        self._ended = False

    def __enter__(self) -> Watchdog:
        if self.seconds:
            # A daemon, so that it does not keep a process alive that ends with an error.
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._life.set()

    def alive(self, step: int) -> None:
        """Restarts the clock; call it before the updates that follow `step`."""
        self.step = step
        self._life.set()

    def _watch(self) -> None:
        waited = 0.0
        while not self._ended:
            if self._life.wait(self.seconds):
                self._life.clear()
                waited = 0
                continue
            waited += self.seconds
            logging.warning(
                "no loop of steps has finished for %d s, since step %s: the input is stuck, "
                "another worker has died, or %d s (runtime.stall_seconds) are too few for a loop. "
                "The stack traces follow.",
                waited, self.step, self.seconds,
            )  # fmt: skip
            # By its number, because notebooks replace `sys.stderr` by an object without one.
            faulthandler.dump_traceback(STDERR)


class NonFiniteLossError(Exception):
    """Raised when a loss or the gradient norm is NaN or infinite.

    Attributes:
        name: name of the scalar.
        step: number of updates made when it was detected.
    """

    def __init__(self, name: str, step: int):
        super().__init__(f"{name} is not finite before step {step}")
        self.name, self.step = name, step


def check_finite(scalars: dict[str, float], step: int) -> None:
    """Checks the losses and the gradient norm after `step` updates.

    Raises:
        NonFiniteLossError: for the first one that is not finite.
    """
    # Not all scalars: a ratio or a learning rate is no sign of divergence.
    for name in ("loss", "human_loss", "pseudo_loss", "gradient_norm"):
        if not math.isfinite(scalars.get(name, 0.0)):
            raise NonFiniteLossError(name, step)

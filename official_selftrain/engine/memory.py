"""Gives the memory that a training or a prediction leaves behind back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Context in which functions are traced; on exit, frees what TensorFlow would keep of them.

    `tf.custom_gradient`, which batch norm, swish, and all-reduce use, registers a gradient function
    for every traced call and never removes it. That function keeps the graph and the weights of the
    whole training alive. The registry is private; if it changes, the memory is kept as without this
    context.

    Functions traced in the context must not be differentiated afterwards. Used as a decorator, it
    also covers the local variables of a function.
    """
    before = registered()
    try:
        yield
    finally:
        forget(before)
        give_back()


def registered() -> set[str]:
    """Names of the registered gradient functions."""
    return set(_registry())


def forget(before: set[str]) -> None:
    """Removes the gradient functions of traced calls, except for those in `before`."""
    registry = _registry()
    # The others belong to TensorFlow's own operations, which are registered on import.
    for name in [n for n in list(registry) if n not in before and n.startswith("CustomGradient-")]:
        registry.pop(name, None)


def give_back() -> None:
    """Collects garbage and, with glibc, returns free memory to the system."""
    gc.collect()
    # Without this, the C library keeps freed memory for later, and a run of several stages would
    # need the sum of their peaks. Other C libraries have no such function.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _registry() -> dict[str, Any]:
    """TensorFlow's gradient functions by name; empty if they cannot be found."""
    with contextlib.suppress(Exception):
        from tensorflow.python.framework import ops

        registry = ops.gradient_registry._registry
        if isinstance(registry, dict):
            return registry
    return {}

"""Memory that a training or a prediction leaves behind, given back to the system."""

import contextlib
import ctypes
import gc


@contextlib.contextmanager
def given_back():
    """Frees what TensorFlow would keep of the functions that were traced inside.

    `tf.custom_gradient`, which batch norm, swish and all-reduce use, registers a function for each
    call that is traced, never removes it, and with it keeps the graph and the weights of the whole
    training. The registry is private: should it change, the memory is kept, as without this.

    Nothing that was traced inside may be differentiated afterwards. As a decorator it also covers
    the variables of a function.
    """
    before = registered()
    try:
        yield
    finally:
        forget(before)
        give_back()


def registered():
    """Names of the gradient functions that TensorFlow keeps."""
    return set(_registry())


def forget(before):
    """Removes those of traced functions but for the names `before`."""
    registry = _registry()
    for name in [n for n in list(registry) if n not in before and n.startswith("CustomGradient-")]:
        registry.pop(name, None)


def give_back():
    """Collects garbage, and returns what is free to the system where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _registry():
    """TensorFlow's gradient functions by name; empty where they cannot be found."""
    with contextlib.suppress(Exception):
        from tensorflow.python.framework import ops

        registry = ops.gradient_registry._registry
        if isinstance(registry, dict):
            return registry
    return {}

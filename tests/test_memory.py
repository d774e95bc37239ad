"""What is traced inside `memory.given_back` leaves TensorFlow's registry of gradients."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from official_selftrain.engine import memory


def traced():
    """A function whose trace registers a gradient, as batch norm's does."""

    @tf.custom_gradient
    def double(x):
        return 2 * x, lambda upstream: 2 * upstream

    @tf.function
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = double(x)
        return tape.gradient(y, x)

    assert float(function(tf.constant(1.0))) == 2.0
    return function


def test_gradients_of_functions_inside_are_forgotten_and_earlier_ones_kept():
    registered = len(memory._registry())
    assert registered > 0  # TensorFlow's own: the registry is where it was
    traced()
    before = set(memory._registry())
    assert len(before) == registered + 1

    @memory.given_back()
    def graph():
        function = traced()
        return weakref.ref(function.get_concrete_function(tf.constant(1.0)).graph)

    assert graph()() is None
    assert set(memory._registry()) == before


def test_an_error_inside_is_passed_on_and_leaves_nothing():
    before = set(memory._registry())
    with pytest.raises(ValueError, match="inside"), memory.given_back():
        traced()
        raise ValueError("inside")
    assert set(memory._registry()) == before


@pytest.mark.parametrize("registry", [None, "gone"])
def test_another_tensorflow_is_left_alone(registry, monkeypatch):
    from tensorflow.python.framework import ops

    monkeypatch.setattr(ops.gradient_registry, "_registry", registry, raising=False)
    if registry == "gone":
        monkeypatch.delattr(ops, "gradient_registry")
    with memory.given_back():
        assert np.ones(2).sum() == 2
    gc.collect()

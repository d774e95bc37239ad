import keras
import numpy as np
import pytest
import tensorflow as tf
from layer_harness import run_layer_test

from official_selftrain.applications import layers
from official_selftrain.applications.layers import BatchNorm

SHAPE = (2, 6, 8, 3)
LAYERS = {
    "BatchNorm": ({"momentum": 0.9, "epsilon": 1e-4}, SHAPE),
    "DropConnect": ({"rate": 0.25, "seed": 1}, SHAPE),
    "DropBlock": ({"keep_prob": 0.9, "block_size": 3, "seed": 1}, SHAPE),
    "BilinearUpsample": ({"factor": 4}, (2, 24, 32, 3)),
    "NearestResize": ({"height": 3, "width": 12}, (2, 3, 12, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_builds_describes_runs_and_is_saved(name, tmp_path):
    settings, output_shape = LAYERS[name]
    run_layer_test(getattr(layers, name), settings, SHAPE, output_shape, tmp_path)


def test_every_layer_is_in_the_table():
    found = {
        name
        for name, value in vars(layers).items()
        if isinstance(value, type) and issubclass(value, keras.layers.Layer)
    }
    assert found == set(LAYERS)


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_batch_norm_equals_keras_forward_backward_and_statistics(dtype, synchronized):
    """The moving variance is that of Keras, biased, if synchronized, and unbiased otherwise."""
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 6)).astype("float32") * 3 + 1
    weight = tf.constant(np.random.default_rng(1).standard_normal(x.shape), tf.float32)
    results = []
    for kind in (BatchNorm, keras.layers.BatchNormalization):
        layer = kind(momentum=0.9, epsilon=1e-3, dtype=dtype, synchronized=synchronized)
        layer.build(x.shape)
        layer.gamma.assign(np.linspace(0.5, 2, 6))
        layer.beta.assign(np.linspace(-1, 1, 6))
        inputs = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = layer(inputs, training=True)
            loss = tf.reduce_sum(weight * tf.cast(y, tf.float32) ** 2)
        gradients = tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])
        assert y.dtype == layer.compute_dtype
        # Of the 1 at the start, 0.9 is left.
        batch_variance = (layer.moving_variance - 0.9) / 0.1
        if kind is BatchNorm and not synchronized:
            batch_variance = batch_variance * 59 / 60  # of 4 * 3 * 5 pixels
        results.append([y, *gradients, layer.moving_mean, batch_variance])
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = (np.asarray(keras.ops.cast(v, "float32")) for v in (ours, theirs))
        np.testing.assert_allclose(
            ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max()
        )


def test_frozen_and_inference_use_the_moving_statistics():
    layer = BatchNorm()
    x = np.ones((2, 2, 2, 3), "float32") * 5
    layer.build(x.shape)
    np.testing.assert_allclose(layer(x, training=False), x / np.sqrt(1 + 1e-3), rtol=1e-5)
    layer.trainable = False
    np.testing.assert_allclose(layer(x, training=True), x / np.sqrt(1 + 1e-3), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))

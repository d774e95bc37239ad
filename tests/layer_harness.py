"""What every layer must do, in the manner of the harness that Keras has for its own."""

import json

import keras
import numpy as np

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def run_layer_test(cls, settings, input_shape, output_shape, folder):
    """Builds, describes, runs, saves and loads a layer, in every precision.

    Args:
        cls: the class of the layer.
        settings: its arguments by name.
        input_shape, output_shape: `(B, H, W, C)` of one example.
        folder: where models are saved.
    """
    assert_described(cls(**settings), settings)
    x = np.random.default_rng(0).standard_normal(input_shape).astype("float32")
    for policy in POLICIES:
        layer = cls(**settings, dtype=policy)
        inputs = keras.Input(input_shape[1:])
        outputs = layer(inputs)
        assert layer.built and outputs.shape == (None, *output_shape[1:])
        assert outputs.dtype == layer.compute_dtype
        assert {str(w.dtype) for w in layer.weights} <= {"float32"}
        model = keras.Model(inputs, outputs)
        for mode in (False, True):
            y = model(x, training=mode)
            assert y.shape == output_shape
            assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
            assert np.isfinite(as_array(y)).all()
        alone = layer(keras.ops.cast(x, layer.compute_dtype))
        np.testing.assert_array_equal(as_array(alone), as_array(model(x)))
        assert_saved(model, x, folder / f"{policy}.keras")


def assert_described(layer, settings):
    """The config is JSON, holds the arguments, and makes the layer again."""
    config = layer.get_config()
    assert {name: config[name] for name in settings} == settings
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config


def assert_saved(model, x, file):
    """A loaded model has the same layers, precision and outputs."""
    model.save(file)
    restored = keras.saving.load_model(file)
    assert [type(layer) for layer in restored.layers] == [type(layer) for layer in model.layers]
    assert [layer.dtype_policy for layer in restored.layers] == [
        layer.dtype_policy for layer in model.layers
    ]
    np.testing.assert_array_equal(as_array(restored(x)), as_array(model(x)))


def as_array(x):
    return np.asarray(keras.ops.cast(x, "float32"))

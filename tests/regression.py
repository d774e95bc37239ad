"""The smallest self-training: a regression that weighs its examples, as detection does."""

import keras
import numpy as np
import tensorflow as tf

from official_selftrain.engine.checkpoints import Checkpoints
from official_selftrain.self_training import SelfTrainer

SLOW = 1e-3  # a learning rate at which rounding does not grow: see `assert_same_updates`


class Regression:
    """Squared error, weighted like detection by a count over the batch.

    Args:
        pseudo_scale: factor on the loss of pseudo labels, which `labels["pseudo"]` marks.
    """

    def __init__(self, pseudo_scale=1.0):
        self.pseudo_scale = pseudo_scale

    def loss_sums(self, outputs, labels):
        weight = labels["weight"]
        error = keras.ops.square(outputs["y"] - labels["y"])[:, 0]
        factor = keras.ops.where(labels["pseudo"][0] > 0, self.pseudo_scale, 1.0)
        return {"total": factor * keras.ops.sum(weight * error)}, keras.ops.sum(weight)

    def normalizer(self, count):
        return 1.0 + count

    def label_density(self, labels):
        return keras.ops.mean(labels["weight"])


def batch(size, seed, sources=("human", "pseudo"), scale=1.0):
    rng = np.random.default_rng(seed)
    images, labels = {}, {}
    for index, source in enumerate(sources):
        x = rng.standard_normal((size, 3)).astype("float32")
        images[source] = tf.constant(x)
        labels[source] = {
            "y": tf.constant(scale * x.sum(1, keepdims=True) + index),
            "weight": tf.constant(rng.integers(0, 3, size).astype("float32")),
            "pseudo": tf.fill([size], float(index)),
        }
    return images, labels


def trainer(alpha=1.0, task=None, rate=0.01, momentum=0.9, batch_norm=True, **settings):
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    h = keras.layers.Dense(8, activation="tanh")(x)
    if batch_norm:
        h = keras.layers.BatchNormalization(synchronized=True)(h)
    student = keras.Model(x, {"y": keras.layers.Dense(1)(h)})
    model = SelfTrainer(student, task or Regression(), alpha=alpha, **settings)
    model.compile(optimizer=keras.optimizers.SGD(rate, momentum=momentum))
    model.optimizer.build(student.trainable_variables)
    return model


def steps(model, batches):
    step = tf.function(model.train_step)
    for one in batches:
        step(one)
    return [np.asarray(w) for w in model.student.weights]


def state(model):
    """A copy of weights, statistics, momentum and averages of losses: `{"group/index": array}`."""
    variables = Checkpoints("unused", model).variables
    return {
        key: np.array(keras.ops.convert_to_numpy(variable))
        for key, variable in variables.items()
        if not key.startswith("trackers/")
    }


def assert_same_updates(before, expected, found, bound=0.01):
    """From `before`, every array of `found` has moved as that of `expected`.

    A step rounds a number of size 1 by 2^-24, and one array of `regression` moves by more than 1e-5
    in a step at the rate `SLOW`: relative to the movement, rounding is less than 6e-3. It does
    not grow: a step multiplies a difference by 1 + rate * curvature, some 1.01. A gradient that is
    counted twice, or divided by the count of one replica, is 0.1 and more away.
    """
    assert expected.keys() == found.keys() == before.keys()
    for key, value in expected.items():
        if not np.issubdtype(value.dtype, np.floating):
            np.testing.assert_array_equal(found[key], value, err_msg=key)
            continue
        moved, wrong = (np.linalg.norm(value - other) for other in (before[key], found[key]))
        assert wrong <= bound * moved, f"{key}: {wrong} is wrong where {moved} has moved"

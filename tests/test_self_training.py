"""The method: formula, moving averages, and the errors that would stay silent."""

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf

from official_selftrain.engine.step import half_squared_kernels
from official_selftrain.self_training import (
    LossNormalizer,
    SelfTrainer,
    combined_loss,
    sum_over_replicas,
)
from official_selftrain.utils.errors import UserError


@pytest.fixture
def two_replicas():
    return helpers.two_replicas().strategy


class Regression:
    """The smallest task: squared error, weighted like detection by a count over the batch.

    Args:
        scale: `{source: factor}` on the loss of a source, found by the sign of its count.
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


def trainer(alpha=1.0, task=None, rate=0.01, momentum=0.9, **settings):
    keras.utils.set_random_seed(0)
    x = keras.Input((3,))
    h = keras.layers.Dense(8, activation="tanh")(x)
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


def test_combined_loss_by_hand():
    # (2 + 0.5 * 4 * 3) / 1.5
    assert float(combined_loss(2.0, 3.0, 0.5, 4.0)) == pytest.approx(8 / 1.5)
    assert float(combined_loss(2.0, 3.0, 0.0, 4.0)) == 2.0


def test_gradient_does_not_flow_through_the_ratio():
    human, pseudo = tf.Variable(2.0), tf.Variable(4.0)
    with tf.GradientTape() as tape:
        loss = combined_loss(human, pseudo, 1.0, human / pseudo)
    np.testing.assert_allclose(tape.gradient(loss, [human, pseudo]), [0.5, 0.25])


def test_averages_start_at_the_first_loss_and_move_by_decay():
    normalizer = LossNormalizer(decay=0.9)
    normalizer.update("human", 4.0)
    normalizer.update("pseudo", 2.0)
    assert float(normalizer.ratio()) == pytest.approx(2.0)
    normalizer.update("human", 14.0)
    assert float(normalizer.averages["human"]) == pytest.approx(0.9 * 4 + 0.1 * 14)
    normalizer.update("pseudo", 0.0)
    assert float(normalizer.ratio()) == pytest.approx(5.0 / 1.8)


def test_zero_losses_stay_finite():
    normalizer = LossNormalizer()
    normalizer.update("human", 0.0)
    normalizer.update("pseudo", 0.0)
    assert np.isfinite(float(normalizer.ratio()))


def test_scaling_the_pseudo_loss_from_the_start_changes_nothing():
    batches = [batch(8, seed) for seed in range(5)]
    plain = steps(trainer(2.0), batches)
    scaled = steps(trainer(2.0, Regression(pseudo_scale=1000.0)), batches)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    different = steps(trainer(2.0, Regression(1000.0), rate=1e-6, normalize=False), batches)
    assert np.abs(different[0] - plain[0]).max() > 1e-3


def test_alpha_zero_is_supervised_training_to_the_bit():
    batches = [batch(8, seed) for seed in range(4)]
    human = [({"human": x["human"]}, {"human": y["human"]}) for x, y in batches]
    for a, b in zip(steps(trainer(0.0), batches), steps(trainer(1.0), human), strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_pseudo_half_skips_its_average():
    model = trainer()
    steps(model, [batch(8, 0)])
    before = float(model.normalizer.averages["pseudo"])
    human_before = float(model.normalizer.averages["human"])
    steps(model, [batch(8, 1, sources=("human",))])
    assert float(model.normalizer.averages["pseudo"]) == before
    assert float(model.normalizer.averages["human"]) != human_before


def test_plain_loss_diverges_where_the_normalized_one_does_not():
    """A pseudo loss of another scale: at one learning rate only the plain sum blows up."""

    def train(normalize):
        model = trainer(3.0, Regression(30.0), rate=0.02, normalize=normalize, decay=0.9)
        batches = [batch(32, seed % 10) for seed in range(150)]
        steps(model, batches)
        model.trackers["human_loss"].reset_state()
        steps(model, batches[:10])
        return float(model.trackers["human_loss"].result())

    start = 3.0  # the variance of the sum of three normal numbers
    normalized, plain = train(True), train(False)
    assert normalized < 0.5 * start
    assert not plain < 10 * start


def test_fit_does_the_same_steps():
    batches = [batch(8, seed) for seed in range(4)]
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=tf.nest.map_structure(tf.TensorSpec.from_tensor, batches[0]),
    )
    fitted = trainer()
    history = fitted.fit(dataset, verbose=0).history
    for a, b in zip(steps(trainer(), batches), fitted.student.weights, strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=1e-5, atol=1e-6)
    assert {"loss", "human_loss", "pseudo_loss", "ratio"} <= set(history)


def test_shared_and_separate_passes_see_different_statistics():
    batches = [batch(8, 0)]
    shared = steps(trainer(), batches)
    separate = steps(trainer(separate_batch_norm=True), batches)
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(shared, separate, strict=True))


def test_l2_counts_kernels_only_and_clipping_bounds_the_step():
    model = trainer(l2=0.1, clip_norm=1e-3, rate=1.0, momentum=0.0)
    kernels = [np.asarray(v) for v in model.student.trainable_variables if v.name == "kernel"]
    expected = 0.5 * sum((k**2).sum() for k in kernels)
    assert float(half_squared_kernels(model.student)) == pytest.approx(expected, rel=1e-5)
    before = [np.asarray(v) for v in model.student.trainable_variables]
    steps(model, [batch(8, 0)])
    moved = [
        np.asarray(v) - b for v, b in zip(model.student.trainable_variables, before, strict=True)
    ]
    assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("streams", [("human", "classification"), ("pseudo",)])
def test_streams_that_cannot_be_learned_from_are_named(streams):
    model, (images, labels) = trainer(), batch(4, 0, streams)
    with pytest.raises(UserError, match=f"has the streams {', '.join(sorted(streams))}") as told:
        model.train_step((images, labels))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="Joint training on further streams does not exist yet"):
        model(images)


# --- Three errors that raise nothing -----------------------------------------------------------


def replicated_steps(strategy, batches, **settings):
    with strategy.scope():
        model = trainer(**settings)

    def split(one, context):
        start = 4 * context.replica_id_in_sync_group
        return tf.nest.map_structure(lambda x: x[start : start + 4], one)

    @tf.function
    def step(inputs):
        strategy.run(model.train_step, args=(inputs,))

    for one in batches:
        step(
            strategy.experimental_distribute_values_from_function(
                lambda context, one=one: split(one, context)
            )
        )
    return model


@pytest.mark.parametrize("settings", [{}, {"l2": 0.1, "clip_norm": 0.5, "alpha": 2.0}])
def test_two_replicas_equal_one(two_replicas, settings):
    """Silent error 1: gradients are summed over replicas, doubling a loss that is not shared out.

    The losses are weighted by counts that differ between the replicas, so the mean of per-replica
    losses would be seen too.
    """
    batches = [batch(8, seed) for seed in range(4)]
    one = trainer(**settings)
    expected = steps(one, batches)
    both = replicated_steps(two_replicas, batches, **settings)
    for a, b in zip(expected, both.student.weights, strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=2e-4, atol=1e-5)
    for name, tracker in one.trackers.items():
        expected = float(tracker.result())
        assert float(both.trackers[name].result()) == pytest.approx(expected, rel=1e-4), name


def test_averages_do_not_drift_apart_between_replicas(two_replicas):
    """Silent error 2: without aggregation="mean" every replica keeps an average of its own."""
    batches = [batch(8, seed) for seed in range(4)]
    one = trainer()
    steps(one, batches)
    model = replicated_steps(two_replicas, batches)
    for source, average in model.normalizer.averages.items():
        values = [float(v) for v in two_replicas.experimental_local_results(average.value)]
        assert values[0] == values[1]
        assert values[0] == pytest.approx(float(one.normalizer.averages[source]), rel=1e-4)


def test_sum_over_replicas_is_the_identity_on_one_device():
    assert float(sum_over_replicas(tf.constant(3.0))) == 3.0

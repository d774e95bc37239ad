"""The method: formula, moving averages, and the errors that would stay silent."""

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
from regression import SLOW, Regression, assert_same_updates, batch, state, steps, trainer

from official_selftrain.engine.step import half_squared_kernels
from official_selftrain.self_training import (
    MIN_RATIO,
    LossNormalizer,
    combined_loss,
    sum_over_replicas,
)
from official_selftrain.utils.errors import UserError


@pytest.fixture
def two_replicas():
    return helpers.two_replicas().strategy


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
    assert float(normalizer.ratio()) == pytest.approx(MIN_RATIO)


def test_scaling_the_pseudo_loss_from_the_start_changes_nothing():
    """To the bit: a power of two changes no digit, only the exponent."""
    batches = [batch(8, seed) for seed in range(5)]
    plain = steps(trainer(2.0), batches)
    scaled = steps(trainer(2.0, Regression(pseudo_scale=1024.0)), batches)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(a, b)
    different = steps(trainer(2.0, Regression(1024.0), rate=1e-6, normalize=False), batches)
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
    fitted, single = trainer(rate=SLOW), trainer(rate=SLOW)
    before = state(single)
    # Where the length is unknown Keras looks for one more batch, and may count that as an update.
    history = fitted.fit(dataset, steps_per_epoch=4, verbose=0).history
    steps(single, batches)
    assert_same_updates(before, state(single), state(fitted))
    assert {"loss", "human_loss", "pseudo_loss", "ratio"} <= set(history)


@pytest.mark.parametrize("separate", [False, True])
def test_a_shared_pass_has_statistics_of_both_halves_and_separate_ones_of_each(separate):
    """The moving mean, computed by hand from what the batch norm was given."""
    model, (images, labels) = trainer(separate_batch_norm=separate), batch(8, 0)
    images["pseudo"] = images["pseudo"] + 1.0  # the halves have other means
    norm = next(x for x in model.student.layers if "batch_normalization" in x.name)
    before = keras.Model(model.student.input, norm.input)
    human, pseudo = (before(images[source]).numpy().mean(0) for source in ("human", "pseudo"))
    assert np.abs(human - pseudo).min() > 0.01
    decay = norm.momentum
    if separate:
        expected = decay * (1 - decay) * human + (1 - decay) * pseudo
    else:
        expected = (1 - decay) * (human + pseudo) / 2
    steps(model, [(images, labels)])
    np.testing.assert_allclose(norm.moving_mean, expected, rtol=1e-4, atol=1e-7)


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
    one = trainer(rate=SLOW, **settings)
    before = state(one)
    steps(one, batches)
    both = replicated_steps(two_replicas, batches, rate=SLOW, **settings)
    assert_same_updates(before, state(one), state(both))
    for name, tracker in one.trackers.items():
        expected = float(tracker.result())
        assert float(both.trackers[name].result()) == pytest.approx(expected, rel=1e-4), name


def test_averages_do_not_drift_apart_between_replicas(two_replicas):
    """Silent error 2: without aggregation="mean" every replica keeps an average of its own."""
    model = replicated_steps(two_replicas, [batch(8, seed) for seed in range(4)])
    for average in model.normalizer.averages.values():
        values = [float(v) for v in two_replicas.experimental_local_results(average.value)]
        assert len(values) == 2 and values[0] == values[1] > 0


def test_sum_over_replicas_is_the_identity_on_one_device():
    assert float(sum_over_replicas(tf.constant(3.0))) == 3.0

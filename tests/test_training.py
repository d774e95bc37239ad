"""The loop, and the released optimiser's three steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_self_training import batch, trainer

from official_selftrain import checkpoints, training
from official_selftrain.errors import UserError
from official_selftrain.self_training import SelfTrainer


def dataset(start=0, scale=1.0):
    """Endless batches that depend on their position alone."""
    batches = [batch(8, seed, scale=scale) for seed in range(start, 40)]
    return tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=tf.nest.map_structure(tf.TensorSpec.from_tensor, batches[0]),
    )


def weights(model):
    return [np.asarray(w) for w in model.student.weights + model.optimizer.variables]


def test_loop_equals_single_steps_and_reports_means():
    model, rows = trainer(), []
    training.train(
        model, dataset(), 7, steps_per_loop=3, on_loop=lambda step, row: rows.append(row)
    )
    single = trainer()
    step = tf.function(single.train_step)
    for seed in range(7):
        step(batch(8, seed))
    for a, b in zip(weights(model), weights(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert {"loss", "human_loss", "pseudo_loss", "ratio", "images_per_second"} <= set(rows[0])


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    whole = trainer(2.0)
    training.train(whole, dataset(), 8, steps_per_loop=4)

    first = trainer(2.0)
    training.train(first, dataset(), 4, steps_per_loop=4)
    checkpoints.Checkpoints(tmp_path, first).save(4)
    second = trainer(2.0)
    saved = checkpoints.Checkpoints(tmp_path, second)
    start = saved.restore()
    assert start == 4
    training.train(second, dataset(start), 8, start, steps_per_loop=4)
    for a, b in zip(weights(whole), weights(second), strict=True):
        np.testing.assert_array_equal(a, b)
    for source, average in whole.normalizer.averages.items():
        assert float(average) == float(second.normalizer.averages[source])


def test_mirrored_loop_equals_one_device():
    single = trainer()
    training.train(single, dataset(), 6, steps_per_loop=3)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        both = trainer()
    training.train(both, dataset(), 6, steps_per_loop=3, strategy=strategy)
    for a, b in zip(single.student.weights, both.student.weights, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=1e-5)


def test_diverged_training_stops_with_advice():
    with pytest.raises(UserError, match="loss is not finite before step 2.*learning_rate"):
        training.train(trainer(), dataset(scale=np.nan), 4, steps_per_loop=2)


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    model = trainer()
    saved = checkpoints.Checkpoints(tmp_path, model)
    for step in (3, 5):
        saved.save(step)
    newest = tmp_path / "ckpt-5.data-00000-of-00001"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoints.Checkpoints(tmp_path, trainer()).restore() == 3


def test_checkpoint_of_another_network_and_a_broken_one_are_refused(tmp_path):
    model = trainer()
    checkpoints.Checkpoints(tmp_path, model).save(3)
    x = keras.Input((3,))
    other = SelfTrainer(keras.Model(x, {"y": keras.layers.Dense(1)(x)}), None)
    other.compile(optimizer=keras.optimizers.SGD(0.1))
    other.optimizer.build(other.student.trainable_variables)
    with pytest.raises(UserError, match="fits the network of this experiment"):
        checkpoints.Checkpoints(tmp_path, other).restore()
    data = next(tmp_path.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.Checkpoints(tmp_path, trainer()).restore()


def test_weights_of_another_network_are_refused(tmp_path):
    model = trainer().student
    file = checkpoints.save_weights(model, tmp_path)
    checkpoints.load_weights(model, tmp_path)
    x = keras.Input((4,))
    other = keras.Model(x, {"y": keras.layers.Dense(2)(x)})
    with pytest.raises(UserError, match="do not fit this network"):
        checkpoints.load_weights(other, file)
    with pytest.raises(UserError, match="no weights at"):
        checkpoints.load_weights(model, tmp_path / "nowhere")

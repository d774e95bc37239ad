"""The loop, and the released optimizer's three steps."""

import errno
import itertools
import json
import signal
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import two_replicas
from regression import SLOW, assert_same_updates, batch, state, steps, trainer

from official_selftrain.engine import checkpoints, guards, loop, summaries
from official_selftrain.engine.distribution import Distribution, JaxDistribution
from official_selftrain.self_training import SelfTrainer
from official_selftrain.utils.errors import TrainingInterrupted, UserError


def dataset(start=0, scale=1.0):
    """Endless batches that depend on their position alone."""
    batches = [batch(8, seed, scale=scale) for seed in range(start, 40)]
    return tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=tf.nest.map_structure(tf.TensorSpec.from_tensor, batches[0]),
    )


ONE = Distribution(tf.distribute.get_strategy(), 1)


def train(model, data, steps, start=0, distribution=ONE, **settings):
    loop.run_loop(loop.make_loop(model, data, distribution), steps, start_step=start, **settings)


def weights(model):
    return [np.asarray(w) for w in model.student.weights + model.optimizer.variables]


def test_loop_equals_single_steps_and_reports_means():
    model, rows = trainer(rate=SLOW), []
    before = state(model)
    train(model, dataset(), 7, steps_per_loop=3, on_loop=lambda step, row: rows.append(row))
    single, losses = trainer(rate=SLOW), []
    step = tf.function(single.train_step)
    for seed in range(7):
        single.reset_metrics()
        losses.append(float(step(batch(8, seed))["loss"]))
    assert_same_updates(before, state(single), state(model))
    means = [np.mean(part) for part in (losses[:3], losses[3:6], losses[6:])]
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-4)
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert {"loss", "human_loss", "pseudo_loss", "ratio", "images_per_second"} <= set(rows[0])


def test_a_loop_may_end_the_training():
    steps, pauses = [], []
    train(
        trainer(), dataset(), 8, steps_per_loop=2, on_pause=pauses.append,
        on_loop=lambda step, _: steps.append(step) or step == 4,
    )  # fmt: skip
    assert steps == pauses == [2, 4]


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    whole = trainer(2.0)
    train(whole, dataset(), 8, steps_per_loop=4)

    first = trainer(2.0)
    train(first, dataset(), 4, steps_per_loop=4)
    checkpoints.Checkpoints(tmp_path, first).save(4)
    second = trainer(2.0)
    saved = checkpoints.Checkpoints(tmp_path, second)
    start = saved.restore()
    assert start == 4
    train(second, dataset(start), 8, start, steps_per_loop=4)
    for a, b in zip(weights(whole), weights(second), strict=True):
        np.testing.assert_array_equal(a, b)
    for source, average in whole.normalizer.averages.items():
        assert float(average) == float(second.normalizer.averages[source])


def test_left_inside_of_a_loop_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, monkeypatch):
    """Means over the loop too, which the checkpoint holds half."""
    rows = {}

    def keep(name):
        return lambda step, row: rows.setdefault(name, []).append(
            {key: value for key, value in row.items() if key != "images_per_second"}
        )

    whole = trainer(2.0)
    train(whole, dataset(), 8, steps_per_loop=4, on_loop=keep("whole"))
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)  # the end of every loop is far
    first = trainer(2.0)

    def leave(step):
        if step == 6:
            checkpoints.Checkpoints(tmp_path, first).save(step)
            raise TrainingInterrupted("enough", 2)

    with pytest.raises(TrainingInterrupted):
        train(first, dataset(), 8, steps_per_loop=4, on_loop=keep("parts"), on_pause=leave)
    second = trainer(2.0)
    assert checkpoints.Checkpoints(tmp_path, second).restore() == 6
    train(second, dataset(6), 8, 6, steps_per_loop=4, on_loop=keep("parts"))
    assert [row["step"] for row in rows["parts"]] == [4, 8] and rows["parts"] == rows["whole"]
    for a, b in zip(weights(whole), weights(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_without_trackers_is_restored(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, trainer())
    saved.save(3)
    with np.load(saved.path(3)) as archive:
        arrays = {key: archive[key] for key in archive if not key.startswith("trackers")}
    np.savez(saved.path(3), **arrays)
    assert saved.restore() == 3


def test_checkpoints_of_one_worker_and_of_several_are_exchanged(tmp_path):
    """One of several workers saves: it cannot read sums over all of them."""
    several = checkpoints.Checkpoints(tmp_path, trainer(), workers=2)
    several.save(3)
    with np.load(several.path(3)) as archive:
        assert not [key for key in archive if key.startswith("trackers")]
    one = checkpoints.Checkpoints(tmp_path, trainer())
    assert one.restore() == 3
    one.save(5)
    assert several.restore() == 5


@pytest.mark.parametrize("start", [0, 4])
def test_the_time_of_a_step_is_told_once_after_two_steps(start):
    told = []
    train(
        trainer(), dataset(start), start + 9, start, steps_per_loop=9,
        on_pace=lambda step, seconds: told.append((step, seconds)),
    )  # fmt: skip
    ((step, seconds),) = told
    assert step == start + 2 and seconds > 0


@pytest.mark.parametrize(("divisible", "bounds"), [(True, [0, 1, 2, 3, 4]), (False, [0, 1, 2, 4])])
def test_the_bar_moves_inside_of_a_loop_wherever_calls_may_be_divided(
    divisible, bounds, monkeypatch
):
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)  # no call has time for more than one step
    monkeypatch.setattr(loop, "number", float)
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    place = SimpleNamespace(
        divisible=divisible,
        trainer=SimpleNamespace(optimizer=SimpleNamespace(iterations=0)),
        steps=lambda count, report: {"done": 1.0} if report else {},
    )
    seen, step, told = [0], 0, []
    bar = SimpleNamespace(clear=lambda: None, update=lambda count: seen.append(seen[-1] + count))
    pace = loop._Pace(bar, lambda *pair: told.append(pair))
    while step < 4:
        step, scalars = pace.call(place, step, 4)
        assert step == seen[-1] and bool(scalars) == (step == 4)
    assert seen == bounds and told == [(2, 1)]
    assert loop.JaxLoop.divisible and not loop.JaxLoop.may_pause


def test_the_bar_shows_the_losses_on_labels():
    scalars = {"loss": 1.14, "human_loss": 0.18, "pseudo_loss": 0.25, "images_per_second": 3.0}
    assert loop._postfix(scalars) == "loss human 0.180, pseudo 0.250, 3 images/s"


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no tensorboard"), AttributeError("NumPy 2")]
)
def test_without_tensorboard_one_line_says_so_and_training_goes_on(
    error, tmp_path, monkeypatch, caplog
):
    def fail(name):
        raise error

    monkeypatch.setattr(summaries.extras.importlib, "import_module", fail)
    caplog.set_level("INFO")
    summaries._has_tensorboard.cache_clear()
    for _ in range(2):
        train(trainer(), dataset(), 1, summary_folder=tmp_path)
    summaries._has_tensorboard.cache_clear()
    told = [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()]
    assert len(told) == 1 and "official_selftrain[tensorboard]" in told[0]
    assert "history.jsonl" in told[0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_ctrl_c_after_it_ends_at_once(first, caplog):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with guards.GracefulShutdown() as shutdown:
        assert not shutdown.received
        signal.raise_signal(first)
        assert shutdown.received == first and "without saving" in caplog.text
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_local_joins_the_parts_of_the_replicas_in_order():
    two = two_replicas()
    parts = two.strategy.experimental_distribute_values_from_function(
        lambda context: tf.fill([2], context.replica_id_in_sync_group)
    )
    np.testing.assert_array_equal(two.local(parts), [0, 0, 1, 1])
    np.testing.assert_array_equal(ONE.local(tf.range(3)), [0, 1, 2])
    np.testing.assert_array_equal(JaxDistribution().local(np.arange(3)), [0, 1, 2])


def test_mirrored_loop_equals_one_device():
    single = trainer(rate=SLOW)
    before = state(single)
    train(single, dataset(), 6, steps_per_loop=3)
    strategy = two_replicas().strategy
    with strategy.scope():
        both = trainer(rate=SLOW)
    shared = strategy.experimental_distribute_dataset(dataset())
    train(both, shared, 6, steps_per_loop=3, distribution=Distribution(strategy, 2))
    assert_same_updates(before, state(single), state(both))


def test_a_loss_that_is_not_finite_stops_the_loop():
    with pytest.raises(guards.NonFiniteLossError, match="loss is not finite before step 2"):
        train(trainer(), dataset(scale=np.nan), 4, steps_per_loop=2)


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    model = trainer()
    saved = checkpoints.Checkpoints(tmp_path, model)
    for step in (3, 5):
        saved.save(step)
    newest = saved.path(5)
    newest.write_bytes(newest.read_bytes()[:-100])
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
    data = next(tmp_path.glob("*.npz"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.Checkpoints(tmp_path, trainer()).restore()


def test_other_files_among_the_checkpoints_are_ignored(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, trainer())
    saved.save(3)
    for name in ("ckpt-best.npz", "ckpt-00000012 (1).npz", "ckpt-00000009.npz.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert saved.steps() == [3] and saved.restore() == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x89HDF\r\n\x1a\n", b"text"])
@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras"])
def test_damaged_weights_are_told_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="do not fit this network or are damaged") as told:
        checkpoints.load_weights(trainer().student, tmp_path / name)
    assert "\n" not in str(told.value)


def test_classes_beside_weights_are_read_checked_or_absent(tmp_path):
    (tmp_path / "model.weights.h5").touch()
    assert checkpoints.classes_of(tmp_path) is None
    file = tmp_path / "classes.json"
    for text in ("", '{"num_cl'):
        file.write_text(text)
        assert checkpoints.classes_of(tmp_path) is None
    file.write_text('{"num_classes": 3, "names": {"1": "cat"}}')
    assert checkpoints.classes_of(tmp_path) == {"num_classes": 3, "names": {1: "cat"}}
    for text in ("[]", "5", '{"num_classes": 3}', '{"num_classes": "x", "names": {}}'):
        file.write_text(text)
        with pytest.raises(UserError, match="classes.json must hold"):
            checkpoints.classes_of(tmp_path)


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


# --- Micro-batches, averages of weights, loss scale ------------------------------------------


def split(one, parts):
    """The micro-batches of a batch."""

    def part(index):
        size = 8 // parts
        return tf.nest.map_structure(lambda x: x[index * size : (index + 1) * size], one)

    return [part(index) for index in range(parts)]


def micro_batches(parts, count=6):
    stream = [part for seed in range(count) for part in split(batch(8, seed), parts)]
    return tf.data.Dataset.from_generator(
        lambda: iter(stream),
        output_signature=tf.nest.map_structure(tf.TensorSpec.from_tensor, stream[0]),
    )


def without_batch_norm(**settings):
    return trainer(rate=SLOW, batch_norm=False, separate_batch_norm=True, **settings)


@pytest.mark.parametrize("settings", [{}, {"l2": 0.1, "clip_norm": 0.5, "alpha": 2.0}])
@pytest.mark.parametrize("devices", [1, 2])
def test_micro_batches_make_the_update_of_the_whole_batch(settings, devices):
    """Counts differ between micro-batches and sources, so that means of means would be seen."""
    whole, rows = without_batch_norm(**settings), {}
    before = state(whole)
    train(whole, dataset(), 6, steps_per_loop=3, on_loop=lambda s, row: rows.update({s: row}))
    strategy = two_replicas().strategy if devices == 2 else ONE.strategy
    with strategy.scope():
        parted = without_batch_norm(accumulate=True, **settings)
    one = loop.make_loop(
        parted,
        strategy.experimental_distribute_dataset(micro_batches(4)),
        Distribution(strategy, devices),
        micro_batches=4,
    )

    def compare(step, row):
        for name in ("loss", "human_loss", "pseudo_loss", "ratio", "gradient_norm"):
            assert row[name] == pytest.approx(rows[step][name], rel=1e-4), name

    loop.run_loop(one, 6, steps_per_loop=3, on_loop=compare)
    assert_same_updates(before, state(whole), state(parted))


def test_average_of_weights_by_hand():
    model = trainer(ema_decay=0.25)
    numbers = [v for v in model.student.variables if v.dtype == "float32"]
    expected, step = None, tf.function(model.train_step)
    for t in range(1, 4):
        step(batch(8, t))
        now = [np.asarray(v) for v in numbers]
        decay = min(0.25, (1 + t) / (10 + t))  # 3/12 and 4/13 > 0.25
        pairs = zip(expected or now, now, strict=True)
        expected = now if t == 1 else [decay * a + (1 - decay) * b for a, b in pairs]
    assert len(model.average.averages) == len(expected) == 8  # batch statistics too
    for average, value in zip(model.average.averages, expected, strict=True):
        # An average forgets what it rounded: three roundings of numbers below 2.
        np.testing.assert_allclose(np.asarray(average), value, rtol=0, atol=3 * 2.0**-23)
    model.average.swap_weights(model.student)
    np.testing.assert_allclose(np.asarray(numbers[0]), expected[0], rtol=1e-5)
    model.average.swap_weights(model.student)
    np.testing.assert_array_equal(np.asarray(numbers[0]), now[0])


def scaled(model, scale):
    model.compile(keras.optimizers.LossScaleOptimizer(model.optimizer, initial_scale=scale))
    model.optimizer.build(model.student.trainable_variables)
    return model


@pytest.mark.parametrize("devices", [1, 2])
def test_loss_scale_changes_no_number_and_skips_what_overflows(devices, tmp_path):
    plain = trainer(rate=SLOW, l2=0.1, clip_norm=0.5)
    start = state(plain)
    train(plain, dataset(), 4)
    strategy = two_replicas().strategy if devices == 2 else ONE.strategy
    with strategy.scope():
        model = scaled(trainer(rate=SLOW, l2=0.1, clip_norm=0.5), 2.0**15)
    data = strategy.experimental_distribute_dataset(dataset())
    train(model, data, 4, distribution=Distribution(strategy, devices))
    weights_of = [{k: v for k, v in state(m).items() if "student" in k} for m in (plain, model)]
    assert_same_updates({key: start[key] for key in weights_of[0]}, *weights_of)
    # The largest scale float32 holds: every gradient overflows, no weight moves, the scale halves.
    before = [np.asarray(v) for v in model.student.trainable_variables]
    model.optimizer.dynamic_scale.assign(3e38)
    data = strategy.experimental_distribute_dataset(dataset(scale=1e3))
    rows = []
    train(model, data, 1, distribution=Distribution(strategy, devices),
          on_loop=lambda step, row: rows.append(row))  # fmt: skip
    assert np.isfinite(rows[0]["loss"]) and "gradient_norm" not in rows[0]
    for a, b in zip(before, model.student.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    assert loop.number(model.optimizer.dynamic_scale) == pytest.approx(1.5e38)
    checkpoints.Checkpoints(tmp_path, model).save(1)
    model.optimizer.dynamic_scale.assign(1.0)
    assert checkpoints.Checkpoints(tmp_path, model).restore() == 1
    assert loop.number(model.optimizer.dynamic_scale) == pytest.approx(1.5e38)


# --- Guards ----------------------------------------------------------------------------------


def test_a_dead_input_is_loud(caplog, capfd):
    def slow():
        for seed in range(4):
            time.sleep(2.5 if seed == 2 else 0)
            yield batch(8, seed)

    signature = tf.nest.map_structure(tf.TensorSpec.from_tensor, batch(8, 0))
    stuck = tf.data.Dataset.from_generator(slow, output_signature=signature)
    model = trainer()
    train(model, dataset(), 1)
    train(model, stuck, 4, steps_per_loop=1, stall_seconds=1)
    warnings = [r.message for r in caplog.records if "no loop of steps has finished" in r.message]
    assert warnings and "since step 2: the input is stuck" in warnings[-1]
    stack = capfd.readouterr().err
    assert "in _watch" in stack and "in run_loop" in stack  # where it hangs


def test_skipped_steps_consume_their_batch():
    model, single = trainer(rate=SLOW), trainer(rate=SLOW)
    before = state(model)
    train(model, dataset(), 5, steps_per_loop=3, skipped=[1, 3])
    steps(single, [batch(8, seed) for seed in (0, 2, 4)])
    assert_same_updates(before, state(single), state(model))


# --- Checkpoints -----------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path, trainer(), keep=2)
    for step in (0, 5, 10, 100000000):
        saved.save(step)
    assert saved.steps() == [10, 100000000]


def test_the_best_evaluation_is_kept(tmp_path):
    model = trainer().student
    first = [np.asarray(w) for w in model.weights]
    checkpoints.save_best(model, tmp_path, 1, "AP", 0.5)
    model.set_weights([w + 1 for w in first])
    checkpoints.save_best(model, tmp_path, 2, "AP", 0.4)
    checkpoints.load_weights(model, tmp_path / "best.weights.h5")
    np.testing.assert_array_equal(np.asarray(model.weights[0]), first[0])
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 1, "metric": "AP", "value": 0.5
    }  # fmt: skip
    (tmp_path / "best.json").write_text("")  # a power cut
    checkpoints.save_best(model, tmp_path, 3, "AP", 0.4)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"value": "x"}', '{"value": NaN}'])
def test_a_damaged_record_of_the_best_is_made_again(content, tmp_path):
    model = trainer().student
    (tmp_path / "best.json").write_text(content)
    checkpoints.save_best(model, tmp_path, 2, "AP", 0.4)
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 0.4
    (tmp_path / "best.weights.h5").unlink()
    checkpoints.save_best(model, tmp_path, 3, "AP", 0.3)
    assert (tmp_path / "best.weights.h5").exists()


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    saved = checkpoints.Checkpoints(tmp_path, trainer(), keep=1)
    saved.save(1)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device; the earlier checkpoints"):
        saved.save(2)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt-00000001.npz"]
    assert saved.restore() == 1

"""One training: averages, parts of batches, precision, and what goes wrong."""

import itertools
import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tensorflow as tf
from helpers import record
from mini import history, resolve, resolve_masks

from official_selftrain import config as config_lib
from official_selftrain import pipeline
from official_selftrain.data import records
from official_selftrain.engine import guards, memory, precision
from official_selftrain.engine.distribution import JaxDistribution
from official_selftrain.pipeline import divergence, evaluation, training
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.utils.errors import UserError


def teacher_of(data, *overrides):
    return config_lib.teacher_config(resolve(data, "human.cache=false", *overrides))


def stored(file):
    """Sorted (name, array) of a weights file."""
    found = []
    with h5py.File(file) as archive:
        archive.visititems(
            lambda name, item: found.append((name, item[()])) if hasattr(item, "shape") else None
        )
    return sorted(found, key=lambda pair: pair[0])


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_averaged_weights_are_evaluated_beside_the_raw_ones_and_the_best_are_kept(data, tmp_path):
    config = teacher_of(data, "trainer={ema_decay: 0.5, evaluation_interval: 2}")
    metrics = pipeline.train(config, tmp_path)
    raw = {name: value for name, value in metrics.items() if not name.startswith("ema/")}
    assert {f"ema/{name}" for name in raw} == set(metrics) - set(raw) and raw
    alone = pipeline.evaluate(config, tmp_path / "again", weights=tmp_path / "ema.weights.h5")
    assert alone == pytest.approx({name: metrics[f"ema/{name}"] for name in raw})
    averaged, last = (
        np.load(tmp_path / "checkpoints/ckpt-00000004.npz")[key] for key in ("ema/0", "student/0")
    )
    assert np.abs(averaged - last).max() > 0
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == "AP" and best["value"] == max(history(tmp_path)[0]["AP"], raw["AP"])
    assert (tmp_path / "best.weights.h5").exists()


def test_the_last_evaluation_counts_for_the_best(data, tmp_path, monkeypatch):
    values = iter([0.2, 0.3])
    measured = {"AR": 0.9, "AP": None}  # the name decides, not the place
    monkeypatch.setattr(evaluation, "measure", lambda *_: measured | {"AP": next(values)})
    pipeline.train(teacher_of(data, "trainer.evaluation_interval=2"), tmp_path)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 4, "metric": "AP", "value": 0.3}
    kept, last = (stored(tmp_path / f"{name}.weights.h5") for name in ("best", "model"))
    for (name, a), (other, b) in zip(kept, last, strict=True):
        assert name == other
        np.testing.assert_array_equal(a, b)


# Raw and averaged, of the steps 2, 4, ...
ON_SELECTION = [0.1, 0.2, 0.4, 0.3, 0.35, 0.38, 0.3, 0.4, 0.9, 0.9]


def selecting(data, folder, monkeypatch, values):
    """Trains with scripted evaluations on the one image that is held out."""
    values = iter(values)

    def measure(predictor, data, distribution, source):
        assert source == "selection" and data.summaries[source]["images"] == 1
        value = next(values)
        if value is None:
            raise KeyboardInterrupt
        return {"AP": value}

    monkeypatch.setattr(evaluation, "measure", measure)
    config = teacher_of(
        data, "evaluation=null,selection={min_images: 1, patience: 2}", "human.batch_size=2",
        "trainer={steps: 10, evaluation_interval: 2, ema_decay: 0.5}",
    )  # fmt: skip
    assert pipeline.train(config, folder) == {}
    return config


def test_held_out_images_stop_a_training_and_choose_its_weights(data, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    selecting(data, whole, monkeypatch, ON_SELECTION)
    best = json.loads((whole / "best.json").read_text())
    assert best == {
        "step": 4, "metric": "AP", "value": 0.4, "averaged": False, "evaluations": 4,
        "before": 0.4, "after": 0.4, "stopped": True, "converged": True,
    }  # fmt: skip
    assert [row["step"] for row in history(whole)] == [2, 4, 6, 8]
    assert not (whole / "ema.weights.h5").exists()
    # A kill while the weights of step 6 are measured; those of step 4 are a checkpoint.
    with pytest.raises(KeyboardInterrupt):
        selecting(data, resumed, monkeypatch, [*ON_SELECTION[:5], None])
    config = selecting(data, resumed, monkeypatch, ON_SELECTION[4:])
    assert json.loads((resumed / "best.json").read_text()) == best
    for name in ("best", "model"):
        pairs = zip(*(stored(f / f"{name}.weights.h5") for f in (whole, resumed)), strict=True)
        assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in pairs)
    assert (whole / "model.weights.h5").read_bytes() == (whole / "best.weights.h5").read_bytes()
    # The averaged weights were in place while they were measured, and are not any more.
    saved = {n: np.load(whole / f"checkpoints/ckpt-0000000{n}.npz")["student/0"] for n in (4, 8)}
    kept = [array for _, array in stored(whole / "model.weights.h5")]
    assert any(np.array_equal(array, saved[4]) for array in kept)
    assert not any(np.array_equal(array, saved[8]) for array in kept)
    # Weights that were lost after the end are made again from what was kept.
    (whole / "model.weights.h5").unlink()
    selecting(data, whole, monkeypatch, [])
    assert (whole / "model.weights.h5").read_bytes() == (whole / "best.weights.h5").read_bytes()
    (resumed / "model.weights.h5").unlink()
    (resumed / "best.weights.h5").unlink()
    with pytest.raises(UserError, match="best weights of this training, .* is missing"):
        pipeline.train(config, resumed)


def test_micro_batches_train_as_the_whole_batch_does_but_for_batch_statistics(data, tmp_path):
    """With frozen statistics nothing differs."""
    settings = "task.bn_frozen=true", "self_training.separate_batch_norm=true"
    losses = []
    for parts in (1, 2):
        config = teacher_of(data, f"trainer.micro_batches={parts}", *settings)
        pipeline.train(config, tmp_path / f"{parts}", evaluate_after=False)
        rows = history(tmp_path / f"{parts}")
        losses.append([[row["loss"], row["gradient_norm"]] for row in rows])
    # Sums in another order; at the rate of `mini` a difference does not grow.
    np.testing.assert_allclose(*losses, rtol=1e-4)
    with pytest.raises(UserError, match="=2 is not divisible by trainer.micro_batches=3; use 3"):
        teacher_of(data, "trainer.micro_batches=3", *settings)
    with pytest.raises(UserError, match="needs self_training.separate_batch_norm=true"):
        resolve(data, "trainer.micro_batches=2")


def test_many_evaluations_trace_once_and_a_training_leaves_nothing_registered(
    data, tmp_path, monkeypatch
):
    traces = []
    predict = DetectionTask.predict

    def counted(*arguments):
        traces.append(1)
        return predict(*arguments)

    monkeypatch.setattr(DetectionTask, "predict", counted)
    before = set(memory._registry())
    config = teacher_of(data, "trainer={evaluation_interval: 1, steps_per_loop: 1}")
    pipeline.train(config, tmp_path, evaluate_after=False)
    assert [row["step"] for row in history(tmp_path) if "AP" in row] == [1, 2, 3]
    assert len(traces) == 1
    assert set(memory._registry()) == before


def test_a_predictor_of_another_size_follows_the_training(masks, tmp_path, monkeypatch):
    """Several scales are predicted by a network of their own, whose weights are those of the
    step: the metrics on the way are those of a training that ends there."""
    small = "trainer={evaluation_interval: 2, steps: 4},task.eval_scales=[0.5,1.0]"
    config = config_lib.teacher_config(resolve_masks(masks, small, "human.cache=false"))
    measured, measure = [], evaluation.measure

    def noted(predictor, *others):
        models = predictor.model, predictor._network
        measured.append([np.concatenate([w.ravel() for w in m.get_weights()]) for m in models])
        return measure(predictor, *others)

    monkeypatch.setattr(evaluation, "measure", noted)
    pipeline.train(config.override({"trainer.evaluation_interval": 1}), tmp_path)
    assert len(measured) == 4 and measured[0][0].size == measured[0][1].size
    for model, network in measured:
        np.testing.assert_array_equal(model, network)
    assert np.abs(measured[0][0] - measured[2][0]).max() > 0


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "record 1"),
        (lambda file: flip(file, 40), "record 0"),
        (lambda file: flip(file, file.stat().st_size // 2), "record"),
        (lambda file: file.unlink(), "a.tfrecord"),
        (lambda file: (file.unlink(), file.mkdir()), "a.tfrecord"),
    ],
)
def test_damaged_shards_are_named_while_they_are_read(tmp_path, harm, message):
    class Prepared:
        def __init__(self):
            self.summaries = {"human": {}}

        def files(self, name):
            return [str(tmp_path / "a.tfrecord")]

    records.write(tmp_path / "a.tfrecord", [record(image_id=i) for i in range(2)])
    harm(tmp_path / "a.tfrecord")
    data, read = Prepared(), evaluation.readable_errors
    with pytest.raises(UserError, match=message) as told, read(data, ["human", "pseudo"]):
        for serialized in tf.data.TFRecordDataset(data.files("human")).map(records.decode):
            serialized["image"]
    assert "a.tfrecord" in str(told.value) and "\n" not in str(told.value)


def test_lack_of_memory_is_one_line_with_a_remedy():
    told = pytest.raises(UserError, match="out of memory .shape.*human.batch_size")
    with told, evaluation.readable_errors(None, []):
        raise tf.errors.ResourceExhaustedError(None, None, "shape[9]\nmore", None)


def test_damaged_rows_of_the_history_are_left_out(tmp_path, caplog):
    file = tmp_path / "history.jsonl"
    rows = ['{"step": 2, "loss": 1}', "", '{"step": 4, "lo', '{"loss": 1}', "[4]", '{"step": 6}']
    file.write_bytes("\n".join(rows).encode() + b"\n\x00\xff\n")
    training._forget_after(file, 4)
    assert file.read_text() == rows[0] + "\n"
    assert "5 damaged rows are left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "flags", "lacks"),
    [
        ("mixed_bfloat16", "flags : fpu avx2 avx512f", True),
        ("mixed_bfloat16", "flags : fpu avx512_bf16", False),
        ("mixed_bfloat16", "flags : fpu amx_bf16 avx512_fp16", False),
        ("mixed_float16", "flags : fpu amx_bf16 f16c", True),
        ("mixed_float16", "flags : fpu avx512_fp16", False),
        ("mixed_bfloat16", "Features : fp asimd bf16", False),
        ("mixed_float16", "model name : unknown", False),  # nothing is known: nothing is said
    ],
)
def test_only_a_cpu_without_instructions_for_a_precision_is_slow(name, flags, lacks, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\n{flags}\n\nprocessor : 1\n{flags}\n")
    assert precision.cpu_lacks(name, file) == lacks
    assert not precision.cpu_lacks(name, tmp_path / "nowhere")


def poison(monkeypatch, steps):
    """Batches of these steps hold NaN."""
    original = training.training_data

    def poisoned(config, task, data, start, context=None):
        dataset = original(config, task, data, start, context)

        def spoil(index, batch):
            images, labels = batch
            bad = tf.reduce_any(tf.equal(index + start, tf.constant(steps, tf.int64)))
            human = tf.where(bad, tf.fill(tf.shape(images["human"]), np.nan), images["human"])
            return images | {"human": human}, labels

        return dataset.enumerate().map(spoil)

    monkeypatch.setattr(training, "training_data", poisoned)


def test_a_loss_that_is_not_finite_stops_with_checkpoint_and_batch(data, tmp_path, monkeypatch):
    poison(monkeypatch, [3])
    with pytest.raises(UserError, match="not finite before step 4: the training diverged") as told:
        pipeline.train(teacher_of(data), tmp_path)
    assert "ckpt-00000002.npz" in str(told.value) and "nonfinite-00000003-0.npz" in str(told.value)
    with np.load(tmp_path / "nonfinite-00000003-0.npz") as batch:
        assert np.isnan(batch["0/images/human"]).all()
        assert batch["0/labels/human/boxes"].shape == (4, 3, 4)
    assert not (tmp_path / "model.weights.h5").exists()
    told = json.loads((tmp_path / guards.DIVERGED).read_text())
    assert told["step"] == 4
    # Weights of the good checkpoint are what a training that ends there has.
    with np.load(tmp_path / "checkpoints/ckpt-00000002.npz") as good:
        assert all(np.isfinite(good[key]).all() for key in good)


def test_bad_batches_are_left_out_as_often_as_allowed(data, tmp_path, monkeypatch):
    poison(monkeypatch, [0, 2])
    pipeline.train(teacher_of(data, "trainer.skip_nonfinite=2"), tmp_path / "a")
    assert json.loads((tmp_path / "a/skipped.json").read_text()) == [0, 2]
    rows = history(tmp_path / "a")
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[-1]["step"] == 4
    with pytest.raises(UserError, match="the training diverged"):
        pipeline.train(teacher_of(data, "trainer.skip_nonfinite=1"), tmp_path / "b")


@pytest.mark.parametrize(("allowed", "skipped"), [(1, [0]), (2, [0, 2])])
def test_a_resumed_training_knows_how_many_batches_it_has_left_out(tmp_path, allowed, skipped):
    """Of the steps 0 and 2, which go wrong, 0 was left out before the training was killed."""
    batches = itertools.count()
    steps = SimpleNamespace(
        batch=lambda: [({"human": np.full(1, next(batches))}, {"human": {}})],
        step=lambda batch: {"loss": np.nan if batch[0][0]["human"] in (0, 2) else 1.0},
    )
    (tmp_path / "skipped.json").write_text("[0]")
    found = divergence.Divergence(
        SimpleNamespace(
            folder=tmp_path,
            config=SimpleNamespace(trainer=SimpleNamespace(skip_nonfinite=allowed)),
            restore=lambda: 0,
            loop=lambda start: steps,
            distribution=JaxDistribution(),
            saved=SimpleNamespace(path=lambda step: f"ckpt-{step}"),
        )
    )
    problem = guards.NonFiniteLossError("loss", 4)
    if allowed == 1:
        with pytest.raises(UserError, match="before step 3: the training diverged.*ckpt-0"):
            found.leave_out(problem)
    else:
        found.leave_out(problem)
    assert json.loads((tmp_path / "skipped.json").read_text()) == skipped
    with np.load(tmp_path / "nonfinite-00000002-0.npz") as saved:
        assert saved["0/images/human"] == [2]


def test_check_looks_at_everything_and_leaves_no_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(DetectionTask, "warnings", lambda *_: ["2 boxes are left out"])
    rows = dict(pipeline.check(teacher_of(data), tmp_path))
    assert rows["boxes"] == "WARNING: 2 boxes are left out"
    assert rows["class 1 square"] == "5 in human, 5 in evaluation"
    assert "4 images (128, 128, 3)" in rows["first batch of human"]
    assert "4 steps take" in rows["second step"] and "GB are free" in rows["checkpoints"]
    assert float(rows["loss"]) > 0 and (tmp_path / "check.png").stat().st_size > 1000
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "config.yaml").exists()
    poison(monkeypatch, [0])
    with pytest.raises(UserError, match="not finite before step 1, at the very beginning: check"):
        pipeline.check(teacher_of(data), tmp_path)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains_with_float32_losses_and_weights(data, tmp_path, precision):
    whole, half = (tmp_path / name for name in ("whole", "half"))
    pipeline.train(teacher_of(data), whole, evaluate_after=False)
    metrics = pipeline.train(teacher_of(data, f"task.precision={precision}"), half)
    assert "AP" in metrics
    losses = [[row["loss"] for row in history(folder)] for folder in (whole, half)]
    assert losses[0] != losses[1]
    # Some four roundings of 2^-9 from image to loss (see test_xla) are 1 %. They do not grow from
    # step to step: at the rate of `mini` the weights stay where they are.
    np.testing.assert_allclose(*losses, rtol=0.02)
    with np.load(half / "checkpoints/ckpt-00000004.npz") as saved:
        arrays = {key: saved[key] for key in saved}
    assert {a.dtype.name for a in arrays.values()} <= {"float32", "int32", "int64"}
    scales = [a for a in arrays.values() if a.shape == () and a == 2.0**15]
    assert bool(scales) == (precision == "mixed_float16")

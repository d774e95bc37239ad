"""One training on one, two and four devices, on two workers, and on JAX: the same numbers."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import assert_same_training, mask_of
from mini import history, resolve, resolve_masks
from workers import finish, start_workers

from official_selftrain import config as config_lib
from official_selftrain import pipeline, teacher
from official_selftrain.config import RuntimeConfig
from official_selftrain.data import records
from official_selftrain.engine import distribution
from official_selftrain.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Batches that four devices share, statistics over all of them.
SHARED = "task.num_classes=2,human.batch_size=4,pseudo.batch_size=4,task.bn_synchronized=true"
COMPARED = ("loss", "human_loss", "pseudo_loss", "ratio", "gradient_norm")


def assert_same_losses(folder, expected, rtol=2e-4):
    """Up to the order of sums; at the rate of `mini` a difference does not grow."""
    found, wanted = history(folder), history(expected)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for name in COMPARED:
        values = [[row.get(name, 0) for row in rows] for rows in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def student(request, data, masks, tmp_path_factory):
    """The config of a student, and its run on one device."""
    folder = tmp_path_factory.mktemp(request.param)
    resolve_it = resolve if request.param == "detection" else resolve_masks
    config = resolve_it(data, SHARED)
    pipeline.train(config_lib.teacher_config(config), folder / "teacher")
    pipeline.pseudo_label(config, folder / "labels", folder / "teacher")
    config = config_lib.student_config(config, f"{folder}/labels/pseudo-*.tfrecord", None)
    pipeline.train(config, folder / "one")
    return config, folder


def train_elsewhere(folder, expected, *flags):
    """Trains in `folder`, in a process of its own, what was trained in `expected`, from its first
    checkpoint; all that is measured must be equal."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(expected / "checkpoints/ckpt-00000000.npz", folder / "checkpoints")
    shutil.copy(expected / "config.yaml", folder)
    command = [sys.executable, "-m", "official_selftrain.train", f"--model_dir={folder}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_losses(folder, expected)
    assert_same_training(folder, expected, 0, 4)
    found, wanted = (json.loads((f / "metrics.json").read_text()) for f in (folder, expected))
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("strategy", "devices"), [("mirrored", 4), ("jax", 2)])
def test_devices_and_backends_change_nothing(student, strategy, devices):
    """Losses, moving averages, weights, batch statistics and metrics of a student."""
    flags = f"--strategy={strategy}", f"--params_override=runtime.devices={devices}"
    train_elsewhere(student[1] / f"{strategy}{devices}", student[1] / "one", *flags)


def test_devices_change_nothing_for_a_teacher(student):
    folder = student[1]
    flags = "--strategy=mirrored", "--params_override=runtime.devices=2"
    train_elsewhere(folder / "teacher2", folder / "teacher", *flags)


def test_labels_of_several_devices_equal_those_of_one(student):
    config, folder = student
    config = config.override({"runtime": {"strategy": "mirrored", "devices": 2}})
    written, report = pipeline.pseudo_label(config, folder / "labels2", folder / "teacher")
    wanted = json.loads((folder / "labels/statistics.json").read_text())
    assert report.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, float | int):
            assert report[name] == pytest.approx(value, abs=1e-3), name
    expected = list(records.read(teacher.outputs(written, folder / "labels")))
    for found, record in zip(records.read(written), expected, strict=True):
        assert found.image_id == record.image_id
        np.testing.assert_allclose(found.boxes, record.boxes, atol=1e-5)
        # Rounding decides where two classes are equally likely.
        assert np.mean(mask_of(found) != mask_of(record)) < 1e-3


# --- Two processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_survive_the_kill_of_either(data, tmp_path):
    """A worker is killed, later the chief; both are started again; the losses are those of one
    process that nothing disturbed, and so are weights and metrics."""
    longer = f"{SHARED},trainer.steps=6,human.batch_size=2,pseudo=null"
    config = resolve(data, longer)
    metrics = pipeline.train(config, tmp_path / "one")
    folder = tmp_path / "two"
    for victim, step in ((1, 2), (0, 4)):
        processes = start_workers(data, folder, longer)
        mark = folder / f"checkpoints/ckpt-{step:08d}.npz"
        while not mark.exists() and processes[0].poll() is None:
            time.sleep(0.02)
        processes[victim].send_signal(signal.SIGKILL)
        statuses = finish(processes)
        assert mark.exists() and statuses[victim] == -signal.SIGKILL
        log = (tmp_path / f"worker{1 - victim}.log").read_text()
        assert statuses[1 - victim] not in (0, -signal.SIGKILL), log[-2000:]
        assert not (folder / "model.weights.h5").exists()
    assert finish(start_workers(data, folder, longer)) == [0, 0]
    assert_same_losses(folder, tmp_path / "one")
    assert_same_training(folder, tmp_path / "one", 0, 6)
    assert json.loads((folder / "metrics.json").read_text()) == pytest.approx(metrics, abs=1e-3)
    assert "resumes from the last checkpoint" in (tmp_path / "worker0.log").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "needs the environment variable TF_CONFIG.*given None"),
        ('{"task": {"type": "worker", "index": 3}, "cluster": {"worker": ["a:1"]}}', "TF_CONFIG"),
        ("{", "TF_CONFIG"),
    ],
)
def test_a_wrong_cluster_is_told(monkeypatch, text, message):
    if text is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=message):
        distribution.make_distribution(RuntimeConfig(strategy="multi_worker_mirrored"))


def test_what_this_machine_cannot_do_is_told():
    with pytest.raises(UserError, match="devices=9, but this process has only 4"):
        distribution.make_distribution(RuntimeConfig(strategy="mirrored", devices=9))
    with pytest.raises(UserError, match="`jax` needs the environment variable KERAS_BACKEND=jax"):
        distribution.make_distribution(RuntimeConfig(strategy="jax"))
    for wrong, message in (
        (
            {"jit_compile": True, "strategy": "mirrored"},
            "cannot compile a step that runs on several replicas",
        ),
        ({"tpu": "local"}, "tpu needs strategy=tpu"),
        ({"devices": 2}, "devices needs strategy=mirrored or strategy=jax"),
    ):
        with pytest.raises(UserError, match=message):
            config_lib.model_from_dict(RuntimeConfig, wrong)

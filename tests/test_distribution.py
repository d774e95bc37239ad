"""One training on one, two and four devices, on two workers, and on JAX: the same numbers."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from mini import resolve, resolve_masks

from official_selftrain import config as config_lib
from official_selftrain import runner, teacher
from official_selftrain.data import records

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Batches that four devices share; statistics over all of them.
SHARED = "human.batch_size=4,pseudo.batch_size=4,task.bn_synchronized=true,task.num_classes=2"
COMPARED = ("loss", "human_loss", "pseudo_loss", "ratio", "gradient_norm")


def history(folder):
    return [json.loads(line) for line in open(folder / "history.jsonl", encoding="utf-8")]


def assert_same_losses(folder, expected, names=COMPARED, rtol=2e-4):
    found, wanted = history(folder), history(expected)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for name in names:
        values = [[row[name] for row in rows] for rows in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=rtol, err_msg=name)


def assert_same_weights(folder, expected, rtol=1e-3, atol=2e-4):
    """Weights, statistics, optimizer and moving averages of the last checkpoints."""
    found, wanted = (np.load(f / "checkpoints/ckpt-00000004.npz") for f in (folder, expected))
    assert set(found) == set(wanted)
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], rtol=rtol, atol=atol, err_msg=key)


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def student(request, data, masks, tmp_path_factory):
    """The config of a student, and its run on one device."""
    folder = tmp_path_factory.mktemp(request.param)
    resolve_it = resolve if request.param == "detection" else resolve_masks
    config = resolve_it(data, SHARED)
    runner.train(config_lib.teacher_config(config), folder / "teacher", evaluate_after=False)
    runner.pseudo_label(config, folder / "labels", folder / "teacher")
    config = config_lib.student_config(config, f"{folder}/labels/pseudo-*.tfrecord", None)
    metrics = runner.train(config, folder / "one")
    return config, folder, metrics


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_change_nothing(student, devices):
    """Losses, moving averages, weights, batch statistics and metrics of student and teacher."""
    config, folder, metrics = student
    runtime = {"runtime": {"strategy": "mirrored", "devices": devices}}
    found = runner.train(config.override(runtime), folder / f"{devices}")
    assert_same_losses(folder / f"{devices}", folder / "one")
    assert_same_weights(folder / f"{devices}", folder / "one")
    assert found == pytest.approx(metrics, abs=1e-3)
    alone = config_lib.teacher_config(config).override(runtime)
    runner.train(alone, folder / f"teacher{devices}", evaluate_after=False)
    assert_same_losses(folder / f"teacher{devices}", folder / "teacher", ("loss", "gradient_norm"))


def test_labels_of_several_devices_equal_those_of_one(student):
    config, folder, _ = student
    config = config.override({"runtime": {"strategy": "mirrored", "devices": 2}})
    written, report = runner.pseudo_label(config, folder / "labels2", folder / "teacher")
    assert report == json.loads((folder / "labels/report.json").read_text())
    expected = list(records.read(teacher.outputs(written, folder / "labels")))
    for found, record in zip(records.read(written), expected, strict=True):
        assert found.image_id == record.image_id
        np.testing.assert_allclose(found.boxes, record.boxes, atol=1e-5)
        assert found.mask == record.mask


# --- Two processes ---------------------------------------------------------------------------


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_workers(data, folder, *overrides, command="train"):
    """Two processes of one training or run, on the loopback address."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        with open(folder.parent / f"worker{index}.log", "a", encoding="utf-8") as log:
            processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", f"official_selftrain.{command}"),
                        f"--experiment={data}/recipe.py:mini",
                        f"--data_dir={data}",
                        f"--model_dir={folder}",
                        "--strategy=multi_worker_mirrored",
                        *(f"--params_override={text}" for text in overrides),
                    ],
                    cwd=ROOT,
                    env=os.environ | {"TF_CONFIG": json.dumps(task)},
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def finish(processes, seconds=240):
    """Exit statuses; none is left behind."""
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()

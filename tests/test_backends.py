"""The same losses on TensorFlow and on JAX, and on one and two devices of JAX."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import mask_png, png, record

from official_selftrain.data import augment, numpy_feed

HERE = pathlib.Path(__file__).parent
KINDS = ["detection", "segmentation"]


def losses(backend, kind, steps, devices=1):
    """Scalars of each step of `backend_steps.py`, by name."""
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": str(HERE.parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    result = subprocess.run(
        [sys.executable, "backend_steps.py", kind, str(steps), str(devices)],
        cwd=HERE, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(result.stdout.splitlines()[-1])
    assert len(rows) == steps
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def on_jax(kind):
    return losses("jax", kind, 20)


def test_twenty_steps_are_equal_on_both_backends(kind, on_jax):
    expected = losses("tensorflow", kind, 20)
    assert expected.keys() == on_jax.keys()
    assert len({"human_loss", "pseudo_loss", "ratio", "gradient_norm"} & expected.keys()) == 4
    for name in ("loss", "human_loss", "pseudo_loss", "ratio"):
        np.testing.assert_allclose(on_jax[name], expected[name], rtol=1e-4, err_msg=name)
    assert on_jax["gradient_norm"].max() > 5  # clipping is part of what is compared


def test_two_devices_of_jax_equal_one(kind, on_jax):
    found = losses("jax", kind, 3, devices=2)
    for name, values in found.items():
        np.testing.assert_allclose(values, on_jax[name][:3], rtol=1e-4, err_msg=name)


WITHOUT = """
import runpy, sys
sys.modules["tensorflow"] = None  # importing it fails
runpy.run_path("without_tensorflow.py", run_name="__main__")
"""


def test_teacher_and_student_train_without_tensorflow(data):
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", WITHOUT, str(data)]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["boxes"] == 25  # five of each image, whatever the score
    for name in ("teacher", "student"):
        first, last = (row["human_loss"] for row in result[name])
        assert last < first
    assert result["student"][-1]["pseudo_objects"] > 0 and result["student"][-1]["ratio"] > 0


def test_numpy_feed_fits_images_as_the_other_one_does():
    """Boxes, masks and info to the bit; pixels where nothing is smoothed."""
    one = record(encoded=png(40, 60), mask=mask_png(40, 60), height=40, width=60)
    info = augment.plan_resize([40, 60], (128, 128), 1.5, (0.25, 0.75))
    scene = {"image": np.full((40, 60, 3), 7, "uint8"), "boxes": one.boxes}
    scene["mask"] = np.full((40, 60), 3, "uint8")
    expected = augment.fit(scene, info)
    found = numpy_feed.fit(one, (128, 128), 1.5, (0.25, 0.75))
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4, err_msg=key)


def test_numpy_feed_mirrors_drops_and_ignores():
    boxes = [[0.0, 0.0, 0.5, 0.25], [0.5, 0.5, 1.0, 1.0]]
    values = {"boxes": boxes, "classes": [1, 2], "scores": np.array([0.9, 0.2], "float32")}
    pseudo = record(
        encoded=png(64, 64), height=64, width=64, mask=mask_png(64, 64),
        confidence=mask_png(64, 64, 100), origin="pseudo", is_crowd=None, **values
    )  # fmt: skip
    mirrored = numpy_feed.fit(pseudo, (128, 128), mirrored=True, threshold=0.5)
    np.testing.assert_allclose(mirrored["boxes"][0], [0, 96, 64, 127])
    assert (mirrored["mask"] == 255).all()
    stream = numpy_feed.training_batches(
        {"human": ([pseudo], 2)}, (128, 128), room=3, threshold=0.5
    )
    images, labels = next(stream)
    assert images["human"].shape == (2, 128, 128, 3)
    assert labels["human"]["classes"].tolist() == [[1, -1, -1]] * 2

"""The same losses on TensorFlow and on JAX, and on one and two devices of JAX."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

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

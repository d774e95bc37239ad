"""Shared fixtures: golden numbers of the released implementation, data, and memory."""

import contextlib
import os
import pathlib
import resource

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import mini
import numpy as np
import pytest

from official_selftrain.engine import memory as memory_lib

try:
    import tensorflow as tf

    # Four logical devices, so that distribution is tested on every machine.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )
except ModuleNotFoundError:
    pass

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


GROWTH = 2**28  # bytes by which a process may grow before it looks for garbage
LIMIT = 4 * 2**30  # bytes that no process of the tests may reach, lest they bring a machine down
resident_before = 0


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Gradients that TensorFlow knew before the module; those after would keep their graphs."""
    before = memory_lib.registered()
    yield before
    memory_lib.forget(before)


@pytest.fixture(autouse=True)
def memory(registered):
    """Frees models and compiled functions of earlier tests, which hold themselves in cycles.

    Fails the test in which this process, or one that it has started, passes the limit.
    """
    global resident_before
    before = _peak()
    yield
    if _resident() > resident_before + GROWTH:
        memory_lib.forget(registered)
        memory_lib.give_back()
        resident_before = _resident()
    assert before > LIMIT or _peak() < LIMIT, f"{_peak() / 2**30:.1f} GB of memory in one process"


def _peak():
    """The most bytes that this process, or one that it has waited for, ever had in memory."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return 1024 * max(resource.getrusage(process).ru_maxrss for process in who)


def _resident():
    """Bytes of this process in memory, 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.fixture(scope="session")
def golden():
    """Folder of golden numbers; tests that need it are skipped in a checkout without it."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the golden numbers are not beside this checkout")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def shared_data():
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data sets are not beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the recipe of boxes: see `mini`."""
    folder = tmp_path_factory.mktemp("data")
    mini.write_boxes(folder)
    return folder


@pytest.fixture(scope="module")
def masks(data):
    """The folder of `data` with masks, too."""
    mini.write_masks(data)
    return data


def load(path):
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays}


def concatenate_levels(arrays, prefix, depth):
    """Golden per-level `[..., H, W, A * depth]` arrays to `[..., R, depth]`."""
    levels = [arrays[f"{prefix}_{level}"] for level in range(3, 8)]
    flat = [x.reshape(*x.shape[:-3], -1, depth) for x in levels]
    return np.concatenate(flat, axis=-2)

"""Shared fixtures: golden numbers of the released implementation, data, and memory."""

import contextlib
import gc
import os
import pathlib
import re
import resource

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import mini
import numpy as np
import pytest
from golden import thin

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
NOT_BESIDE = "are not beside this checkout"


GROWTH = 2**28  # bytes by which a process may grow before it looks for garbage
LIMIT = 4 * 2**30  # bytes that no process of the tests may reach, lest they bring a machine down
resident_before = 0


def pytest_collection_finish():
    """Makes garbage collections rare and cheap; they are a twelfth of the time of the tests.

    The modules of TensorFlow and Keras are a million objects that live as long as the process, so
    looking through them again and again finds nothing. `memory` collects what the tests leave.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


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


class Golden:
    """`golden / name` is a golden file: of the larger set where that is present, else thinned.

    A test is skipped only for a file that the thinned set leaves out.
    """

    folder = SHARED / "golden" if (SHARED / "golden").is_dir() else ROOT / "tests/golden"

    def __truediv__(self, name):
        path = self.folder / name
        if self.folder == SHARED / "golden":
            assert path.exists(), f"{path} does not exist"
        elif not path.exists():
            pytest.skip(f"the golden numbers {name} {NOT_BESIDE}")
        return path


@pytest.fixture(scope="session")
def golden():
    return Golden()


def pytest_terminal_summary(terminalreporter):
    """Says how many parity tests were skipped, which `-q` would keep to itself."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    files = [re.search(f"the golden numbers (.+) {NOT_BESIDE}", reason) for reason in reasons]
    names = [found[1] for found in files if found]
    if names:
        missing = ", ".join(sorted(set(names)))
        terminalreporter.write_line(
            f"{len(names)} parity tests were skipped: the golden numbers {missing} {NOT_BESIDE}"
        )


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
    """The arrays of a golden file; numbers that a thinned one does not keep are masked."""
    with np.load(path) as arrays:
        return thin.fill({key: arrays[key] for key in arrays})


def concatenate_levels(arrays, prefix, depth):
    """Golden per-level `[..., H, W, A * depth]` arrays to `[..., R, depth]`."""
    levels = [arrays[f"{prefix}_{level}"] for level in range(3, 8)]
    flat = [x.reshape(*x.shape[:-3], -1, depth) for x in levels]
    thinned = any(isinstance(level, np.ma.MaskedArray) for level in flat)
    return (np.ma if thinned else np).concatenate(flat, axis=-2)

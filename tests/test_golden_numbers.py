"""The golden numbers that travel with the repository are those of the larger set."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, SHARED, load
from golden import thin

THINNED = ROOT / "tests/golden"
CODE = ("README.md", "thin.py")
FILES = [path for path in THINNED.rglob("*.*") if path.name not in CODE and path.suffix != ".pyc"]


def test_they_take_little_space():
    assert sum(path.stat().st_size for path in FILES) < 5e6


def test_a_number_that_was_not_kept_proves_nothing():
    arrays = {
        "x": np.array([0.0, 3.0, 6.0]),
        "thinned": '{"x": {"shape": [2, 4], "stride": 3}}',
    }
    filled = thin.fill(arrays)["x"]
    np.testing.assert_array_equal(filled, np.arange(8.0).reshape(2, 4))
    for place, equal in ((3, False), (4, True)):
        other = np.arange(8.0).reshape(2, 4)
        other.flat[place] = 9
        assert bool((other == filled).all()) is equal
    assert not np.abs(np.ma.masked_all(3) - 1).max() <= 1


@pytest.mark.parametrize(("size", "kept", "step"), [(801, 400, 5), (35, 20, 2), (512, 20, 29)])
def test_the_sample_meets_every_channel(size, kept, step):
    assert thin.stride(size, kept) == step


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the larger set is not here")
def test_they_equal_the_larger_set_to_the_bit():
    assert FILES
    for path in FILES:
        whole = SHARED / "golden" / path.relative_to(THINNED)
        if path.suffix == ".npz":
            expected = load(whole)
            found = load(path)
            assert found and set(found) <= set(expected), path
            for key, value in found.items():
                assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype)
                assert np.ma.count(value) >= min(5, value.size), (path, key)
                assert np.ma.array(value == expected[key]).filled(True).all(), (path, key)
        elif path.parent.name == "variables" and path.suffix == ".txt":
            lines = whole.read_text().splitlines()
            assert path.read_text().splitlines() == [x for x in lines if "/Momentum\t" not in x]
        elif "ckpt" not in path.name or "spinenet" in path.parent.name:
            assert path.read_bytes() == whole.read_bytes(), path


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the larger set is not here")
def test_the_checkpoint_equals_that_of_the_larger_set_to_the_bit():
    ours, whole = (
        tf.train.load_checkpoint(str(folder / thin.CHECKPOINT))
        for folder in (THINNED, SHARED / "golden")
    )
    names = ours.get_variable_to_shape_map()
    left_out = set(whole.get_variable_to_shape_map()) - set(names)
    assert all("/head/" in name or name.endswith("/Momentum") for name in left_out)
    for name in names:
        np.testing.assert_array_equal(ours.get_tensor(name), whole.get_tensor(name))

"""Small images and records for tests."""

import contextlib
import io
import re

import numpy as np
from PIL import Image

from official_selftrain.config import RuntimeConfig, SourceConfig
from official_selftrain.data import records
from official_selftrain.data.sources import readers
from official_selftrain.data.sources.record_errors import RecordErrors
from official_selftrain.engine import distribution
from official_selftrain.utils.errors import UserError


def two_replicas():
    """The one mirrored strategy of the process: two would mix up their collective operations."""
    return distribution.make_distribution(RuntimeConfig(strategy="mirrored", devices=2))


def loss_of(task, outputs, labels, shared=lambda count: count):
    """The losses of a batch; `shared` makes its count that of a larger one."""
    sums, count = task.loss_sums(outputs, labels)
    return {name: value / task.normalizer(shared(count)) for name, value in sums.items()}


def read_source(folder, **settings):
    """`{name: record}` of a source, and its problems, without TFRecords between."""
    source = SourceConfig(**{"images": "images", **settings})
    reader = readers.open_reader(source, lambda p: str(folder / p))
    problems = RecordErrors(source.on_bad_record == "skip")
    found = {r.name: r for shard in reader.shards for r in reader.read(shard, problems)}
    problems.messages += reader.skipped
    for kind, (count, first) in reader.left_out.items():
        problems.left_out.setdefault(kind, [0, first])[0] += count
    problems.class_names = reader.class_names
    return found, problems


@contextlib.contextmanager
def told():
    """Allows an error that a check wrote, not one that only the last net caught."""
    try:
        yield
    except UserError as error:
        assert not re.search(r"cannot be read: [A-Za-z]+: ", str(error)), error


def update_error(before, expected, found):
    """How far a state is from the expected one, in units of how far that one has moved.

    Args:
        before, expected, found: checkpoints, `{"group/index": array}`. Numbers that are no floats
            (steps made, random seeds) must be equal; means over a loop of steps do not matter.

    Returns:
        `{group: error}`, over all arrays of a group together, since rounding decides about single
        gradients where an activation is next to 0.
    """
    keys = {key for key in expected if not key.startswith("trackers/")}
    assert keys == {key for key in found if not key.startswith("trackers/")}
    moved, wrong = {}, {}
    for key in sorted(keys):
        values = expected[key]
        if not np.issubdtype(values.dtype, np.floating):
            np.testing.assert_array_equal(found[key], values, err_msg=key)
            continue
        group = key.split("/")[0]
        for sums, other in ((moved, before[key]), (wrong, found[key])):
            distance = np.square(values.astype("float64") - other).sum()
            sums[group] = sums.get(group, 0) + float(distance)
    return {group: (wrong[group] / max(moved[group], 1e-30)) ** 0.5 for group in moved}


def assert_same_training(folder, expected, start, step, bound=0.02):
    """From `start` to `step`, a training in `folder` has done what that in `expected` did.

    Weights, statistics, momentum and moving averages of the checkpoints.
    """
    name = "checkpoints/ckpt-{:08d}.npz".format
    before, wanted, found = (
        dict(np.load(file))
        for file in (expected / name(start), expected / name(step), folder / name(step))
    )
    errors = update_error(before, wanted, found)
    assert {"student", "averages", "optimizer"} <= errors.keys()
    assert max(errors.values()) < bound, errors


def png(height=4, width=6, value=7):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(height=4, width=6, value=3):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), value, "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def mask_of(record):
    """The classes `[H, W]` of a record's mask; a single 0 where it has none."""
    return np.asarray(Image.open(io.BytesIO(record.mask))) if record.mask else np.zeros((1, 1))


def record(**changes):
    values = {
        "image_id": 5,
        "encoded": png(),
        "height": 4,
        "width": 6,
        "name": "a.png",
        "boxes": [[0.0, 0.5, 0.5, 1.0], [0.25, 0.0, 1.0, 0.5]],
        "classes": [1, 2],
        "scores": np.array([0.9, 0.4], "float32"),
        "is_crowd": np.array([False, True]),
        "mask": mask_png(),
        "label": 9,
        "origin": "pseudo",
        "dataset": "d",
        "teacher": "t",
    }
    return records.ImageRecord(**{**values, **changes})

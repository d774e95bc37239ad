"""Small images and records for tests."""

import contextlib
import io
import re

import numpy as np
from PIL import Image

from official_selftrain import distribution
from official_selftrain.config import RuntimeConfig, SourceConfig
from official_selftrain.data import records
from official_selftrain.data.sources import readers
from official_selftrain.data.sources.problems import Problems
from official_selftrain.errors import UserError


def two_replicas():
    """The one mirrored strategy of the process: two would mix up their collective operations."""
    return distribution.make(RuntimeConfig(strategy="mirrored", devices=2))


def loss_of(task, outputs, labels, shared=lambda count: count):
    """The losses of a batch; `shared` makes its count that of a larger one."""
    sums, count = task.loss_sums(outputs, labels)
    return {name: value / task.normalizer(shared(count)) for name, value in sums.items()}


def read_source(folder, **settings):
    """`{name: record}` of a source, and its problems, without TFRecords between."""
    source = SourceConfig(**{"images": "images", **settings})
    reader = readers.open_reader(source, lambda p: str(folder / p))
    problems = Problems(source.on_bad_record == "skip")
    found = {r.name: r for unit in reader.units for r in reader.read(unit, problems)}
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


def png(height=4, width=6, value=7):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(height=4, width=6, value=3):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width), value, "uint8")).save(buffer, "PNG")
    return buffer.getvalue()


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

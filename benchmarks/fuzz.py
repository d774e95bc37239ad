"""Tests readers on files with random faults: each must be read or refused with one line.

    python benchmarks/fuzz.py [coco|voc|yolo|tfrecord|image|config ...] --minutes=10

Each example takes a valid file, puts arbitrary values or bytes into it, and reads it as
`prepare_data` would, once stopping at faults and once skipping them. Examples that raise
anything but a `UserError` are shrunk by Hypothesis and printed, and the exit status is 1.
"""

import argparse
import collections
import copy
import io
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import time
import traceback

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from official_selftrain import config as config_lib
from official_selftrain.data import records, sources
from official_selftrain.utils.errors import UserError

SIZE = (100, 128)
OUTCOMES = collections.Counter()
NUMBERS = st.one_of(
    st.integers(), st.integers(-3, 300), st.floats(), st.sampled_from([0, -0.0, 1e308, 10**30])
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["a.png", "1", "", "../a.png", "\0", "NaN"]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 128, "height": 100},
        {"id": 2, "file_name": "b.png", "width": 128, "height": 100},
    ],
    "annotations": [
        {
            "id": i,
            "image_id": 1,
            "category_id": i,
            "bbox": [9, 9, 20, 20],
            "area": 400,
            "iscrowd": 0,
        }
        for i in (1, 2)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
VOC = (
    "<annotation><filename>a.png</filename><size><width>128</width><height>100</height></size>"
    "<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin>"
    "<xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"
)
YOLO = "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.5 0.5\n"
YAML = "names: [cat, dog]\nnc: 2\nkpt_shape: [3, 2]\n"


def read(folder, **fields):
    """Reads a source twice: once stopping at faults, once skipping them."""
    for rule in ("stop", "skip"):
        source = config_lib.SourceConfig(**fields, on_bad_record=rule)
        try:
            sources.prepare(source, lambda p: str(folder / p), str(folder / "o/x"), workers=1)
            OUTCOMES[f"read, {rule}"] += 1
        except UserError as error:
            assert "\n" not in str(error), f"more than one line: {error}"
            OUTCOMES[f"refused, {rule}"] += 1
        finally:
            shutil.rmtree(folder / "o", ignore_errors=True)


# --- Faults ----------------------------------------------------------------------------------


def paths(value, path=()):
    """Yields the path of every value in nested lists and dicts."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from paths(inner, (*path, key))


@st.composite
def spoiled_json(draw, good):
    """`good` with arbitrary values in one to three places, or a key missing."""
    content = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(paths(content))))
        if not path:
            return draw(VALUES)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        if isinstance(inner, dict) and draw(st.integers(0, 4)) == 0:
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw(VALUES)
    return content


@st.composite
def spoiled_bytes(draw, good):
    """`good` with bytes changed, cut, inserted or repeated."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "drop", "repeat"]))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=12))
        elif kind == "drop":
            del data[place : place + draw(st.integers(1, 40))]
        else:
            data[place:place] = data[place : place + 40]
    return bytes(data)


def words(good, separator=" "):
    """Text with arbitrary words in place of some."""

    @st.composite
    def spoiled(draw):
        parts = good.split(separator)
        for _ in range(draw(st.integers(1, 3))):
            parts[draw(st.integers(0, len(parts) - 1))] = str(draw(LEAVES))
        return separator.join(parts).encode("utf-8", "surrogatepass")

    return st.one_of(spoiled(), spoiled_bytes(good.encode()))


# --- Readers ---------------------------------------------------------------------------------


def coco(folder):
    def check(content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "t.json").write_bytes(data)
        read(folder, images="images", annotations="t.json")

    return st.one_of(spoiled_json(COCO), spoiled_bytes(json.dumps(COCO).encode())), check


def voc(folder):
    (folder / "labels").mkdir()
    (folder / "labels/b.xml").write_text("<annotation/>")
    (folder / "c.txt").write_text("cat\n")

    def check(data):
        (folder / "labels/a.xml").write_bytes(data)
        read(folder, images="images", annotations="labels", class_list="c.txt")

    return st.one_of(words(VOC, ">"), words(VOC, "<")), check


def yolo(folder):
    (folder / "labels").mkdir()

    def check(pair):
        (folder / "labels/a.txt").write_bytes(pair[0])
        (folder / "data.yaml").write_bytes(pair[1])
        read(folder, images="images", annotations="labels", class_list="data.yaml")

    good = st.just(YAML.replace("kpt_shape: [3, 2]\n", "").encode())
    return st.tuples(words(YOLO), st.one_of(good, words(YAML))), check


def tfrecord(folder):
    import tensorflow as tf

    encoded = (folder / "images/a.png").read_bytes()
    boxes, size = [[0.1, 0.1, 0.5, 0.5]], SIZE
    good = [
        records.to_example(records.ImageRecord(i, encoded, *size, f"{i}.png", boxes, [1]))
        for i in range(3)
    ]
    records_file = folder / "r.tfrecord"
    with tf.io.TFRecordWriter(str(records_file)) as writer:
        for data in good:
            writer.write(data)
    whole = records_file.read_bytes()
    keys = sorted(tf.train.Example.FromString(good[0]).features.feature)

    @st.composite
    def feature(draw):
        """A good file whose second record has arbitrary values in some features."""
        example = tf.train.Example.FromString(good[1])
        for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
            value = example.features.feature[key]
            value.Clear()
            kind = draw(st.integers(0, 3))
            if kind == 0:
                value.bytes_list.value.extend(draw(st.lists(st.binary(max_size=9), max_size=3)))
            elif kind == 1:
                numbers = st.integers(-(2**63), 2**63 - 1)
                value.int64_list.value.extend(draw(st.lists(numbers, max_size=3)))
            elif kind == 2:
                value.float_list.value.extend(draw(st.lists(st.floats(width=32), max_size=3)))
        return [good[0], example.SerializeToString(), good[2]]

    def check(data):
        if isinstance(data, list):
            with tf.io.TFRecordWriter(str(records_file)) as writer:
                for record in data:
                    writer.write(record)
        else:
            records_file.write_bytes(data)
        read(folder, records="r.tfrecord")

    return st.one_of(feature(), spoiled_bytes(whole)), check


def image(folder):
    """Reads damaged images and masks of several formats."""
    pixels = np.random.default_rng(0).integers(0, 3, (*SIZE, 3), "uint8")
    files = []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        more = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        Image.fromarray(pixels).convert("L" if kind == "GIF" else "RGB").save(buffer, kind, **more)
        files.append(buffer.getvalue())
    (folder / "masks").mkdir()
    for name in "ab":
        Image.fromarray(pixels[..., 0]).save(folder / f"masks/{name}.png")

    def check(data):
        (folder / "images/a.png").write_bytes(data)
        read(folder, images="images")
        read(folder, images="images", masks="masks")
        (folder / "masks/a.png").write_bytes(data)
        read(folder, images="images", masks="masks")

    return st.sampled_from(files).flatmap(spoiled_bytes), check


def config(folder):
    """Resolves damaged YAML on top of an experiment."""
    good = config_lib.dump(config_lib.resolve("demo"))

    def check(data):
        (folder / "c.yaml").write_bytes(data)
        try:
            config_lib.resolve("demo", str(folder / "c.yaml"))
            OUTCOMES["accepted"] += 1
        except UserError:
            OUTCOMES["refused"] += 1

    nested = spoiled_json(config_lib.resolve("demo").model_dump(mode="json"))
    as_yaml = nested.map(lambda content: json.dumps(content).encode("utf-8", "surrogatepass"))
    return st.one_of(as_yaml, spoiled_bytes(good.encode()), words(good)), check


READERS = {f.__name__: f for f in (coco, voc, yolo, tfrecord, image, config)}


def fuzz(name, minutes, seed):
    """Tests one reader; returns the number of examples."""
    count = 0
    # In memory, because syncing files to a disk would take most of the time.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        folder = pathlib.Path(scratch)
        (folder / "images").mkdir()
        for letter in "ab":
            pixels = np.random.default_rng(ord(letter)).integers(0, 255, (*SIZE, 3), "uint8")
            Image.fromarray(pixels).save(folder / f"images/{letter}.png")
        examples, check = READERS[name](folder)

        def try_one(example):
            nonlocal count
            count += 1
            check(example)

        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            settings = hypothesis.settings(
                max_examples=100,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            hypothesis.seed(seed)(settings(hypothesis.given(examples)(try_one)))()
            seed += 1
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", default=list(READERS), choices=[*READERS, []])
    parser.add_argument("--minutes", type=float, default=10, help="minutes per reader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  progress bars
    failed = False
    for name in options.readers:
        OUTCOMES.clear()
        try:
            count = fuzz(name, options.minutes, options.seed)
        except Exception:
            print(f"{name}: {traceback.format_exc()}", flush=True)
            failed = True
            continue
        print(f"{name}: {count} files, {dict(sorted(OUTCOMES.items()))}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Writes sources as TFRecord shards: in parallel, resumable, checksummed.

A shard is the unit of work. Each is written under a temporary name and renamed, then its tally is
written beside it; a shard with a tally is done. When all are done the tallies become the summary
`NAME.json` and the index `NAME.index.tsv`, a line an image: name, id, digest of the image file, and
the class ids in it.
"""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import io
import json
import logging
import os
import pathlib
import threading
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from official_selftrain import files
from official_selftrain.data import records
from official_selftrain.data.sources import readers, stores
from official_selftrain.data.sources.problems import Problems
from official_selftrain.errors import UserError

# What of a source changes the records made of it.
SOURCE_FIELDS = {
    "records", "images", "annotations", "masks", "image_list", "exclude_lists", "class_list",
    "label_by_folder", "tfds", "split", "embedded", "on_bad_record",
}  # fmt: skip


def prepare(source, path, name, at_least=1, workers=None, beam_args=None):
    """Writes a source as TFRecord shards, once; a finished folder is used again.

    TFRecords are used where they are, and only counted, unless bad records are to be skipped.

    Args:
        source: a `config.SourceConfig`.
        path: function from a relative path of `source` to a real one.
        name: prefix of the files, `FOLDER/NAME`.
        at_least: images that must be found.
        workers: shards written at a time; None takes one a core.
        beam_args: arguments of an Apache Beam pipeline that writes the shards; None uses threads.
            All workers must see the sources and the output under the same paths.

    Returns:
        The summary: `files`, `sha256` and `bytes` of each, `images`, `boxes`, `masks`, `empty`
        (images without boxes or mask), `classes` (names by id, where known), `largest_class`,
        `images_per_class` (by boxes, mask or label), `skipped` (messages).

    Raises:
        UserError: for anything wrong with the source.
    """
    reader = readers.open_reader(source, path)
    key = _fingerprint(source, reader)
    summary = _finished(name, key)
    if summary is not None:
        return summary
    try:
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}") from None
    in_place = bool(source.records) and source.on_bad_record == "stop"
    jobs = [
        _Job(_shard(name, index, len(reader.units)), unit, reader.read, key,
             source.on_bad_record == "skip", in_place)
        for index, unit in enumerate(reader.units)
    ]  # fmt: skip
    if not in_place and {os.path.abspath(job.file) for job in jobs} & _absolute(reader.units):
        raise UserError(f"writing {name} would overwrite the records it reads; choose another name")
    if beam_args is None:
        tallies = _in_threads(jobs, reader.images, workers or os.cpu_count(), name)
    else:
        from official_selftrain.data import beam

        tallies = beam.run(jobs, beam_args)
    summary = _summary(tallies, reader.class_names, key)
    if summary["images"] < at_least:
        place = source.images or source.records or source.tfds
        skipped = summary["skipped"]
        why = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(
            f"no usable image in {path(place)!r}{why} (looking for {', '.join(stores.SUFFIXES)})"
        )
    if summary["skipped"]:
        logging.warning("%d records of %s were skipped", len(summary["skipped"]), name)
    _write_index(name, tallies)
    files.write_text(f"{name}.json", json.dumps(summary, indent=1))
    _clean_up(name, summary)
    return summary


def _absolute(units):
    return {os.path.abspath(unit) for unit in units if isinstance(unit, str)}


def _shard(name, index, count):
    return f"{name}-{index:05d}-of-{count:05d}.tfrecord"


def _fingerprint(source, reader):
    """Changes when the source's settings or any of its files change."""
    settings = source.model_dump_json(include=SOURCE_FIELDS)
    return hashlib.sha256("\n".join([settings, *reader.stamps]).encode()).hexdigest()


def _finished(name, key):
    """The summary of finished work for the same source, or None."""
    try:
        summary = json.loads(pathlib.Path(f"{name}.json").read_text(encoding="utf-8"))
        if summary["source"] != key:
            return None
        sizes = [os.path.getsize(file) for file in summary["files"]]
    except (OSError, ValueError, KeyError):
        return None
    complete = sizes == summary["bytes"] and os.path.exists(_index_file(name))
    return summary if complete else None


def _clean_up(name, summary):
    """Removes the tallies, and shards of an earlier, different source: a glob would read them."""
    folder, prefix = os.path.split(os.path.abspath(name))
    kept = {os.path.abspath(file) for file in summary["files"]}
    for file in pathlib.Path(folder).glob(f"{glob.escape(prefix)}-[0-9]*-of-[0-9]*.tfrecord*"):
        if str(file) not in kept:
            file.unlink()


# --- One shard -------------------------------------------------------------------------------


@dataclasses.dataclass
class _Job:
    """The work of one shard; picklable, so that it can go to another process or machine."""

    file: str
    unit: Any
    read: Any
    key: str
    skip: bool
    in_place: bool  # count the TFRecord file `unit` instead of writing one

    @property
    def tally_file(self):
        return f"{self.file}.json"

    def finished(self):
        """The tally of an earlier run, or None."""
        try:
            tally = json.loads(pathlib.Path(self.tally_file).read_text(encoding="utf-8"))
            same = tally["source"] == self.key and os.path.getsize(tally["file"]) == tally["bytes"]
        except (OSError, ValueError, KeyError):
            return None
        return tally if same else None

    def run(self, on_record=lambda: None):
        """Writes the shard and its tally; returns the tally."""
        tally, problems = _Tally(), Problems(self.skip)

        def watched(stream):
            for record in stream:
                tally.add(record)
                on_record()
                yield record

        if self.in_place:
            file = self.unit
            collections.deque(watched(records.read([file])), maxlen=0)
        else:
            file = self.file
            records.write(file, watched(self.read(self.unit, problems)))
        result = {
            "source": self.key,
            "file": file,
            "bytes": os.path.getsize(file),
            "sha256": files.sha256(file),
            "skipped": problems.messages,
            **tally.result(),
        }
        files.write_text(self.tally_file, json.dumps(result))
        return result


class _Tally:
    def __init__(self):
        self.counts = collections.Counter()
        self.images_per_class = collections.Counter()
        self.index = []

    def add(self, record):
        present = _mask_classes(record)
        self.counts["images"] += 1
        self.counts["boxes"] += len(record.boxes)
        self.counts["masks"] += bool(record.mask)
        self.counts["empty"] += not len(record.boxes) and not record.mask
        labels = [*record.classes.tolist(), *present, *([record.label] * (record.label >= 0))]
        self.images_per_class.update(set(labels))
        digest = hashlib.blake2b(record.encoded, digest_size=8).hexdigest()
        name = " ".join(record.name.split())
        self.index.append((name, record.image_id, digest, sorted(set(labels))))

    def result(self):
        counts = {key: self.counts[key] for key in ("images", "boxes", "masks", "empty")}
        return counts | {"images_per_class": dict(self.images_per_class), "index": self.index}


def _mask_classes(record):
    """Class ids in the mask of a record, without the ignored 255; [] without a mask."""
    if not record.mask:
        return []
    values = np.bincount(np.asarray(Image.open(io.BytesIO(record.mask))).ravel(), minlength=256)
    return np.flatnonzero(values[:255]).tolist()


def _in_threads(jobs, images, workers, name):
    """Tallies of all jobs; decoding images leaves Python's lock, so threads suffice."""
    lock = threading.Lock()
    tallies = {job.file: job.finished() for job in jobs}
    done = sum(tally["images"] + len(tally["skipped"]) for tally in tallies.values() if tally)
    with tqdm(
        total=images, initial=done, desc=f"reading {pathlib.Path(name).name}", unit="image"
    ) as progress:

        def count():
            with lock:
                progress.update(1)

        pool = concurrent.futures.ThreadPoolExecutor(workers)
        try:
            waiting = {
                pool.submit(job.run, count): job for job in jobs if tallies[job.file] is None
            }
            for future in concurrent.futures.as_completed(waiting):
                tallies[waiting[future].file] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return [tallies[job.file] for job in jobs]


# --- The whole -------------------------------------------------------------------------------


def _summary(tallies, class_names, key):
    classes = collections.Counter()
    for tally in tallies:
        classes.update({int(k): count for k, count in tally["images_per_class"].items()})
    return {
        "source": key,
        **{k: sum(t[k] for t in tallies) for k in ("images", "boxes", "masks", "empty")},
        "classes": class_names,
        "images_per_class": dict(sorted(classes.items())),
        "largest_class": max(classes, default=0),
        "skipped": [message for tally in tallies for message in tally["skipped"]],
        "files": [tally["file"] for tally in tallies],
        "bytes": [tally["bytes"] for tally in tallies],
        "sha256": [tally["sha256"] for tally in tallies],
    }


def _index_file(name):
    return f"{name}.index.tsv"


def _write_index(name, tallies):
    lines = [
        f"{image}\t{image_id}\t{digest}\t{','.join(map(str, classes))}\n"
        for tally in tallies
        for image, image_id, digest, classes in tally["index"]
    ]
    files.write_text(_index_file(name), "".join(lines))


def read_index(name):
    """Yields (image name, id, digest, class ids) of every image of a prepared source."""
    for line in files.read_text(_index_file(name), "index").splitlines():
        image, image_id, digest, classes = line.split("\t")
        yield image, int(image_id), digest, [int(c) for c in classes.split(",") if c]


def shared_images(first, second):
    """Names, as in the second, of the image files that two prepared sources share.

    Files are compared byte for byte: an image that was scaled or encoded again is another one.
    """
    digests = {digest for _, _, digest, _ in read_index(first)}
    return [name for name, _, digest, _ in read_index(second) if digest in digests]


def check_disjoint(first, second, why):
    """Refuses two prepared sources that share an image file.

    Args:
        first, second: prefixes as given to `prepare`.
        why: they must not, for the message.

    Raises:
        UserError: naming how many images they share, and the first.
    """
    shared = shared_images(first, second)
    if shared:
        raise UserError(
            f"{len(shared)} images are both in {pathlib.Path(first).name!r} and in "
            f"{pathlib.Path(second).name!r}, the first {shared[0]!r}: {why}"
        )


def verify(name):
    """Compares the files of a prepared source with their checksums; returns their number.

    Raises:
        UserError: naming the file that changed or is missing.
    """
    summary = json.loads(files.read_text(f"{name}.json", "summary"))
    for file, expected in zip(summary["files"], summary["sha256"], strict=True):
        try:
            found = files.sha256(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        if found != expected:
            raise UserError(f"{file} has changed since it was written; prepare the source again")
    return len(summary["files"])

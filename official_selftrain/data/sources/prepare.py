"""Writes sources as TFRecord shards: in parallel, resumable, checksummed.

A shard is the unit of work. Each is written under a temporary name and renamed; then its tally is
written beside it: counts, index, and the SHA-256 that proves that the shard is complete. The
tallies are combined into the summary `NAME.json` and the index `NAME.index.tsv`, which has a line
per image with name, id, digest of the image file and class ids. Both are written again if they are
missing or damaged.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from tqdm import tqdm

from official_selftrain.config import SourceConfig
from official_selftrain.data import records
from official_selftrain.data.sources import lists, readers, stores
from official_selftrain.data.sources.record_errors import RecordErrors, merged, tell
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

FORMAT = 3  # of the tallies; sources with tallies of another format are read again
COUNTS = ("images", "boxes", "masks", "empty")
BY_NUMBER = ("classes", "images_per_class", "boxes_per_image")  # keys, which JSON makes texts
Tally: TypeAlias = dict[str, Any]  # what is known about one shard
Summary: TypeAlias = dict[str, Any]  # what is known about a prepared source, see `prepare`


def prepare(
    source: SourceConfig,
    path: Callable[[str], str],
    name: StrPath,
    workers: int | None = None,
    beam_args: Sequence[str] | None = None,
) -> Summary:
    """Writes a source as TFRecord shards, unless an earlier call did; only missing shards are made.

    TFRecords are used where they are, and only counted, unless they are compressed or bad records
    are to be skipped.

    Args:
        source: source that says where its images are.
        path: function from a relative path of `source` to a real one.
        name: prefix of the files, `FOLDER/NAME`.
        workers: number of shards written at the same time; None is one per core.
        beam_args: arguments of an Apache Beam pipeline that writes the shards; None uses threads.
            All workers must see the sources and the output under the same paths.

    Returns:
        The summary, a dict:
        `files`: paths of the shards; `sha256`, `bytes`, `images_in_files`: of each file.
        `content`: SHA-256 of these SHA-256s, the identity of the data.
        `fingerprint`: tells whether the source has to be read again.
        `images`, `boxes`, `masks`: counts; `empty`: images without boxes or mask.
        `classes`: `{class id: name}` as far as known; `largest_class`: largest id in the labels.
        `images_per_class`: `{class id: images}`, by boxes, mask or label.
        `boxes_per_image`: `{boxes: images}`, crowds not counted; `most_boxes`: the largest key.
        `left_out`: `{kind: [count, first example]}`; `skipped`: messages of skipped records.
        `turned`: labeled images that are turned by EXIF though no annotated size confirms it.

    Raises:
        UserError: if anything is wrong with the source, or another process is writing it.
    """
    return _prepare(source, path, readers.open_reader(source, path), str(name), workers, beam_args)


def prepare_part(
    whole: Summary, positions: Sequence[int], name: StrPath, workers: int | None = None
) -> Summary:
    """Writes some images of a prepared source as a source of their own, unless that is done.

    Args:
        whole: summary of the prepared source.
        positions: of the images in its index, in ascending order.
        name, workers: see `prepare`.

    Returns:
        The summary, see `prepare`.

    Raises:
        UserError: if a file of the source is damaged, or another process is writing the part.
    """
    reader = readers.open_part(whole, positions)
    return _prepare(SourceConfig(), str, reader, str(name), workers, None)


def _prepare(source, path, reader, name, workers, beam_args):
    """`prepare` with an open source."""
    fingerprint = _fingerprint(source, reader)
    jobs = _jobs(source, reader, name, fingerprint)
    found = {job.file: job.finished() for job in jobs}
    with contextlib.ExitStack() as stack:
        if not all(found.values()):
            _refuse_strangers(name)
            folder, prefix = os.path.split(name)
            stack.enter_context(files.locked(folder or ".", _lock(prefix)))
            # Another process may have finished shards before it released the lock.
            found = {job.file: job.finished() for job in jobs}
            if beam_args is None:
                _in_threads(jobs, found, reader.images, workers or os.cpu_count(), name)
            else:
                from official_selftrain.data import beam

                found = dict(zip(found, beam.run(jobs, beam_args), strict=True))
        tallies = [tally for tally in found.values() if tally is not None]
        names = _class_names(source, path, reader, tallies)
        summary = _summary(jobs, tallies, reader, names, fingerprint)
        place = source.images or source.records or source.tfds
        _check(summary, tallies, path(place) if place else source.builtin)
        _write(name, summary, tallies, jobs)
    return summary


def _jobs(
    source: SourceConfig, reader: readers.Reader, name: str, fingerprint: str
) -> list["_Job"]:
    skip = source.on_bad_record == "skip"
    jobs = [
        _Job(
            file=f"{name}-{index:05d}-of-{len(reader.shards):05d}.tfrecord",
            shard=shard,
            read=reader.read,
            fingerprint=fingerprint,
            skip=skip,
            in_place=bool(source.records) and not skip and not records.compression(shard),
        )
        for index, shard in enumerate(reader.shards)
    ]
    shards = {str(file) for file in _shards(name)}
    if source.records and shards & {os.path.abspath(shard) for shard in reader.shards}:
        raise UserError(f"writing {name} would overwrite the records it reads; choose another name")
    return jobs


def _fingerprint(source: SourceConfig, reader: readers.Reader) -> str:
    """Changes when the source's settings or any of its files change."""
    # Sections of a config have more fields, such as the batch size, that no record depends on.
    # Size and time stand for the content of a file: reading all would take as long as preparing.
    settings = source.model_dump_json(include=set(SourceConfig.model_fields))
    lines = [str(FORMAT), settings, *reader.fingerprints]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _lock(prefix: str) -> str:
    return f".{prefix}.lock"


def _shards(name: str) -> Iterable[pathlib.Path]:
    """All shards, tallies and temporary files of a prefix, also those of another shard count."""
    folder, prefix = os.path.split(os.path.abspath(name))
    return pathlib.Path(folder).glob(f"{glob.escape(prefix)}-[0-9]*-of-[0-9]*.tfrecord*")


def _refuse_strangers(name: str) -> None:
    """Raises an error if shards of this prefix were written by another program, to keep them."""
    folder, prefix = os.path.split(name)
    ours = os.path.exists(os.path.join(folder, _lock(prefix))) or os.path.exists(f"{name}.json")
    stranger = None if ours else next(iter(sorted(_shards(name))), None)
    if stranger:
        raise UserError(
            f"{stranger} was not written by prepare_data, and would be overwritten; choose another "
            "name, or delete the files of this name"
        )


# --- One shard -------------------------------------------------------------------------------


@dataclasses.dataclass
class _Job:
    """The work of one shard; it can be pickled for another process or machine."""

    file: str
    shard: Any
    read: Callable[[Any, RecordErrors], Iterator[records.ImageRecord]]
    fingerprint: str
    skip: bool
    in_place: bool  # count the TFRecord file `shard` instead of writing one

    @property
    def tally_file(self) -> str:
        """Path of the tally."""
        return f"{self.file}.json"

    @property
    def result(self) -> str:
        """Path of the TFRecord file with the images."""
        return self.shard if self.in_place else self.file

    def finished(self) -> Tally | None:
        """The tally of an earlier run, or None if the shard has to be written (again).

        A shard with the size and time in the tally is trusted; otherwise its checksum decides.
        """
        tally = files.read_json_or_none(self.tally_file)
        if not isinstance(tally, dict) or tally.get("fingerprint") != self.fingerprint:
            return None
        try:
            status = os.stat(self.result)
        except OSError:
            logging.warning("%s is missing and is written again", self.result)
            return None
        if [status.st_size, status.st_mtime_ns] == [tally["bytes"], tally["mtime"]]:
            return tally
        if status.st_size != tally["bytes"] or files.sha256(self.result) != tally["sha256"]:
            logging.warning("%s is damaged and is written again", self.result)
            return None
        tally["mtime"] = status.st_mtime_ns  # a copied file; compare its checksum only once
        with contextlib.suppress(UserError):
            files.write_text(self.tally_file, json.dumps(tally))
        return tally

    def write(self, on_record: Callable[[], Any] = lambda: None) -> Tally:
        """Writes the shard and its tally; returns the tally. `on_record` is called per record."""
        tally, errors = _ShardSummary(), RecordErrors(self.skip)

        def watched(
            stream: Iterable[records.ImageRecord],
        ) -> Iterator[records.ImageRecord]:
            for record in stream:
                tally.add(record)
                on_record()
                yield record

        if self.in_place:
            collections.deque(watched(records.read(self.shard)), maxlen=0)
            if not tally.counts["images"]:
                errors.leave_out("TFRecord files without a record", self.shard)
        else:
            records.write(self.file, watched(self.read(self.shard, errors)))
        status = os.stat(self.result)
        result = {
            "fingerprint": self.fingerprint,
            "bytes": status.st_size,
            "mtime": status.st_mtime_ns,
            "sha256": files.sha256(self.result),
            "skipped": errors.messages,
            "left_out": errors.left_out,
            "turned": errors.turned,
            "first_turned": errors.first_turned,
            **tally.result(),
        }
        files.write_text(self.tally_file, json.dumps(result))
        return result


class _ShardSummary:
    """Counts and index of the records of a shard."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.images_per_class: collections.Counter[int] = collections.Counter()
        self.boxes_per_image: collections.Counter[int] = collections.Counter()
        self.names: dict[int, str] = {}
        self.index: list[tuple[str, int, str, list[int]]] = []

    def add(self, record: records.ImageRecord) -> None:
        """Counts a record."""
        values = _mask_values(record)
        present = [value for value in values if value < 255]
        self.counts["images"] += 1
        self.counts["boxes"] += len(record.boxes)
        self.counts["masks"] += bool(record.mask)
        self.counts["empty"] += not len(record.boxes) and not record.mask
        self.counts["masks_with_255"] += 255 in values
        self.boxes_per_image[int((~np.asarray(record.is_crowd)).sum())] += 1
        labels = [*record.classes.tolist(), *present, *([record.label] * (record.label >= 0))]
        self.images_per_class.update(set(labels))
        if len(record.texts) == len(record.classes):
            _add_names(self.names, zip(record.classes.tolist(), record.texts, strict=True))
        digest = hashlib.blake2b(record.encoded, digest_size=8).hexdigest()
        self.index.append((record.name, record.image_id, digest, sorted(set(labels))))

    def result(self) -> Tally:
        """The part of the tally that depends on the records."""
        return {
            **{key: self.counts[key] for key in (*COUNTS, "masks_with_255")},
            "images_per_class": dict(self.images_per_class),
            "boxes_per_image": dict(self.boxes_per_image),
            "names": self.names,
            "index": self.index,
        }


def _add_names(names: dict[int, str], pairs: Iterable[tuple[int, str]]) -> None:
    """Adds (class id, name) pairs of records; an empty name means unknown.

    Raises:
        UserError: if an id has two names.
    """
    for number, text in pairs:
        if text and names.setdefault(number, text) != text:
            raise UserError(
                f"class {number} is called {names[number]!r} in some records and {text!r} in "
                "others; records with different class lists cannot be mixed"
            )


def _mask_values(record: records.ImageRecord) -> list[int]:
    """The values in the mask of a record; [] without a mask."""
    if not record.mask:
        return []
    values = np.bincount(np.asarray(Image.open(io.BytesIO(record.mask))).ravel(), minlength=256)
    return np.flatnonzero(values).tolist()


def _in_threads(jobs, tallies, images, workers, name):
    """Adds the missing `tallies`. Threads suffice, since decoding releases Python's lock."""
    lock = threading.Lock()
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
                pool.submit(job.write, count): job for job in jobs if tallies[job.file] is None
            }
            for future in concurrent.futures.as_completed(waiting):
                tallies[waiting[future].file] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# --- The whole -------------------------------------------------------------------------------


def _class_names(
    source: SourceConfig,
    path: Callable[[str], str],
    reader: readers.Reader,
    tallies: Sequence[Tally],
) -> dict[int, str]:
    """`{class id: name}` of a source.

    Names of TFRecords are in the class list, else in the summary or `classes.json` in their folder,
    else in the records themselves.
    """
    if not source.records:
        return reader.class_names
    if source.class_list:
        first = 1 if any(tally["boxes"] for tally in tallies) else 0
        return lists.read_class_list(path(source.class_list), first)
    # Names in a file may include classes that no record has, so they come before those of records.
    names: dict[int, str] = {}
    own: dict[int, str] = {}
    for file in dict.fromkeys(map(_names_file, reader.shards)):
        content = files.read_json_or_none(file) if file else None
        if isinstance(content, dict):
            found = content.get("names", content.get("classes"))
            _add_names(names, ((int(key), text) for key, text in (found or {}).items()))
    for tally in tallies:
        _add_names(own, ((int(key), text) for key, text in tally["names"].items()))
    return names or own


def _names_file(shard):
    """The file with the names of the classes in the folder of a shard, or None."""
    folder, name = os.path.split(shard)
    prefix = re.fullmatch(r"(.+)-\d{5,}-of-\d{5,}\.tfrecord", name)
    summary = os.path.join(folder, f"{prefix[1]}.json") if prefix else ""
    classes = os.path.join(folder, "classes.json")
    return next((file for file in (summary, classes) if os.path.isfile(file)), None)


def _summary(jobs, tallies, reader, class_names, fingerprint):
    classes, boxes = collections.Counter(), collections.Counter()
    for tally in tallies:
        classes.update({int(k): count for k, count in tally["images_per_class"].items()})
        boxes.update({int(k): count for k, count in tally["boxes_per_image"].items()})
    checksums = [tally["sha256"] for tally in tallies]
    return {
        "fingerprint": fingerprint,
        "content": hashlib.sha256("".join(checksums).encode()).hexdigest(),
        **{k: sum(t[k] for t in tallies) for k in COUNTS},
        "classes": class_names,
        "images_per_class": dict(sorted(classes.items())),
        "largest_class": max(classes, default=0),
        "boxes_per_image": dict(sorted(boxes.items())),
        "most_boxes": max(boxes, default=0),
        "left_out": merged([reader.left_out, *(tally["left_out"] for tally in tallies)]),
        "skipped": [*reader.skipped, *(m for tally in tallies for m in tally["skipped"])],
        "turned": sum(tally["turned"] for tally in tallies),
        "files": [job.result for job in jobs],
        "bytes": [tally["bytes"] for tally in tallies],
        "images_in_files": [tally["images"] for tally in tallies],
        "sha256": checksums,
    }


def _check(summary: Summary, tallies: list[Tally], place: str | None) -> None:
    """Raises an error if there is nothing to learn from a source."""
    if not summary["images"]:
        skipped, left_out = summary["skipped"], summary["left_out"]
        why = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        why += "".join(f"; left out: {count} {kind}" for kind, (count, _) in left_out.items())
        raise UserError(
            f"no usable image in {place!r}{why} (looking for {', '.join(stores.SUFFIXES)})"
        )
    if summary["masks"] and not summary["largest_class"] and not summary["boxes"]:
        ignored = sum(tally["masks_with_255"] for tally in tallies)
        if ignored:
            raise UserError(
                f"the masks of {place!r} contain no class but 0, and {ignored} of "
                f"{summary['masks']} contain 255, which means ignored: nothing could be learned. "
                "If 255 is an object, write 1 instead"
            )


def _write(name, summary, tallies, jobs):
    """Writes summary and index unless they are up to date, and logs what is missing in the data."""
    folder = os.path.dirname(os.path.abspath(name))
    # Own shards are listed by name only, so that the folder can be moved.
    inside = [not job.in_place for job in jobs]
    listed = [
        os.path.basename(file) if own else os.path.abspath(file)
        for file, own in zip(summary["files"], inside, strict=True)
    ]
    lines = [
        f"{_escaped(image)}\t{image_id}\t{digest}\t{','.join(map(str, classes))}\n"
        for tally in tallies
        for image, image_id, digest, classes in tally["index"]
    ]
    wanted = {
        _index_file(name): "".join(lines),
        f"{name}.json": json.dumps(summary | {"files": listed}, indent=1),
    }
    changed = {file: text for file, text in wanted.items() if _text_of(file) != text}
    for file, text in changed.items():
        files.write_text(file, text)
    if changed:
        turned = next((t["first_turned"] for t in tallies if t["turned"]), None)
        tell(name, summary["skipped"], summary["left_out"], summary["turned"], turned)
        kept = {os.path.join(folder, os.path.basename(job.file)) for job in jobs}
        for file in _shards(name):  # a glob would also read the shards of an older, other count
            if str(file).removesuffix(".json") not in kept:
                file.unlink()


def _text_of(file):
    try:
        return pathlib.Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _index_file(name):
    return f"{name}.index.tsv"


def _escaped(name):
    """A name without the characters that end a column or line; `_unescaped` is the inverse."""
    special = r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029]"
    return re.sub(special, lambda match: match[0].encode("unicode_escape").decode(), name)


def _unescaped(text):
    escapes = r"\\(\\|[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4})"
    return re.sub(escapes, lambda match: match[0].encode().decode("unicode_escape"), text)


def read_index(name: StrPath) -> Iterator[tuple[str, int, str, list[int]]]:
    """Yields (image name, id, digest, class ids) of every image of a prepared source.

    Raises:
        UserError: if it is missing or damaged.
    """
    file = _index_file(name)
    for number, line in enumerate(files.read_text(file, "index").removesuffix("\n").split("\n"), 1):
        try:
            image, image_id, digest, listed = line.split("\t")
            classes = [int(c) for c in listed.split(",") if c]
            yield _unescaped(image), int(image_id), digest, classes
        except ValueError:
            raise UserError(
                f"line {number} of {file} is damaged; prepare the source again to mend it"
            ) from None


def read_summary(name: StrPath) -> Summary:
    """The summary of a prepared source, with the present paths of the files.

    Raises:
        UserError: if it is missing or damaged.
    """
    file = f"{name}.json"
    summary = files.read_json(file, "summary")
    folder = os.path.dirname(name)
    try:
        numbered = {key: {int(k): v for k, v in summary[key].items()} for key in BY_NUMBER}
        placed = [os.path.join(folder, place) for place in summary["files"]]
        return summary | numbered | {"files": placed}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(
            f"{file} is not the summary of a prepared source, or damaged; prepare it again"
        ) from None


def shared_images(first: StrPath, second: StrPath) -> list[str]:
    """Names, as in the second, of the image files that two prepared sources have in common.

    Files are compared byte by byte, so a scaled or re-encoded copy of an image is not found.
    """
    digests = {digest for _, _, digest, _ in read_index(first)}
    return [name for name, _, digest, _ in read_index(second) if digest in digests]


def check_disjoint(first: StrPath, second: StrPath, why: str) -> None:
    """Checks that two prepared sources have no image file in common.

    Args:
        first, second: prefixes as given to `prepare`.
        why: the reason why they must not, for the message.

    Raises:
        UserError: with the number of images that they have in common, and the first.
    """
    shared = shared_images(first, second)
    if shared:
        raise UserError(
            f"{len(shared)} images are both in {pathlib.Path(first).name!r} and in "
            f"{pathlib.Path(second).name!r}, the first {shared[0]!r}: {why}"
        )


def _damage(name: StrPath) -> dict[str, str]:
    """`{file: what is wrong with it}` of the damaged shards of a prepared source."""
    summary, found = read_summary(name), {}
    for file, expected in zip(summary["files"], summary["sha256"], strict=True):
        try:
            if files.sha256(file) != expected:
                found[file] = f"{file} has changed since it was written"
        except OSError as error:
            found[file] = f"cannot read {file}: {error.strerror}"
    return found


def verify(name: StrPath) -> int:
    """Compares the files of a prepared source with their checksums; returns their number.

    Raises:
        UserError: with the files that changed or are missing.
    """
    found = _damage(name)
    if found:
        raise UserError(f"{'; '.join(found.values())}; prepare the source again")
    return len(read_summary(name)["files"])


def find_damage(name: StrPath) -> str | None:
    """Finds damaged shards of a prepared source by their checksums, and deletes them.

    `prepare` then writes only those again. TFRecords that are used where they are are not deleted.

    Args:
        name: prefix as given to `prepare`.

    Returns:
        A line with the damaged files and what to do; None if all are intact.
    """
    found = _damage(name)
    if not found:
        return None
    own = [file for file in found if pathlib.Path(file) in set(_shards(os.path.abspath(name)))]
    for file in own:
        pathlib.Path(file).unlink(missing_ok=True)
    remedy = (
        "the same command writes them again"
        if len(own) == len(found)
        else "copy them again from their origin"
    )
    return f"{'; '.join(found.values())}; {remedy}"

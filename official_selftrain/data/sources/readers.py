"""From a `config.SourceConfig` to records: which images it has, and how to read some of them."""

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from official_selftrain.config import SourceConfig
from official_selftrain.data import records
from official_selftrain.data.sources import annotations as label_files
from official_selftrain.data.sources import lists, stores, tfds
from official_selftrain.data.sources.names import Names, pair
from official_selftrain.data.sources.record_errors import (
    LeftOut,
    RecordErrors,
    Unskipped,
    merged,
)
from official_selftrain.utils.errors import UserError, did_you_mean

IMAGES_PER_SHARD = 500
# Ends of messages, by what `stores.check_image` returns about the orientation of an image.
ORIENTED = {
    None: "",
    True: ", turned as its EXIF orientation says",
    False: ", taken as stored and not as its EXIF orientation shows it",
}
HINTS = 20  # missing images for which the nearest name is searched, which takes time


@dataclasses.dataclass(frozen=True)
class Reader:
    """A source, divided into shards that threads, processes or machines can read.

    Attributes:
        class_names: `{class id: name}`, {} if unknown.
        shards: what each TFRecord file is made of, as `read` takes it.
        images: number of images, None if unknown.
        read: function (shard, `RecordErrors`) -> iterator of `ImageRecord`.
        fingerprints: lines that change when the files do.
        left_out: what is not among the images.
        skipped: messages of errors of the source as a whole, which on_bad_record=skip allowed.
    """

    class_names: dict[int, str]
    shards: list[Any]
    images: int | None
    read: Callable[[Any, RecordErrors], Iterator[records.ImageRecord]]
    fingerprints: list[str]
    left_out: LeftOut = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)


def open_reader(source: SourceConfig, path: Callable[[str], str]) -> Reader:
    """Opens a source.

    Args:
        source: source that says where its images are.
        path: function from a relative path of `source` to a real one.

    Raises:
        UserError: if anything is wrong with the source as a whole.
    """
    if source.builtin:
        return _digits(source.builtin.removeprefix("digits/"))
    if source.records:
        files = records.matching_files(source.records, path)
        return Reader({}, files, None, _read_file, [stores.fingerprint(file) for file in files])
    if source.tfds:
        wanted = _Wanted(source, path)
        return Reader(*tfds.open_tfds(source, wanted, IMAGES_PER_SHARD))
    return _images(source, path)


def open_part(whole: Mapping[str, Any], positions: Sequence[int]) -> Reader:
    """Opens some images of a prepared source, file by file.

    Args:
        whole: summary of the source, see `prepare`.
        positions: of the images in its index, in ascending order.
    """
    shards, start, left = [], 0, collections.deque(positions)
    for file, count in zip(whole["files"], whole["images_in_files"], strict=True):
        places = set()
        while left and left[0] < start + count:
            places.add(left.popleft() - start)
        shards += [(file, places)] if places else []
        start += count

    def read(shard: tuple[str, set[int]], errors: RecordErrors) -> Iterator[records.ImageRecord]:
        file, places = shard
        stream = enumerate(records.read([file]))
        return (record for place, record in stream if place in places)

    fingerprints = [whole["content"], repr(list(positions))]
    return Reader(whole["classes"], shards, len(positions), read, fingerprints)


def _digits(split: str) -> Reader:
    from official_selftrain.data.sources import digits

    size = digits.SIZES[split]
    shards = [(first, min(first + IMAGES_PER_SHARD, size)) for first in _firsts(size)]

    def read(shard: tuple[int, int], errors: RecordErrors) -> Iterator[records.ImageRecord]:
        return itertools.islice(digits.scenes(split), *shard)

    return Reader(digits.CLASSES, shards, size, read, [split])


def _firsts(count):
    return range(0, count, IMAGES_PER_SHARD)


def _read_file(file, errors):
    """Records of a TFRecord file whose images can be decoded."""
    for record in records.read([file], errors.add):
        try:
            where = f"{record.name or record.image_id} of {file}"
            stores.check_image(record.encoded, where, shown=lambda stored, turned: False)
        except UserError as error:
            errors.add(error)
        else:
            yield record


# --- Lists of names --------------------------------------------------------------------------


class _Wanted:
    """The names that lists select in a data set whose names are not known in advance."""

    def __init__(self, source: SourceConfig, path: Callable[[str], str]) -> None:
        def read(name: str) -> set[str]:
            return set(lists.read_image_list(path(name)))

        self.names = read(source.image_list) if source.image_list else None
        self.excluded: set[str] = set().union(*map(read, source.exclude_lists))

    def __contains__(self, name: Any) -> bool:
        either = {name, pathlib.PurePath(name).stem}
        return not either & self.excluded and (self.names is None or bool(either & self.names))


def _chosen(source, path, names, errors):
    """The names that the lists of a source select.

    Args:
        source, path: see `open_reader`.
        names: `Names` of all images.
        errors: receives an error about lines of the image list without an image; those of other
            lists are only counted.
    """
    chosen = set(names)
    if source.image_list:
        chosen, missing = _listed(path(source.image_list), names, errors)
        if missing:
            errors.add(
                UserError(
                    f"{len(missing)} images of the image list are not in {names.where}, "
                    f"the first {missing[0]!r}{names.near(missing[0])}"
                )
            )
    for file in source.exclude_lists:
        excluded, missing = _listed(path(file), names, errors)
        chosen = chosen - excluded
        for line in missing:
            errors.leave_out("names in exclude_lists without an image", line)
    return chosen


def _listed(file, names, errors):
    """The images that a list names, and its lines that name none."""
    found, missing = {}, []
    for line in lists.read_image_list(file, lambda line: names.find(line) is not None):
        try:
            name = names.find(line)
        except UserError as error:
            raise UserError(f"the image list {file}: {error}") from None
        if name is None and not line.startswith("#"):
            missing.append(line)
        elif name is not None and found.setdefault(name, line) != line:
            errors.leave_out("names in lists of images named before", f"{line} in {file}")
    return set(found), missing


# --- Image files -----------------------------------------------------------------------------


def _images(source, path):
    errors = RecordErrors(source.on_bad_record == "skip")
    store = stores.open_store(path(source.images))
    left_out = [store.left_out, errors.left_out]
    names = {}
    if source.class_list:
        first = 0 if source.masks or source.label_by_folder else 1
        names = lists.read_class_list(path(source.class_list), first)
    # Without label files the images are those of the store; with them, those that the labels list.
    labels, entries = None, dict.fromkeys(store.names)
    if source.annotations:
        class_list = path(source.class_list) if source.class_list else None
        labels = label_files.open_labels(path(source.annotations), names, class_list)
        images = Names(store.names, str(store), store.left_out)
        entries = _entries(labels, images, errors, source.annotations)
        left_out.append(labels.left_out)
        names = ({0: "background"} if source.masks else {}) | labels.class_names
    where = path(source.annotations or source.images)
    chosen = _chosen(source, path, Names(entries, where), errors)
    entries = {name: raw for name, raw in entries.items() if name in chosen}
    mask_store, masks = None, {}
    if source.masks:
        mask_store = stores.open_store(path(source.masks))
        left_out.append(mask_store.left_out)
        masks = _matching_masks(mask_store, store.names, entries)
    if source.label_by_folder:
        folders = sorted({_first_folder(name, store) for name in entries})
        names = names or dict(enumerate(folders))
    items = [(name, raw, masks.get(name)) for name, raw in entries.items()]
    folder_ids = {name: key for key, name in names.items()} if source.label_by_folder else {}
    hints = _hints(entries, Names(store.names, str(store)), source.annotations)
    read = _ImageReader(store, labels, mask_store, names, folder_ids, hints)
    return Reader(
        class_names=names,
        shards=[items[i : i + IMAGES_PER_SHARD] for i in _firsts(len(items))],
        images=len(items),
        read=read,
        fingerprints=_fingerprints(source, path, store, mask_store, labels),
        left_out=merged(left_out),
        skipped=errors.messages,
    )


def _entries(labels, names, errors, where):
    """`{image name: raw labels}`; any error names the label files."""
    try:
        return labels.entries(names, errors)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the labels {where} cannot be read: {type(error).__name__}: {error}"
        ) from None


def _hints(entries, names, labels):
    """`{name: end of a message}` of the names in the `labels` that the store does not have."""
    absent = [name for name in entries if name not in names]
    near = {name: names.near(name) for name in absent[:HINTS]}
    return {name: f", but {labels} lists it{near.get(name, '')}" for name in absent}


def _fingerprints(source, path, store, mask_store, labels):
    lines = store.fingerprints() + (mask_store.fingerprints() if mask_store else [])
    for file in labels.files if labels else ():
        lines.append(stores.fingerprint(file, os.path.relpath(file, path(source.annotations))))
    given = (source.image_list, source.class_list, *source.exclude_lists)
    return lines + [stores.fingerprint(path(name)) for name in given if name]


def _matching_masks(masks, images, entries):
    """`{image name: mask name}` of the `entries`.

    Raises:
        UserError: if an image has no mask, or it is ambiguous which one.
    """
    # Images without a mask take part, so that they cannot leave their mask to another image.
    every = dict.fromkeys([*images, *entries])
    found = pair(every, masks.names, str(masks), entries)
    missing = [name for name in entries if name not in found]
    if missing:
        hint = Names(masks.names, str(masks)).near(missing[0])
        raise UserError(
            f"{len(missing)} of {len(entries)} images have no mask in {masks}, the first "
            f"{missing[0]!r}{hint}; list the images that have one in image_list"
        )
    return {name: found[name] for name in entries}


def _first_folder(name, store):
    """The name of the class of an image: the first folder of its path."""
    parts = pathlib.PurePath(name).parts
    if len(parts) < 2:
        raise UserError(f"label_by_folder: {name!r} of {store} is not in the folder of a class")
    return lists.class_name(parts[0], f"label_by_folder: {name!r}")


class _Shown:
    """Decides whether an image is turned as its EXIF orientation says.

    It is, unless only the stored pixels have the annotated size: tools annotate what they show,
    and most of them, but not all, show images turned.

    Args:
        listed: function without arguments -> the annotated (height, width), or None.

    Attributes:
        doubt: whether there is no size that could decide.
    """

    def __init__(self, listed):
        self._listed = listed
        self.doubt = False

    def __call__(self, stored, turned):
        try:
            size = self._listed()
        except UserError:  # reported when the labels are read
            size = None
        self.doubt = size is None or stored == turned == size
        return stored == turned or size != stored


@dataclasses.dataclass(frozen=True)
class _ImageReader:
    """Reads shards of (image name, raw labels, mask name); can be pickled for other processes."""

    store: Any
    labels: Any
    masks: Any
    class_names: dict
    folder_ids: dict
    hints: dict

    def __call__(
        self, shard: Iterable[tuple[str, Any, str | None]], errors: RecordErrors
    ) -> Iterator[records.ImageRecord]:
        for item in shard:
            try:
                record = self._record(*item, errors)
            except UserError as error:
                errors.add(error)
            except Exception as error:  # whatever is wrong with a file, it can be skipped
                kind = type(error).__name__
                errors.add(UserError(f"image {item[0]!r} cannot be read: {kind}: {error}"))
            else:
                yield record

    def _record(self, name, raw, mask_name, errors):
        has_boxes, has_mask = self.labels is not None, mask_name is not None
        mask = self.masks.read(mask_name) if has_mask else None
        mask_place = f"{self.masks}/{mask_name}"

        def listed():
            size = self.labels.listed_size(raw) if has_boxes else None
            return size or (stores.mask_size(mask, mask_place) if has_mask else None)

        shown = _Shown(listed)
        encoded, height, width, turned = stores.check_image(
            self._read(name), f"{self.store}/{name}", shown, errors
        )
        fields = {
            "image_id": records.hashed_id(name),
            "origin": "human" if has_boxes or has_mask or self.folder_ids else "none",
            "dataset": self.store.title,
        }
        if has_boxes:
            try:
                fields |= self.labels.fields(raw, height, width, errors)
            except Unskipped:
                raise
            except UserError as error:
                raise UserError(f"image {name}{ORIENTED[turned]}: {error}") from None
        if has_mask:
            fields["mask"] = stores.check_mask(mask, mask_place, height, width, self.class_names)
        if shown.doubt and (has_mask or len(fields.get("boxes", ()))):
            errors.turn(name)
        if self.folder_ids:
            fields["label"] = self._label(name)
        return records.ImageRecord(encoded=encoded, height=height, width=width, name=name, **fields)

    def _read(self, name):
        try:
            return self.store.read(name)
        except UserError as error:
            raise UserError(f"{error}{self.hints.get(name, '')}") from None

    def _label(self, name):
        folder = _first_folder(name, self.store)
        if folder not in self.folder_ids:
            hint = did_you_mean(folder, list(self.folder_ids))
            raise UserError(f"{name}: the class list does not contain {folder!r}{hint}")
        return self.folder_ids[folder]

"""From a `config.SourceConfig` to records: which images there are, and how to read some of them."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

from official_selftrain.config import did_you_mean
from official_selftrain.data import records
from official_selftrain.data.sources import labels as label_files
from official_selftrain.data.sources import stores, tfds
from official_selftrain.errors import UserError
from official_selftrain.files import read_text

IMAGES_PER_SHARD = 500


@dataclasses.dataclass(frozen=True)
class Reader:
    """A source, cut into units of work that threads, processes or machines can share.

    Attributes:
        class_names: `{class id: name}`, {} where not known.
        units: each becomes one TFRecord file.
        images: how many images there are, None if unknown.
        read: function (unit, problems) -> iterator of `ImageRecord`.
        stamps: lines that change when the files do.
    """

    class_names: dict
    units: list[Any]
    images: int | None
    read: Callable
    stamps: list[str]


def open_reader(source, path):
    """The reader of a source.

    Args:
        source: a `config.SourceConfig` with one kind of images given.
        path: function from a relative path of `source` to a real one.

    Raises:
        UserError: for anything wrong with the source as a whole.
    """
    if source.embedded:
        return _embedded(source.embedded)
    if source.records:
        files = records.matching_files(path(source.records))
        return Reader({}, files, None, _read_file, [stores.stamp(file) for file in files])
    if source.tfds:
        wanted = _Wanted(source, path, "the data set")
        return Reader(*tfds.open_tfds(source, wanted, IMAGES_PER_SHARD))
    return _images(source, path)


def _embedded(split):
    from official_selftrain.data import embedded

    size = embedded.SIZES[split]
    units = [(first, min(first + IMAGES_PER_SHARD, size)) for first in _firsts(size)]

    def read(unit, problems):
        return itertools.islice(embedded.scenes(split), *unit)

    return Reader(embedded.CLASSES, units, size, read, [split])


def _firsts(count):
    return range(0, count, IMAGES_PER_SHARD)


def _read_file(file, problems):
    """Records of a TFRecord file whose images can be decoded."""
    for record in records.read([file]):
        try:
            where = f"{record.name or record.image_id} of {file}"
            stores.check_image(record.encoded, where, shown=lambda stored, turned: False)
        except UserError as error:
            problems.add(error)
        else:
            yield record


# --- Lists of names --------------------------------------------------------------------------


class _Wanted:
    """Which names the lists of a source take and leave."""

    def __init__(self, source, path, where):
        self.where = where
        read = lambda name: _read_list(path(name))  # noqa: E731
        self.names = read(source.image_list) if source.image_list else None
        self.excluded = set().union(*map(read, source.exclude_lists))
        self._missing = set(self.names or ())
        self._known = []

    def __contains__(self, name):
        """Whether the image is taken; every name must be asked for once, before `check`."""
        stem = pathlib.PurePath(name).stem
        self._missing -= {name, stem}
        if len(self._known) < 10_000:
            self._known.append(stem)
        if name in self.excluded or stem in self.excluded:
            return False
        return self.names is None or name in self.names or stem in self.names

    def check(self):
        """Refuses a list that names images which there are not."""
        if self._missing:
            first = sorted(self._missing)[0]
            hint = did_you_mean(first, self._known)
            raise UserError(
                f"{len(self._missing)} images of the image list are not in {self.where}, "
                f"the first {first!r}{hint if 'mean' in hint else ''}"
            )


def _read_list(path):
    lines = (line.strip() for line in read_text(path, "image list").splitlines())
    names = [line for line in lines if line]
    # The lists of a single class in VOC have a second column, 1 or -1.
    if names and all(name.split()[-1] in ("1", "0", "-1") and " " in name for name in names):
        return {name.split()[0] for name in names if not name.endswith("-1")}
    return set(names)


# --- Image files -----------------------------------------------------------------------------


def _images(source, path):
    store = stores.open_store(path(source.images))
    first = 0 if source.masks or source.label_by_folder else 1
    names = {}
    if source.class_list:
        names = label_files.read_class_list(path(source.class_list), first)
    labels, entries = None, dict.fromkeys(store.names)
    if source.annotations:
        labels = label_files.open_labels(path(source.annotations), names)
        entries = labels.entries(store.names)
        names = ({0: "background"} if source.masks else {}) | labels.class_names
    wanted = _Wanted(source, path, path(source.annotations or source.images))
    entries = {name: raw for name, raw in entries.items() if name in wanted}
    wanted.check()
    mask_store, masks = None, {}
    if source.masks:
        mask_store = stores.open_store(path(source.masks))
        masks = _matching_masks(mask_store, entries)
    if source.label_by_folder:
        folders = sorted({_first_folder(name, store) for name in entries})
        names = names or dict(enumerate(folders))
    items = [(name, raw, masks.get(name)) for name, raw in entries.items()]
    folder_ids = {name: key for key, name in names.items()} if source.label_by_folder else {}
    read = _ImageReader(store, labels, mask_store, names, folder_ids)
    return Reader(
        class_names=names,
        units=[items[i : i + IMAGES_PER_SHARD] for i in _firsts(len(items))],
        images=len(items),
        read=read,
        stamps=_stamps(source, path, store, mask_store),
    )


def _stamps(source, path, store, mask_store):
    lines = store.stamps() + (mask_store.stamps() if mask_store else [])
    given = (source.annotations, source.image_list, source.class_list, *source.exclude_lists)
    for place in (pathlib.Path(path(name)) for name in given if name):
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        lines += [stores.stamp(file) for file in found]
    return lines


def _matching_masks(store, names):
    """`{image name: mask name}` by the stem.

    Raises:
        UserError: if an image has no mask.
    """
    by_stem = {pathlib.PurePath(name).stem: name for name in store.names}
    found = {name: by_stem.get(pathlib.PurePath(name).stem) for name in names}
    missing = [name for name, mask in found.items() if mask is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} images have no mask in {store}, the first "
            f"{missing[0]!r}; name the images that have one in image_list"
        )
    return found


def _first_folder(name, store):
    parts = pathlib.PurePath(name).parts
    if len(parts) < 2:
        raise UserError(f"label_by_folder: {name!r} of {store} is not in a folder of its class")
    return parts[0]


@dataclasses.dataclass(frozen=True)
class _ImageReader:
    """Reads (image name, raw labels, mask name) items; goes to other processes with its units."""

    store: Any
    labels: Any
    masks: Any
    class_names: dict
    folder_ids: dict

    def __call__(self, unit, problems):
        for item in unit:
            try:
                yield self._record(*item)
            except UserError as error:
                problems.add(error)

    def _record(self, name, raw, mask_name):
        labelled = self.labels is not None
        encoded, height, width, _ = stores.check_image(
            self.store.read(name),
            f"{self.store}/{name}",
            lambda stored, turned: not labelled and mask_name is None,
        )
        fields = {
            "image_id": records.hashed_id(name),
            "origin": "human" if labelled or mask_name or self.folder_ids else "none",
            "dataset": self.store.title,
        }
        try:
            fields |= self.labels.fields(raw, height, width) if labelled else {}
        except UserError as error:
            raise UserError(f"image {name}: {error}") from None
        if mask_name is not None:
            fields["mask"] = stores.check_mask(
                self.masks.read(mask_name), f"{self.masks}/{mask_name}", height, width,
                self.class_names,
            )  # fmt: skip
        if self.folder_ids:
            fields["label"] = self._label(name)
        return records.ImageRecord(encoded=encoded, height=height, width=width, name=name, **fields)

    def _label(self, name):
        folder = _first_folder(name, self.store)
        if folder not in self.folder_ids:
            hint = did_you_mean(folder, list(self.folder_ids))
            raise UserError(f"{name}: the class list has no {folder!r}{hint}")
        return self.folder_ids[folder]

"""Finds the file that a name means, even if another program has spelled it differently.

The identity of an image is its path below the folder given, not its stem: equal names in different
folders are different images. What is found is always the unchanged name in the store.
"""

import collections
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator

from official_selftrain.data.sources import stores
from official_selftrain.data.sources.record_errors import LeftOut
from official_selftrain.utils.errors import UserError, did_you_mean

# Folders that only say what is in them: images/train/a.jpg belongs to labels/train/a.txt.
KINDS = {"images", "jpegimages", "labels", "annotations", "masks", "segmentationclass"}
LABEL_SUFFIXES = (".xml", ".txt")
HINTS_FROM = 10_000  # names that are compared to find the nearest one, which takes time
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff]")


def spelled(name: str) -> str:
    """A path in a uniform spelling: composed letters, plain spaces, `/`, no `%20`, no `./`."""
    text = urllib.parse.unquote(name) if "%" in name else name
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text)).replace("\\", "/")
    # Label Studio: /data/local-files/?d=folder/a.jpg
    parts = (" ".join(part.split()) for part in text.replace("?d=", "/").split("/"))
    return "/".join(part for part in parts if part not in ("", "."))


def without_suffix(path: str) -> str:
    """A path without the suffix of an image or label file; other dots belong to the name."""
    stem, dot, suffix = path.rpartition(".")
    known = (*stores.SUFFIXES, *LABEL_SUFFIXES)
    return stem if stem and not stem.endswith("/") and (dot + suffix).lower() in known else path


def _folded(name):
    return spelled(name).casefold()


def _stem(name):
    return without_suffix(_folded(name))


# From the strictest reading of a name to the most lenient.
READINGS = (spelled, _folded, _stem)


class Names:
    """Names that are also found in another spelling, case, folder or suffix.

    Args:
        names: paths with `/`, as a store has them.
        where: what contains them, for messages.
        left_out: what else is there, for messages.
    """

    def __init__(self, names: Iterable[str], where: str, left_out: LeftOut | None = None) -> None:
        self.where, self._left_out = where, left_out or {}
        self._names = dict.fromkeys(names)
        self._tables: dict[Callable, dict[str, list[tuple[str, str]]]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def find(self, given: str) -> str | None:
        """The one name that `given` means; None if none fits.

        Raises:
            UserError: if several fit equally well, with two of them.
        """
        if given in self._names:
            return given
        for reading in READINGS:
            path = reading(given)
            found = self._ending(reading, path) if path else []
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f"{given!r} can mean {found[0]!r} or {found[1]!r} of {self.where}; write the "
                    "path below that folder"
                )
        return None

    def _ending(self, reading, path):
        """Names that end like `path`, or with which it ends; the longest agreement counts.

        `images/cam1/a.jpg` and `a.jpg` can mean cam1/a.jpg; `cam2/a.jpg` cannot.
        """
        # Comparing all pairs would take hours; only names with the same last part can match.
        if reading not in self._tables:
            table = self._tables[reading] = collections.defaultdict(list)
            for name in self._names:
                key = reading(name)
                table[key.rpartition("/")[2]].append((key, name))
        agreements = collections.defaultdict(list)
        for key, name in self._tables[reading].get(path.rpartition("/")[2], ()):
            if f"/{path}".endswith(f"/{key}") or f"/{key}".endswith(f"/{path}"):
                agreements[min(key.count("/"), path.count("/"))].append((key != path, name))
        best = agreements[max(agreements)] if agreements else []
        return [name for other, name in best if not other] or [name for _, name in best]

    def near(self, given: str) -> str:
        """The end of a message: the name nearest to one not found, or what was left out."""
        hint = did_you_mean(given, list(self._names)[:HINTS_FROM])
        if "mean" in hint:
            return hint
        kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in self._left_out.items())
        return f"; left out there: {kinds}" if kinds else ""


# --- Pairs -----------------------------------------------------------------------------------


def _without_kinds(name):
    parts = _stem(name).split("/")
    return "/".join([part for part in parts[:-1] if part not in KINDS] + parts[-1:])


def _last(name):
    return _stem(name).rpartition("/")[2]


# Readings of the names of image and label that must agree. The stem alone is tried last, by `pair`.
PATHS = (
    (lambda name: without_suffix(spelled(name)),) * 2,
    (_stem,) * 2,
    (_folded, _stem),  # a.jpg and a.jpg.txt
    (_without_kinds,) * 2,
)


def pair(
    images: Iterable[str],
    labels: Iterable[str],
    where: str,
    wanted: Collection[str] | None = None,
) -> dict[str, str]:
    """`{image name: label name}` of the images that have a label.

    An image and a label belong together if their paths below their folders agree except for the
    suffix, or else if no other image and no other label has the same stem.

    Args:
        images: names of the images.
        labels: names of the labels.
        where: the folder of the labels, for messages.
        wanted: images whose label must be unambiguous; None for all.

    Raises:
        UserError: if an image could have several labels or a label several images, with both.
    """
    found: dict[str, str] = {}
    free = list(labels)
    rest = list(images)
    for of_image, of_label in PATHS:
        found |= _matches(rest, free, of_image, of_label, where, wanted)
        taken = set(found.values())
        rest = [name for name in rest if name not in found]
        free = [name for name in free if name not in taken]
        if not rest or not free:
            return found
    # Stems of paired names count as well: a stem that occurs twice proves nothing.
    counts = collections.Counter(map(_last, images)), collections.Counter(map(_last, labels))
    for image, label in _matches(rest, free, _last, _last, where, wanted).items():
        if any(count[_last(image)] > 1 for count in counts):
            if wanted is None or image in wanted:
                raise UserError(
                    f"{image!r} and {label!r} of {where} have the same stem but different "
                    "folders, and so do others; put both into equal folders"
                )
        else:
            found[image] = label
    return found


def _matches(images, labels, of_image, of_label, where, wanted):
    groups = collections.defaultdict(lambda: ([], []))
    for label in labels:
        groups[of_label(label)][1].append(label)
    for image in images:
        key = of_image(image)
        if key in groups:
            groups[key][0].append(image)
    found = {}
    for group_images, group_labels in groups.values():
        matters = wanted is None or any(image in wanted for image in group_images)
        if len(group_images) > 1 and matters:
            first, second = group_images[:2]
            raise UserError(
                f"{first!r} and {second!r} would have the same labels, {group_labels[0]}"
            )
        if len(group_images) == 1 and len(group_labels) > 1 and matters:
            first, second = group_labels[:2]
            raise UserError(
                f"{group_images[0]!r} could have the labels {first!r} or {second!r} of {where}; "
                "keep one"
            )
        if len(group_images) == len(group_labels) == 1:
            found[group_images[0]] = group_labels[0]
    return found

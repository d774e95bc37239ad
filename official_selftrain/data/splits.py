"""Nested labeled subsets: 1 % lies inside 2 %, that inside 5 %, and so on.

The order of the images depends only on the seed and on their names, so anyone can draw the same
subsets from the same data set. The paper does not say how it chose its 20 % and 50 % of COCO.
"""

import collections
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath


def order(
    images: Iterable[tuple[str, Iterable[int]]], seed: int = 0, stratified: bool = False
) -> list[str]:
    """The names of the images in the order in which they join the subsets.

    Args:
        images: (name, class ids) of each image; names are unique.
        seed: seed of the draw.
        stratified: if true, begin with enough images for every class to occur, rarest class first;
            then always add an image of the class that the subset lacks most, so that each subset
            has the class proportions of the whole. If false, draw uniformly.
    """

    def rank(image):
        # A hash instead of a random generator: removing an image does not move the others.
        return hashlib.blake2b(f"{seed}/{image[0]}".encode(), digest_size=8).digest()

    images = sorted(images, key=rank)
    if stratified:
        images = _stratify(images)
    return [name for name, _ in images]


def _stratify(images: list[tuple[str, Iterable[int]]]) -> list[tuple[str, Iterable[int]]]:
    """Reorders images as `order` describes; ties are broken by the present order."""
    # Images without labels form a class of their own, which is drawn in proportion as well.
    present: list[list[Any]] = [sorted(set(classes)) or [None] for _, classes in images]
    with_class = collections.defaultdict(list)
    for index, classes in enumerate(present):
        for label in classes:
            with_class[label].append(index)
    # By count and then by text, because ids and None cannot be compared.
    labels = sorted(with_class, key=lambda label: (len(with_class[label]), str(label)))
    number = {label: i for i, label in enumerate(labels)}
    fraction = np.array([len(with_class[label]) for label in labels]) / len(images)
    queues = [iter(with_class[label]) for label in labels]
    counts, used, chosen = np.zeros(len(labels)), np.zeros(len(images), bool), []

    def take(column):
        """Chooses the next image with a class; returns False if none is left."""
        for index in queues[column]:
            if not used[index]:
                used[index] = True
                chosen.append(images[index])
                counts[[number[label] for label in present[index]]] += 1
                return True
        return False

    for column in range(len(labels)):
        if not counts[column]:
            take(column)
    exhausted = np.zeros(len(labels), bool)
    while len(chosen) < len(images):
        lack = np.where(exhausted, -np.inf, (len(chosen) + 1) * fraction - counts)
        column = int(lack.argmax())
        exhausted[column] = not take(column)
    return chosen


def write(
    images: Sequence[tuple[str, Sequence[int]]],
    prefix: StrPath,
    percentages: Sequence[float],
    seed: int = 0,
    stratified: bool = False,
    names: Mapping[int, str] | None = None,
) -> dict[float, str]:
    """Writes one list of names per percentage, and a summary of all of them.

    The lists are called `PREFIX_PERCENT_seedSEED.txt`, the summary `PREFIX_splits_seedSEED.json`.

    Args:
        images: (name, class ids) of each image.
        prefix: beginning of the paths.
        percentages: sizes of the subsets in percent of the images, above 0 and at most 100.
        seed: seed of the draw.
        stratified: whether every subset has the class proportions of the whole; see `order`.
        names: `{class id: name}`, for messages.

    Returns:
        `{percentage: path of the list}`.

    Raises:
        UserError: if there is no image, two have the same name, a name has several lines, a
            percentage is out of range, or a stratified subset is too small to hold every class.
    """
    _check(images, percentages)
    ordered = order(images, seed, stratified)
    classes_of = dict(images)
    everything = collections.Counter(c for _, classes in images for c in set(classes))
    written: dict[float, str] = {}
    summary: dict[str, Any] = {}
    for percentage in percentages:
        # Never empty, so that 1 % of 20 images is still a data set.
        subset = ordered[: max(1, round(percentage / 100 * len(ordered)))]
        found = collections.Counter(c for name in subset for c in set(classes_of[name]))
        missing = sorted(everything.keys() - found.keys())
        if missing:
            labels = ", ".join((names or {}).get(c, str(c)) for c in missing[:5])
            message = (
                f"{percentage:g} % is {len(subset)} of {len(ordered)} images, without "
                f"{len(missing)} of {len(everything)} classes ({labels})"
            )
            if stratified:
                raise UserError(f"{message}: too few to hold every class")
            logging.warning("%s; --stratified keeps every class", message)
        text = "".join(f"{name}\n" for name in subset)
        file = f"{prefix}_{percentage:g}_seed{seed}.txt"
        files.write_text(file, text)
        written[percentage] = file
        summary[f"{percentage:g}"] = {
            "file": file,
            "images": len(subset),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "images_per_class": {str(c): found[c] for c in sorted(everything)},
        }
    content = {"seed": seed, "stratified": stratified, "images": len(ordered), "subsets": summary}
    files.write_json(f"{prefix}_splits_seed{seed}.json", content)
    return written


def _check(images: Sequence[tuple[str, Sequence[int]]], percentages: Sequence[float]) -> None:
    """Checks the percentages, and that lists with one name per line can tell the images apart."""
    if not all(0 < percentage <= 100 for percentage in percentages):
        raise UserError(f"percentages must be above 0 and at most 100; given {percentages}")
    if not images:
        raise UserError("there is no image to draw a subset from")
    name, count = collections.Counter(name for name, _ in images).most_common(1)[0]
    if count > 1 or not name:
        raise UserError(
            f"{count} images are called {name!r}; lists of names need a different one for each"
        )
    broken = next((name for name, _ in images if len(name.splitlines()) > 1), None)
    if broken is not None:
        raise UserError(
            f"the name {broken!r} has several lines, but a list has one name per line; rename the "
            "image"
        )

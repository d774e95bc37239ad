"""Nested labeled subsets: 1 % lies inside 2 %, that inside 5 %, and so on.

The order of the images depends on the seed and their names alone, so anyone can draw the same
subset from the same data set. The paper does not say how it chose its 20 % and 50 % of COCO.
"""

import collections
import hashlib
import logging

import numpy as np

from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError


def order(images, seed=0, stratified=False):
    """Names in the order in which subsets grow.

    Args:
        images: (name, class ids) of each image; names are unique.
        seed: of the draw.
        stratified: first enough images for every class to occur, rarest class first; then always
            one of the class that the subset lacks most, so that each subset has the classes in the
            proportions of the whole. Otherwise a uniform draw.
    """

    def rank(image):
        return hashlib.blake2b(f"{seed}/{image[0]}".encode(), digest_size=8).digest()

    images = sorted(images, key=rank)
    if stratified:
        images = _stratify(images)
    return [name for name, _ in images]


def _stratify(images):
    """Reorders images, those with equal rights in their present order."""
    present = [sorted(set(classes)) or [None] for _, classes in images]
    with_class = collections.defaultdict(list)
    for index, classes in enumerate(present):
        for label in classes:
            with_class[label].append(index)
    labels = sorted(with_class, key=lambda label: (len(with_class[label]), str(label)))
    number = {label: i for i, label in enumerate(labels)}
    share = np.array([len(with_class[label]) for label in labels]) / len(images)
    queues = [iter(with_class[label]) for label in labels]
    counts, used, chosen = np.zeros(len(labels)), np.zeros(len(images), bool), []

    def take(column):
        """The next image with a class; False when there is none left."""
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
        lack = np.where(exhausted, -np.inf, (len(chosen) + 1) * share - counts)
        column = int(lack.argmax())
        exhausted[column] = not take(column)
    return chosen


def write(images, prefix, percentages, seed=0, stratified=False, names=None):
    """Writes `PREFIX_PERCENT_seedSEED.txt` lists of names, and `PREFIX_splits_seedSEED.json`.

    Args:
        images: (name, class ids) of each image.
        prefix: of the files.
        percentages: of the images, above 0 up to 100.
        seed, stratified: see `order`.
        names: `{class id: name}`, for messages.

    Returns:
        `{percentage: file}`.

    Raises:
        UserError: for no image, two images of one name, a name of several lines, a percentage out
            of range, or a stratified subset too small to hold every class.
    """
    if not images:
        raise UserError("there is no image to draw a subset from")
    name, count = collections.Counter(name for name, _ in images).most_common(1)[0]
    if count > 1 or not name:
        raise UserError(f"{count} images are called {name!r}; lists of names need different ones")
    broken = next((name for name, _ in images if len(name.splitlines()) > 1), None)
    if broken is not None:
        raise UserError(f"the name {broken!r} has several lines, a list one a name; rename it")
    if not all(0 < percentage <= 100 for percentage in percentages):
        raise UserError(f"percentages are above 0 and at most 100; given {percentages}")
    ordered = order(images, seed, stratified)
    classes_of = dict(images)
    everything = collections.Counter(c for _, classes in images for c in set(classes))
    written, summary = {}, {}
    for percentage in percentages:
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

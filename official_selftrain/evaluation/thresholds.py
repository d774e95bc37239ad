"""Thresholds of pseudo labels, found on images whose human labels the teacher has not learned.

A prediction counts by its class and score, in bins that begin at the possible thresholds. So one
pass over the images is enough, whatever the number of boxes or pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from official_selftrain.evaluation.label_statistics import display_names

THRESHOLDS = np.arange(101) / 100  # those among which one is chosen
LOWEST = 0.3  # no threshold is lower: the few images of a selection do not tell bad labels apart
FALLBACK = 0.5  # the paper's, for a class that is too rare to tell


class ScoreCounts:
    """Numbers of predictions of each class and score, and how many of them are right.

    The base of boxes and masks; a subclass defines `update(record, prediction)`.

    Args:
        num_classes: number of classes, including the background.
        enough: true objects, or pixels, of a class that its threshold takes.
        first_class: lowest class id that is predicted.
    """

    def __init__(self, num_classes: int, enough: int, first_class: int = 0) -> None:
        self.enough, self.first_class = enough, first_class
        self.found = np.zeros((num_classes, len(THRESHOLDS)), "int64")
        self.right = np.zeros_like(self.found)
        self.truth = np.zeros(num_classes, "int64")

    def add(self, classes: np.ndarray, bins: np.ndarray, right: np.ndarray) -> None:
        """Counts predictions.

        Args:
            classes: `[N]` class ids.
            bins: `[N]` index of the highest of `THRESHOLDS` that keeps each, -1 if none does.
            right: `[N]` bool, whether it agrees with the human labels.
        """
        for table, chosen in ((self.found, bins >= 0), (self.right, (bins >= 0) & right)):
            flat = classes[chosen].astype("int64") * len(THRESHOLDS) + bins[chosen]
            table += np.bincount(flat, minlength=table.size).reshape(table.shape)

    def merge(self, other: "ScoreCounts") -> None:
        """Adds what another worker has counted."""
        self.found += other.found
        self.right += other.right
        self.truth += other.truth

    def result(self, target: float, class_names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
        """The lowest threshold of each class whose labels reach a precision.

        No threshold is below `LOWEST`. A class with less than `enough` true labels, or with less
        than half as many found above `LOWEST`, gets `FALLBACK`; where no threshold reaches
        the target, it is the one with the highest precision. Thresholds that keep less than half of
        `enough` are not considered, because their precision is chance.

        Args:
            target: precision to reach, in [0, 1].
            class_names: `{class id: name}`.

        Returns:
            `{class name: entry}`, an entry with `class` (its id), `threshold`, `kept` and `right`
            (labels above it, and those of them that are right), `truth` (number of true ones),
            `precision`, and `reached`, whether that reaches the target; both are None for a class
            that gets `FALLBACK`.
        """
        entries = {}
        labels = range(self.first_class, len(self.truth))
        for label, name in display_names(labels, class_names).items():
            found, right = (table[label, ::-1].cumsum()[::-1] for table in (self.found, self.right))
            index = _choose(found, right, target, self.enough, self.truth[label])
            entry = {"class": label, "threshold": FALLBACK, "precision": None, "reached": None}
            if index is None:
                index = int(np.searchsorted(THRESHOLDS, FALLBACK))
            else:
                precision = float(right[index] / found[index])
                entry |= {"precision": precision, "reached": precision >= target}
            entry |= {"threshold": float(THRESHOLDS[index]), "truth": int(self.truth[label])}
            entries[name] = entry | {"kept": int(found[index]), "right": int(right[index])}
        return entries

    def precision(self, thresholds: Sequence[float]) -> float | None:
        """Fraction of the labels above given thresholds that are right; None if there are none.

        Args:
            thresholds: of each class, by class id; each is taken as the next of `THRESHOLDS`.
        """
        first = np.searchsorted(THRESHOLDS, np.array(thresholds) - 1e-6)
        kept = np.arange(len(THRESHOLDS)) >= first[:, None]
        found = self.found[kept].sum()
        return float(self.right[kept].sum() / found) if found else None


def _choose(found, right, target, enough, truth):
    """Index of the threshold of a class, from the numbers `[101]` that each keeps, or None."""
    possible = (THRESHOLDS >= LOWEST) & (found >= enough / 2)
    if truth < enough or not possible.any():
        return None
    precision = np.where(possible, right / np.maximum(found, 1), -1.0)
    reached = np.flatnonzero(precision >= target)
    return int(reached[0] if len(reached) else precision.argmax())

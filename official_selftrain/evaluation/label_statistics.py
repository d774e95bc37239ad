"""What the student will see of pseudo labels, for labels of any kind: counts and warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from official_selftrain.config import PseudoConfig
from official_selftrain.data.records import ImageRecord
from official_selftrain.utils.errors import UserError

# A class is starved if its fraction of the pseudo labels is below this part of its fraction of the
# human labels. Below `ENOUGH` labels a fraction is mostly chance.
STARVED = 0.25
ENOUGH = 10
FLOODING = 4.0  # the same for a class that has many times its fraction of the human labels
NEVER = 5  # labels of a class to be expected, from which on none at all is no chance
MIN_PRECISION = 0.5  # labels that are known to be wrong more often than right


class LabelStatistics:
    """Counts the pseudo labels of one image after another; the base of boxes and masks.

    A subclass defines `labels_of`, `add`, `counts`, `warnings` and, where the truth can be known,
    `quality`; `add` increments `images` and `kept`.

    Args:
        source: its thresholds decide which labels are kept.
        num_classes: number of classes, including the background.
        class_names: `{class id: name}`; ids without a name are shown as numbers.
        human: some records with human labels. The classes of the pseudo labels are compared with
            theirs.
    """

    unit: str  # what one label is called in messages
    first_class = 0  # lowest class id of a label

    def __init__(
        self,
        source: PseudoConfig,
        num_classes: int,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> None:
        self.num_classes = num_classes
        self.threshold = source.score_threshold
        self.names = class_names or {}
        limits = source.thresholds(num_classes)
        different = bool(source.class_thresholds)  # then all classes are shown with theirs
        shown = display_names(range(self.first_class, num_classes * different), self.names)
        self.thresholds = {n: {"class": c, "threshold": limits[c]} for c, n in shown.items()}
        self.limits_text = threshold_text(
            {"threshold": self.threshold, "thresholds": self.thresholds}
        )
        self.images = self.human_images = 0
        self.kept: Counter[int] = Counter()
        self.human: Counter[int] = Counter()
        for record in human:
            self.human_images += 1
            self.human.update(self.labels_of(record))

    def human_per_image(self) -> float:
        """Mean number of human labels of an image, 0 if none is known."""
        return self.human.total() / max(self.human_images, 1)

    def labels_of(self, record: ImageRecord) -> dict[int, int]:
        """`{class id: number}` of the human labels of a record."""
        raise NotImplementedError

    def add(self, record: ImageRecord, truth: ImageRecord) -> None:
        """Adds a pseudo-labeled record, and the same image with held-back labels or without any."""
        raise NotImplementedError

    def counts(self) -> dict[str, Any]:
        """The entries of `result` about the labels themselves."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """Sentences about what looks wrong with the labels."""
        raise NotImplementedError

    def quality(self) -> dict[str, float]:
        """The entries of `result` that compare with held-back labels; empty if there were none."""
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        """`images`, `threshold` and `warnings`, with the entries of `counts` and `quality`.

        `thresholds` is `{class name: {"class": id, "threshold": value}}`, empty if all classes have
        the same one.
        """
        shares = starved_classes(self.human, self.kept, self.names)
        shares += flooding_classes(self.human, self.kept, self.names)
        quality = self.quality()
        known = quality.get("precision", quality.get("pixel_accuracy"))
        return {
            "images": self.images,
            "threshold": self.threshold,
            "thresholds": self.thresholds,
            **self.counts(),
            "warnings": self.warnings() + shares + low_precision(known, "the held-back labels"),
            **quality,
        }

    def error_message(self, result: Mapping[str, Any]) -> str | None:
        """Why the labels cannot be used at all, or None if they can."""
        if self.kept:
            return None
        best = result.get("largest_score")
        highest = "" if best is None else f"; the highest score is {best:.2f}"
        return (
            f"the threshold {self.limits_text} keeps no {self.unit} of {self.images} images"
            f"{highest}. Lower pseudo.score_threshold, or train the teacher longer"
        )

    def kept_by_name(self) -> dict[str, int]:
        """`{class name: number of labels kept}`, in the order of the class ids."""
        return {self.names.get(label, str(label)): n for label, n in sorted(self.kept.items())}


def count_classes(classes: np.ndarray) -> dict[int, int]:
    """`{class id: number}` of an integer array of any shape, only ids that occur."""
    counts = np.bincount(classes.ravel())
    return {int(label): int(counts[label]) for label in np.flatnonzero(counts)}


def check_class(record: ImageRecord, largest: int, num_classes: int) -> None:
    """Checks the largest class id of a record.

    Raises:
        UserError: naming the record, if the id is not below `num_classes`.
    """
    if largest >= num_classes:
        raise UserError(
            f"image {record.name or record.image_id} has the class id {largest}, but "
            f"task.num_classes={num_classes} allows ids up to {num_classes - 1}; were its labels "
            "made for other classes?"
        )


def starved_classes(
    human: Mapping[int, int], pseudo: Mapping[int, int], names: Mapping[int, str]
) -> list[str]:
    """Warnings about classes that are much rarer among pseudo labels than among human labels.

    Args:
        human: `{class id: number of human labels}`.
        pseudo: the same of the pseudo labels.
        names: `{class id: name}`.
    """
    all_human, all_pseudo = sum(human.values()), sum(pseudo.values())
    warnings = []
    for label, count in sorted(human.items()):
        expected = count / all_human
        found = pseudo.get(label, 0) / max(all_pseudo, 1)
        # That a class is not found at all takes fewer labels to be sure of than that it is rare.
        needed = ENOUGH if label in pseudo else NEVER
        enough = count >= ENOUGH and expected * all_pseudo >= needed
        if enough and found < STARVED * expected:
            warnings.append(
                f"class {names.get(label, label)} has {found:.1%} of the pseudo labels, but "
                f"{expected:.1%} of the human ones: the student may forget it; lower "
                f"pseudo.class_thresholds={{{label}: ...}}, or train the teacher longer"
            )
    return warnings


def flooding_classes(
    human: Mapping[int, int], pseudo: Mapping[int, int], names: Mapping[int, str]
) -> list[str]:
    """Warnings about classes that are much more frequent among pseudo labels than among human ones.

    Args:
        human: `{class id: number of human labels}`.
        pseudo: the same of the pseudo labels.
        names: `{class id: name}`.
    """
    all_human, all_pseudo = sum(human.values()), sum(pseudo.values())
    warnings = []
    for label, count in sorted(pseudo.items()):
        # One label more is less than human labels can tell.
        expected = max(human.get(label, 0), 1) / max(all_human, 1)
        found = count / all_pseudo
        if all_human >= ENOUGH and count >= ENOUGH and found > FLOODING * expected:
            warnings.append(
                f"class {names.get(label, label)} has {found:.1%} of the pseudo labels, but "
                f"{human.get(label, 0) / all_human:.1%} of the human ones: the teacher sees it "
                f"where it is not; raise pseudo.class_thresholds={{{label}: ...}} (or set "
                "pseudo.score_threshold=auto), or train the teacher longer"
            )
    return warnings


def low_precision(precision: float | None, measured_on: str) -> list[str]:
    """A warning if most labels are known to be wrong.

    Args:
        precision: fraction of the kept labels that are right, or None if it is not known.
        measured_on: what they were compared with.
    """
    if precision is None or precision >= MIN_PRECISION:
        return []
    return [
        f"only {precision:.1%} of the kept labels agree with {measured_on}: the student learns "
        "mostly mistakes; raise pseudo.score_threshold (auto finds one for each class), or train "
        "the teacher longer"
    ]


def threshold_range(result: Mapping[str, Any]) -> list[float]:
    """The threshold of a `LabelStatistics.result`, or the lowest and highest of the classes."""
    entries = (result.get("thresholds") or {"all": result}).values()
    limits = [entry["threshold"] for entry in entries]
    return sorted({min(limits), max(limits)})


def threshold_text(result: Mapping[str, Any]) -> str:
    """`threshold_range` in words."""
    limits = threshold_range(result)
    return str(limits[0]) if len(limits) == 1 else f"{limits[0]} to {limits[1]}, by class"


def class_rows(result: Mapping[str, Any], texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """A row per class for the report, with its threshold where it has one of its own.

    Args:
        result: of `LabelStatistics.result`; its `thresholds` may also have what
            `ScoreCounts.result` tells of them.
        texts: `{class name: what was found}`.
    """
    limits = result.get("thresholds") or {}
    rows = []
    for name in {**texts, **limits}:
        text, entry = texts.get(name, "none"), limits.get(name)
        if entry is not None:
            text += f", threshold {entry['threshold']}"
            if entry.get("precision") is not None:
                text += f" (precision {entry['precision']:.0%} on the selection images)"
            if entry.get("reached", True) is None:
                text += " (too rare in the selection images to tell)"
        rows.append((name, text))
    return rows


def display_names(labels: Iterable[int], class_names: Mapping[int, str]) -> dict[int, str]:
    """`{class id: name}`; a name that several classes have is followed by the id."""
    names = {label: class_names.get(label, str(label)) for label in labels}
    every = list(names.values())
    return {c: name if every.count(name) == 1 else f"{name} ({c})" for c, name in names.items()}

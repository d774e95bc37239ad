"""How good pseudo boxes are: counts, histogram, and precision and recall where truth is known."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from official_selftrain.config import PseudoConfig
from official_selftrain.data.records import ImageRecord
from official_selftrain.evaluation.label_statistics import (
    LabelStatistics,
    check_class,
    count_classes,
)
from official_selftrain.ops.boxes import iou

# Pseudo labels beyond these limits deserve a second look.
MIN_IMAGES_WITH_LABELS = 0.05  # fraction of the images that keep a box
MAX_BOXES_ABOVE_THRESHOLD = 0.95  # fraction of the boxes that are kept
MAX_DUPLICATES = 0.1  # fraction of the kept boxes that lie on a better box of another class


class BoxLabelStatistics(LabelStatistics):
    """What the student will see of pseudo boxes: those whose score is above the threshold.

    Besides the entries of `LabelStatistics`, `result` has `stored_boxes`, `boxes` (those kept),
    `boxes_per_image`, `boxes_per_class`, `double_boxes` (see `duplicates`), `empty_share` (fraction
    of the images that keep no box), `score_histogram` (20 bins over 0 to 1) and `largest_score`;
    with held-back labels also `precision` and `recall` at IoU 0.5.
    """

    unit = "box"

    def __init__(
        self,
        source: PseudoConfig,
        num_classes: int,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> None:
        super().__init__(source, num_classes, class_names, human)
        # In float32 as the scores, so that the same boxes are kept as by the student.
        self.thresholds = np.array(source.thresholds(num_classes), "float32")
        self.empty = self.correct = self.truth = self.duplicates = 0
        self.scores: list[float] = []

    def labels_of(self, record: ImageRecord) -> dict[int, int]:
        """`{class id: number}` of the boxes of a record; crowds are not objects."""
        return count_classes(record.classes[~record.is_crowd])

    def add(self, record: ImageRecord, truth: ImageRecord) -> None:
        """Adds a pseudo-labeled record, and the same image with held-back labels or without any.

        Raises:
            UserError: if a class id is beyond the task's classes.
        """
        check_class(record, max(record.classes, default=0), self.num_classes)
        keep = record.scores > self.thresholds[record.classes]
        boxes, classes, scores = record.boxes[keep], record.classes[keep], record.scores[keep]
        self.images += 1
        self.empty += not keep.any()
        self.scores.extend(record.scores.tolist())
        self.kept.update(count_classes(classes))
        self.duplicates += duplicates(boxes, classes, scores)
        self.truth += int((~truth.is_crowd).sum())
        self.correct += matches(boxes, classes, truth)

    def counts(self) -> dict[str, Any]:
        """The entries of `result` about the boxes themselves."""
        images = max(self.images, 1)
        histogram, _ = np.histogram(self.scores, bins=20, range=(0, 1))
        return {
            "stored_boxes": len(self.scores),
            "boxes": self.kept.total(),
            "boxes_per_image": self.kept.total() / images,
            "boxes_per_class": self.kept_by_name(),
            "double_boxes": self.duplicates,
            "empty_share": self.empty / images,
            "score_histogram": histogram.tolist(),
            "largest_score": max(self.scores, default=0.0),
        }

    def warnings(self) -> list[str]:
        """Sentences about too few boxes, scores that do not separate, and duplicates."""
        stored, kept = len(self.scores), self.kept.total()
        with_labels = 1 - self.empty / max(self.images, 1)
        warnings = []
        if self.images and with_labels < MIN_IMAGES_WITH_LABELS:
            warnings.append(
                f"only {with_labels:.1%} of images keep a box above {self.threshold}: the student "
                "learns mostly background; is the teacher trained, is the threshold too high?"
            )
        # With one box or fewer per image, high scores are nothing unusual.
        if stored > self.images and kept / stored > MAX_BOXES_ABOVE_THRESHOLD:
            warnings.append(
                f"{kept / stored:.0%} of all boxes are above {self.threshold}: the scores do not "
                "separate good boxes from bad ones; is the threshold too low?"
            )
        if kept and self.duplicates / kept > MAX_DUPLICATES:
            warnings.append(
                f"{self.duplicates} of {kept} boxes ({self.duplicates / kept:.0%}) lie on a better "
                "box of another class: one object with two labels; a higher pseudo.score_threshold "
                "leaves fewer"
            )
        return warnings

    def quality(self) -> dict[str, float]:
        """Precision and recall at IoU 0.5; empty without held-back labels."""
        if not self.truth:
            return {}
        kept = self.kept.total()
        precision = self.correct / kept if kept else 0.0
        return {"precision": precision, "recall": self.correct / self.truth}


def box_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A result of `BoxLabelStatistics` as (name, text), for the report."""
    rows = [
        ("images", str(result["images"])),
        (f"boxes above {result['threshold']}", str(result["boxes"])),
        ("boxes per image", f"{result['boxes_per_image']:.2f}"),
        ("images without a box", f"{result['empty_share']:.1%}"),
        # The report of an old run may be written again from statistics without this entry.
        ("boxes on a better box of another class", str(result.get("double_boxes", ""))),
        *((name, str(count)) for name, count in result["boxes_per_class"].items()),
    ]
    if "precision" in result:
        rows += [(f"{key} at IoU 0.5", f"{result[key]:.1%}") for key in ("precision", "recall")]
    return rows


def matches(
    boxes: np.ndarray, classes: np.ndarray, truth: ImageRecord, threshold: float = 0.5
) -> int:
    """Number of boxes that match a true box of their class.

    Each true box is matched once, by the best box that reaches it; crowds are never matched.

    Args:
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image, by falling score.
        classes: `[N]` class ids.
        truth: the image with its true boxes.
        threshold: smallest IoU of a match.
    """
    free = ~truth.is_crowd
    count = 0
    for overlap, label in zip(iou(boxes[:, None], truth.boxes), classes, strict=True):
        candidates = np.where(free & (truth.classes == label), overlap, 0)
        if candidates.size and candidates.max() >= threshold:
            free[candidates.argmax()] = False
            count += 1
    return count


def duplicates(
    boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, threshold: float = 0.5
) -> int:
    """Number of boxes that overlap a better box of another class.

    Non-maximum suppression runs per class, so one object may keep a box of each of several classes.

    Args:
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image.
        classes: `[N]` class ids.
        scores: `[N]`.
        threshold: boxes with an IoU above it overlap.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order], classes[order]
    others = np.tri(len(boxes), k=-1, dtype=bool) & (classes[:, None] != classes)
    return int(((iou(boxes[:, None], boxes) > threshold) & others).any(axis=1).sum())

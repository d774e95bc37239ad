"""How good pseudo boxes are: counts, histogram, and precision and recall where truth is known."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from official_selftrain.config import PseudoConfig
from official_selftrain.data.predictions import Detections
from official_selftrain.data.records import ImageRecord
from official_selftrain.evaluation.label_statistics import (
    ENOUGH,
    LabelStatistics,
    check_class,
    class_rows,
    count_classes,
    display_names,
    threshold_text,
)
from official_selftrain.evaluation.thresholds import LOWEST, THRESHOLDS, ScoreCounts
from official_selftrain.ops.boxes import iou

# Pseudo labels beyond these limits deserve a second look.
MIN_IMAGES_WITH_LABELS = 0.05  # fraction of the images that keep a box
MAX_BOXES_ABOVE_THRESHOLD = 0.95  # fraction of the boxes that are kept
MAX_DUPLICATES = 0.1  # fraction of the kept boxes that lie on a better box of another class
# Boxes per image, relative to those of the human labels.
FEW_BOXES, MANY_BOXES = 1 / 3, 3.0
LOWEST_DENSITY = 0.1  # a teacher that finds a class too rarely has hardly any right box below it


class BoxLabelStatistics(LabelStatistics):
    """What the student will see of pseudo boxes: those whose score is above the threshold.

    Besides the entries of `LabelStatistics`, `result` has `stored_boxes`, `boxes` (those kept),
    `boxes_per_image`, `boxes_per_class`, `suppressed_boxes` (those that
    `pseudo.agnostic_nms_iou` has dropped), `double_boxes` (see `duplicates`), `empty_share`
    (fraction of the images that keep no box), `score_histogram` (20 bins over 0 to 1) and
    `largest_score`; with held-back labels also `precision` and `recall` at IoU 0.5.
    """

    unit = "box"
    first_class = 1

    def __init__(
        self,
        source: PseudoConfig,
        num_classes: int,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> None:
        super().__init__(source, num_classes, class_names, human)
        self.source = source
        self.empty = self.correct = self.truth = self.duplicates = self.suppressed = 0
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
        confident, keep = kept_boxes(record, self.source, self.num_classes)
        boxes, classes, scores = record.boxes[keep], record.classes[keep], record.scores[keep]
        self.images += 1
        self.empty += not keep.any()
        self.scores.extend(record.scores.tolist())
        self.kept.update(count_classes(classes))
        self.suppressed += int((confident & ~keep).sum())
        self.duplicates += duplicates(boxes, classes, scores)
        self.truth += int((~truth.is_crowd).sum())
        self.correct += int(matches(boxes, classes, truth).sum())

    def counts(self) -> dict[str, Any]:
        """The entries of `result` about the boxes themselves."""
        images = max(self.images, 1)
        histogram, _ = np.histogram(self.scores, bins=20, range=(0, 1))
        return {
            "stored_boxes": len(self.scores),
            "boxes": self.kept.total(),
            "boxes_per_image": self.kept.total() / images,
            "boxes_per_class": self.kept_by_name(),
            "suppressed_boxes": self.suppressed,
            "double_boxes": self.duplicates,
            "empty_share": self.empty / images,
            "score_histogram": histogram.tolist(),
            "largest_score": max(self.scores, default=0.0),
        }

    def warnings(self) -> list[str]:
        """Sentences about too few or too many boxes, scores that do not tell, and duplicates."""
        stored, kept = len(self.scores), self.kept.total()
        with_labels = 1 - self.empty / max(self.images, 1)
        warnings = self._rate_warnings()
        if self.images and with_labels < MIN_IMAGES_WITH_LABELS:
            warnings.append(
                f"only {with_labels:.1%} of images keep a box above {self.limits_text}: the "
                "student learns mostly background; is the teacher trained, is the threshold too "
                "high?"
            )
        # With one box or fewer per image, high scores are nothing unusual.
        if stored > self.images and kept / stored > MAX_BOXES_ABOVE_THRESHOLD:
            warnings.append(
                f"{kept / stored:.0%} of all boxes are above {self.limits_text}: the scores do not "
                "separate good boxes from bad ones; is the threshold too low?"
            )
        if kept and self.duplicates / kept > MAX_DUPLICATES:
            warnings.append(
                f"{self.duplicates} of {kept} boxes ({self.duplicates / kept:.0%}) lie on a better "
                "box of another class: one object with two labels; pseudo.agnostic_nms_iou=0.5 "
                "drops them"
            )
        return warnings

    def _rate_warnings(self):
        """A sentence if the boxes per image are far from those of the human labels."""
        kept, expected = self.kept.total(), self.human_per_image() * self.images
        if not self.images or max(kept, expected) < ENOUGH or not expected:
            return []
        ratio = kept / expected
        if FEW_BOXES <= ratio <= MANY_BOXES:
            return []
        what, mend = ("background", "lower") if ratio < 1 else ("objects that are none", "raise")
        return [
            f"{kept / self.images:.2f} boxes per image, but {self.human_per_image():.2f} in the "
            f"human labels: the student learns {what}; {mend} pseudo.score_threshold (auto finds "
            "one for each class), or train the teacher longer"
        ]

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
        (f"boxes above {threshold_text(result)}", str(result["boxes"])),
        ("boxes per image", f"{result['boxes_per_image']:.2f}"),
        ("images without a box", f"{result['empty_share']:.1%}"),
        # The report of an old run may be written again from statistics without this entry.
        ("boxes on a better box of another class", str(result.get("double_boxes", ""))),
        ("boxes dropped for a better one of another class", str(result.get("suppressed_boxes", 0))),
        *class_rows(result, {n: str(count) for n, count in result["boxes_per_class"].items()}),
    ]
    if "precision" in result:
        rows += [(f"{key} at IoU 0.5", f"{result[key]:.1%}") for key in ("precision", "recall")]
    return rows


class BoxScores(ScoreCounts):
    """`ScoreCounts` of boxes, which are right if they match a true box at IoU 0.5.

    Args:
        source: the student's, whose suppression across classes applies.
        num_classes: number of classes, including the background.
    """

    def __init__(self, source: PseudoConfig, num_classes: int) -> None:
        super().__init__(num_classes, ENOUGH, first_class=1)
        self.agnostic_nms_iou = source.agnostic_nms_iou
        self.edges = THRESHOLDS.astype("float32")  # as the student compares them with scores

    def update(self, record: ImageRecord, prediction: Detections) -> None:
        """Counts the detections of one image; `record` holds its human labels."""
        keep = prediction.scores > LOWEST
        boxes, classes, scores = (
            values[keep] for values in (prediction.boxes, prediction.classes, prediction.scores)
        )
        if self.agnostic_nms_iou is not None:
            keep = best_of_object(boxes, classes, scores, self.agnostic_nms_iou)
            boxes, classes, scores = boxes[keep], classes[keep], scores[keep]
        bins = np.searchsorted(self.edges, scores.astype("float32"), side="left") - 1
        self.add(classes, bins, matches(boxes, classes, record))
        true = record.classes[~record.is_crowd]
        self.truth += np.bincount(true, minlength=len(self.truth))


def density_thresholds(
    pseudo: Iterable[ImageRecord],
    human: Iterable[ImageRecord],
    class_names: Mapping[int, str],
) -> dict[str, dict[str, Any]]:
    """Thresholds that keep as many boxes of each class in an image as the human labels have.

    Scores of different classes do not compare: a class with few or small objects gets low ones, and
    one threshold for all would starve it. Chen et al., "Label Matching Semi-Supervised Object
    Detection", CVPR 2022, choose thresholds in this way.

    Args:
        pseudo: records with all boxes of the teacher.
        human: the human-labeled records.
        class_names: `{class id: name}`.

    Returns:
        `{class name: {"class": id, "threshold": in [LOWEST_DENSITY, 0.99], "truth": human boxes}}`
        of the classes that have human boxes.
    """
    scores: dict[int, list[float]] = collections.defaultdict(list)
    images, human_images, truth = 0, 0, collections.Counter[int]()
    for record in pseudo:
        images += 1
        for label, score in zip(record.classes.tolist(), record.scores.tolist(), strict=True):
            scores[label].append(score)
    for record in human:
        human_images += 1
        truth.update(count_classes(record.classes[~record.is_crowd]))
    entries = {}
    for label, name in display_names(sorted(truth), class_names).items():
        expected = round(truth[label] * images / human_images)
        # The best box that is one too many, rounded up to a hundredth.
        surplus = sorted(scores[label], reverse=True)[expected : expected + 1] or [0.0]
        threshold = min(max(math.ceil(100 * surplus[0]) / 100, LOWEST_DENSITY), 0.99)
        entries[name] = {"class": label, "threshold": threshold, "truth": truth[label]}
    return entries


def kept_boxes(
    record: ImageRecord, source: PseudoConfig, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes of a pseudo label the student reads.

    Args:
        record: the pseudo label, whose class ids are below `num_classes`.
        source: thresholds, and suppression across classes.
        num_classes: number of classes, including the background.

    Returns:
        Two bool `[N]`: the boxes above their thresholds, and those of them that are kept.
    """
    # In float32 as the scores, so that the same boxes are kept as by the student.
    thresholds = np.array(source.thresholds(num_classes), "float32")
    confident = record.scores > thresholds[record.classes]
    keep = confident.copy()
    if source.agnostic_nms_iou is not None:
        rows = record.boxes[confident], record.classes[confident], record.scores[confident]
        keep[confident] = best_of_object(*rows, source.agnostic_nms_iou)
    return confident, keep


def best_of_object(
    boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, threshold: float
) -> np.ndarray:
    """Which boxes class-agnostic NMS keeps: those that lie on no better one of another class.

    The best box is kept first, and only boxes that are kept drop others. Boxes of one class do not
    drop each other, because the suppression within each class has been applied already.

    Args:
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image.
        classes: `[N]`.
        scores: `[N]`.
        threshold: boxes with an IoU above it are of one object.

    Returns:
        bool `[N]`.
    """
    drops = (iou(boxes[:, None], boxes) > threshold) & (classes[:, None] != classes)
    keep = np.ones(len(boxes), bool)
    # A box that is still kept at its turn lies on no better kept one, so it drops only worse ones.
    for box in np.argsort(-scores, kind="stable"):
        if keep[box]:
            keep &= ~drops[box]
    return keep


def matches(
    boxes: np.ndarray, classes: np.ndarray, truth: ImageRecord, threshold: float = 0.5
) -> np.ndarray:
    """Which boxes match a true box of their class, bool `[N]`.

    Each true box is matched once, by the best box that reaches it; crowds are never matched.

    Args:
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image, by falling score.
        classes: `[N]` class ids.
        truth: the image with its true boxes.
        threshold: smallest IoU of a match.
    """
    free = ~truth.is_crowd
    right = np.zeros(len(boxes), bool)
    for box, overlap in enumerate(iou(boxes[:, None], truth.boxes)):
        candidates = np.where(free & (truth.classes == classes[box]), overlap, 0)
        if candidates.size and candidates.max() >= threshold:
            free[candidates.argmax()] = False
            right[box] = True
    return right


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

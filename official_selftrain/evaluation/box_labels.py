"""How good pseudo boxes are: counts, histogram, precision and recall where truth is known."""

import collections

import numpy as np

from official_selftrain.evaluation.label_statistics import check_class, starved_classes

# What calls for a second look at pseudo labels.
MIN_IMAGES_WITH_LABELS = 0.05  # share of images with a box
MAX_BOXES_ABOVE_THRESHOLD = 0.95  # share of boxes above the threshold
MAX_DUPLICATES = 0.1  # share of boxes on a better box of another class


class BoxLabelStatistics:
    """What the student will see of pseudo boxes.

    Args:
        source: `config.PseudoConfig`; boxes above its thresholds are kept.
        num_classes: with the background.
        class_names: `{class id: name}`.
        human: some `ImageRecord`s with human labels, whose classes the pseudo labels are compared
            with.
    """

    def __init__(self, source, num_classes, class_names=None, human=()):
        self.num_classes = num_classes
        self.thresholds = np.array(source.thresholds(num_classes), "float32")
        self.threshold = source.score_threshold
        self.names = class_names or {}
        self.images = self.stored = self.empty = self.correct = self.truth = self.duplicates = 0
        self.scores, self.per_class = [], collections.Counter()
        self.human = collections.Counter()
        for record in human:
            self.human.update(record.classes[~record.is_crowd].tolist())

    def add(self, record, truth):
        """Adds a pseudo-labeled record and the same image with held-back labels, or with none.

        Raises:
            UserError: if a class id is beyond the task's classes.
        """
        check_class(record, max(record.classes, default=0), self.num_classes)
        keep = record.scores > self.thresholds[record.classes]
        self.images += 1
        self.stored += len(keep)
        self.empty += not keep.any()
        self.scores.extend(record.scores.tolist())
        self.per_class.update(record.classes[keep].tolist())
        self.duplicates += duplicates(record.boxes[keep], record.classes[keep], record.scores[keep])
        self.truth += int((~truth.is_crowd).sum())
        self.correct += matches(record.boxes[keep], record.classes[keep], truth)

    def result(self):
        """dict: `images`, `threshold`, `stored_boxes`, `boxes` (kept), `boxes_per_image`,
        `boxes_per_class`, `double_boxes` (see `duplicates`), `empty_share` (of images),
        `score_histogram` (20 bins of 0..1), `largest_score`, `warnings`; with held-back labels also
        `precision` and `recall` at IoU 0.5.
        """
        kept = sum(self.per_class.values())
        images = max(self.images, 1)
        share = 1 - self.empty / images
        warnings = []
        if self.images and share < MIN_IMAGES_WITH_LABELS:
            warnings.append(
                f"only {share:.1%} of images keep a box above {self.threshold}: the student "
                "learns mostly background; is the teacher trained, the threshold too high?"
            )
        if (
            self.stored
            and kept / self.stored > MAX_BOXES_ABOVE_THRESHOLD
            and self.stored > self.images
        ):
            warnings.append(
                f"{kept / self.stored:.0%} of all boxes are above {self.threshold}: scores that "
                "do not tell good from bad; is the threshold too low?"
            )
        if kept and self.duplicates / kept > MAX_DUPLICATES:
            warnings.append(
                f"{self.duplicates} of {kept} boxes ({self.duplicates / kept:.0%}) lie on a better "
                "box of another class: one object with two labels; a higher pseudo.score_threshold "
                "leaves fewer"
            )
        warnings += starved_classes(self.human, self.per_class, self.names)
        histogram, _ = np.histogram(self.scores, bins=20, range=(0, 1))
        per_class = sorted(self.per_class.items())
        result = {
            "images": self.images,
            "threshold": self.threshold,
            "stored_boxes": self.stored,
            "boxes": kept,
            "boxes_per_image": kept / images,
            "boxes_per_class": {self.names.get(k, str(k)): v for k, v in per_class},
            "double_boxes": self.duplicates,
            "empty_share": self.empty / images,
            "score_histogram": histogram.tolist(),
            "largest_score": max(self.scores, default=0.0),
            "warnings": warnings,
        }
        if self.truth:
            result["precision"] = self.correct / kept if kept else 0.0
            result["recall"] = self.correct / self.truth
        return result

    def error_message(self, result):
        """Why the labels are of no use at all, or None."""
        if result["boxes"]:
            return None
        return (
            f"the score threshold {self.threshold} keeps no box of {self.images} images; the "
            f"highest score is {result['largest_score']:.2f}. Lower pseudo.score_threshold, or "
            "train the teacher longer"
        )


def box_rows(result):
    """A result as (name, text) for people."""
    rows = [
        ("images", str(result["images"])),
        (f"boxes above {result['threshold']}", str(result["boxes"])),
        ("boxes an image", f"{result['boxes_per_image']:.2f}"),
        ("images left without a box", f"{result['empty_share']:.1%}"),
        ("boxes on a better box of another class", str(result.get("double_boxes", ""))),
        *((name, str(count)) for name, count in result["boxes_per_class"].items()),
    ]
    if "precision" in result:
        rows += [(f"{key} at IoU 0.5", f"{result[key]:.1%}") for key in ("precision", "recall")]
    return rows


def matches(boxes, classes, truth, threshold=0.5):
    """Number of boxes, best first, that match a true box of their class not matched before.

    Args:
        boxes: `[N, 4]` fractions, sorted by falling score.
        classes: `[N]`.
        truth: `ImageRecord`.
        threshold: smallest IoU.
    """
    free = ~truth.is_crowd.copy()
    count = 0
    for overlap, label in zip(_iou(boxes, truth.boxes), classes, strict=True):
        iou = np.where(free & (truth.classes == label), overlap, 0)
        if iou.size and iou.max() >= threshold:
            free[iou.argmax()] = False
            count += 1
    return count


def duplicates(boxes, classes, scores, threshold=0.5):
    """Number of boxes that overlap a better box of another class by an IoU above `threshold`.

    Suppression is class by class, so that one object may keep a box of each of several classes.

    Args:
        boxes: `[N, 4]` fractions.
        classes, scores: `[N]`.
        threshold: of the IoU.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order], classes[order]
    others = np.tri(len(boxes), k=-1, dtype=bool) & (classes[:, None] != classes)
    return int(((_iou(boxes, boxes) > threshold) & others).any(axis=1).sum())


def _iou(a, b):
    """IoU `[N, M]` of boxes `[N, 4]` and `[M, 4]`."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, 2:], b[:, 2:])
    overlap = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(x[:, 2:] - x[:, :2], axis=-1) for x in (a, b)]
    return overlap / np.maximum(areas[0][:, None] + areas[1] - overlap, 1e-12)

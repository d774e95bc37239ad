"""How good pseudo masks are: pixels kept, histogram, and agreement where truth is known."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from official_selftrain.config import PseudoConfig
from official_selftrain.data import png
from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.data.records import IGNORE_LABEL, ImageRecord
from official_selftrain.evaluation import miou
from official_selftrain.evaluation.label_statistics import (
    LabelStatistics,
    check_class,
    class_rows,
    count_classes,
    threshold_text,
)
from official_selftrain.evaluation.thresholds import THRESHOLDS, ScoreCounts
from official_selftrain.utils.errors import UserError

# Fractions of the pixels kept, below and above which the labels deserve a second look.
MIN_PIXELS_KEPT, MAX_PIXELS_KEPT = 0.05, 0.999
# Fraction of the labeled pixels that one class has in useless labels, and in human ones at most.
ONE_CLASS, ONE_CLASS_HUMAN = 0.995, 0.95
ENOUGH_PIXELS = 1000  # of a class, for a threshold of its own


def byte_limits(thresholds: Sequence[float]) -> np.ndarray:
    """int32 `[256]`: the smallest uint8 confidence that reaches the threshold of each class.

    Class ids without a threshold, such as 255 of ignored pixels, have the limit 0.
    """
    limits = np.zeros(256, "int32")
    limits[: len(thresholds)] = np.rint(255 * np.array(thresholds))
    return limits


class MaskScores(ScoreCounts):
    """`ScoreCounts` of pixels, which are right if they have the class of the human mask."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, ENOUGH_PIXELS)
        self.limits = byte_limits(THRESHOLDS.tolist())[: len(THRESHOLDS)]

    def update(self, record: ImageRecord, prediction: MaskPrediction) -> None:
        """Counts the pixels of one image that its human mask labels."""
        truth = np.asarray(png.decode(record.mask))
        known = truth != IGNORE_LABEL
        classes, truth = prediction.classes[known], truth[known]
        bins = np.searchsorted(self.limits, prediction.confidence[known], side="right") - 1
        self.add(classes, bins, classes == truth)
        self.truth += np.bincount(truth, minlength=len(self.truth))


class MaskLabelStatistics(LabelStatistics):
    """What the student will see of pseudo masks: pixels whose confidence reaches the threshold.

    Besides the entries of `LabelStatistics`, `result` has `pixels` (those kept), `ignored_share`
    (fraction of the pixels that are not), `ignored_images`, `pixels_per_class` (those kept) and
    `score_histogram` (20 bins over 0 to 1); with held-back labels also `mIoU` and `IoU/NAME` of the
    pixels kept, and `mIoU_all` of all pixels.
    """

    unit = "pixel"

    def __init__(
        self,
        source: PseudoConfig,
        num_classes: int,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> None:
        super().__init__(source, num_classes, class_names, human)
        self.limits = byte_limits(source.thresholds(num_classes))
        self.ignored_images = 0
        self.found: Counter[int] = Counter()
        self.histogram = np.zeros(20, "int64")
        # How much better the kept pixels are than all of them shows what the threshold is good for.
        self.metric = miou.SegmentationMetric(num_classes, class_names)
        self.all_pixels = miou.SegmentationMetric(num_classes, class_names)

    def labels_of(self, record: ImageRecord) -> dict[int, int]:
        """`{class id: number of pixels}` of the mask of a record, without ignored pixels."""
        if not record.mask:
            return {}
        counts = count_classes(np.asarray(png.decode(record.mask)))
        counts.pop(IGNORE_LABEL, None)
        return counts

    def add(self, record: ImageRecord, truth: ImageRecord) -> None:
        """Adds a pseudo-labeled record, and the same image with held-back labels or without any.

        Raises:
            UserError: if a mask is missing, or has a class id beyond the task's classes.
        """
        classes = check_mask(record, self.num_classes)
        if not record.confidence:
            raise UserError(
                f"image {record.name or record.image_id} has a mask without confidences; were its "
                "labels written by pseudo_label?"
            )
        confidence = np.asarray(png.decode(record.confidence))
        keep = confidence >= self.limits[classes]
        self.images += 1
        self.ignored_images += not keep.any()
        self.found.update(count_classes(classes))
        self.kept.update(count_classes(classes[keep]))
        # A confidence of 255 is probability 1, which belongs to the last bin.
        bins = np.minimum(confidence.astype(int) * 20 // 255, 19)
        self.histogram += np.bincount(bins.ravel(), minlength=20)
        if truth.mask:
            check_mask(truth, self.num_classes)
            self.all_pixels.update(truth, MaskPrediction(classes, confidence))
            self.metric.update(truth, MaskPrediction(classes, confidence), keep)

    def counts(self) -> dict[str, Any]:
        """The entries of `result` about the masks themselves."""
        total, kept = self.found.total(), self.kept.total()
        return {
            "pixels": kept,
            "ignored_share": 1 - kept / total if total else 0.0,
            "ignored_images": self.ignored_images,
            "pixels_per_class": self.kept_by_name(),
            "score_histogram": self.histogram.tolist(),
        }

    def warnings(self) -> list[str]:
        """Sentences about too few or too many pixels, and about classes that were lost."""
        total, kept = self.found.total(), self.kept.total()
        warnings = []
        if total and kept / total < MIN_PIXELS_KEPT:
            warnings.append(
                f"only {kept / total:.1%} of pixels reach probability {self.limits_text}: the "
                "student learns next to nothing; is the teacher trained, is the threshold too high?"
            )
        warnings += self._one_class_warnings()
        if total and kept / total > MAX_PIXELS_KEPT and self.limits.any():
            # The likeliest of C classes has at least the probability 1 / C.
            always = self.limits.max() <= 255 / self.num_classes + 0.5
            reason = f" (of {self.num_classes} classes one always has that much)" if always else ""
            warnings.append(
                f"the threshold {self.limits_text} ignores no pixel{reason}; is "
                "pseudo.score_threshold too low?"
            )
        lost = sorted(self.found.keys() - self.kept.keys())
        if lost and kept:
            names = ", ".join(self.names.get(label, str(label)) for label in lost[:5])
            warnings.append(f"no pixel is left of {len(lost)} classes that were found: {names}")
        return warnings

    def _one_class_warnings(self):
        """A sentence if nearly all labeled pixels are of one class, and human ones are not."""
        if not self.kept or not self.human:
            return []
        ((label, most),) = self.kept.most_common(1)
        found, human = most / self.kept.total(), self.human[label] / self.human.total()
        if found <= ONE_CLASS or human >= ONE_CLASS_HUMAN:
            return []
        return [
            f"{found:.2%} of the labeled pixels are {self.names.get(label, label)}, but "
            f"{human:.1%} of the human ones: the student unlearns all other classes; train the "
            "teacher longer, or lower their thresholds (pseudo.class_thresholds)"
        ]

    def quality(self) -> dict[str, float]:
        """`mIoU`, `pixel_accuracy` and `IoU/NAME` of the pixels kept, and `mIoU_all`."""
        if not self.metric.images:
            return {}
        return self.metric.result() | {"mIoU_all": self.all_pixels.result()["mIoU"]}


def mask_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A result of `MaskLabelStatistics` as (name, text), for the report."""
    rows = [
        ("images", str(result["images"])),
        (f"pixels ignored (below {threshold_text(result)})", f"{result['ignored_share']:.1%}"),
        ("images without a pixel kept", str(result["ignored_images"])),
    ]
    kept = max(result["pixels"], 1)
    shares = {n: f"{c / kept:.1%} of pixels" for n, c in result["pixels_per_class"].items()}
    rows += class_rows(result, shares)
    if "mIoU" in result:
        rows += [
            ("mIoU of the pixels kept", f"{100 * result['mIoU']:.1f}"),
            ("mIoU of all pixels", f"{100 * result['mIoU_all']:.1f}"),
        ]
    return rows


def check_mask(record: ImageRecord, num_classes: int) -> np.ndarray:
    """The mask of a record, uint8 `[H, W]`, after a check of its class ids; 255 is ignored.

    Raises:
        UserError: naming the record, if it has no mask or a class id not below `num_classes`.
    """
    if not record.mask:
        raise UserError(
            f"image {record.name or record.image_id} has no mask; segmentation needs one for every "
            "labeled image"
        )
    mask = np.asarray(png.decode(record.mask))
    check_class(record, int(np.where(mask == IGNORE_LABEL, 0, mask).max()), num_classes)
    return mask

"""How good pseudo masks are: pixels kept, histogram, agreement where truth is known."""

import io

import numpy as np
from PIL import Image

from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.evaluation import miou
from official_selftrain.evaluation.label_statistics import check_class, starved_classes
from official_selftrain.utils.errors import UserError

# Shares of pixels kept that call for a second look.
MIN_IMAGES_WITH_LABELS, ALL = 0.05, 0.999


def byte_limits(thresholds):
    """int32 `[256]`: the smallest uint8 confidence that reaches the threshold of each class."""
    limits = np.zeros(256, "int32")
    limits[: len(thresholds)] = np.rint(255 * np.array(thresholds))
    return limits


class MaskLabelStatistics:
    """What the student will see of pseudo masks.

    Args:
        source: `config.PseudoConfig`; pixels below its thresholds are ignored.
        num_classes: of the masks.
        class_names: `{class id: name}`.
        human: some `ImageRecord`s with human masks, whose classes the pseudo labels are compared
            with.
    """

    def __init__(self, source, num_classes, class_names=None, human=()):
        self.num_classes = num_classes
        self.limits = byte_limits(source.thresholds(num_classes))
        self.threshold = source.score_threshold
        self.names = class_names or {}
        self.images = self.ignored_images = 0
        self.pixels = np.zeros(256, "int64")
        self.kept = np.zeros(256, "int64")
        self.histogram = np.zeros(20, "int64")
        self.human = np.zeros(256, "int64")
        for record in human:
            if record.mask:
                pixels = np.asarray(open_png(record.mask))
                self.human += np.bincount(pixels.ravel(), minlength=256)
        self.metric = miou.SegmentationMetric(num_classes, class_names)
        self.all_pixels = miou.SegmentationMetric(num_classes, class_names)

    def add(self, record, truth):
        """Adds a pseudo-labeled record and the same image with held-back labels, or with none.

        Raises:
            UserError: if a mask is missing, or has a class id beyond the task's classes.
        """
        classes = check_mask(record, self.num_classes)
        if not record.confidence:
            raise UserError(
                f"image {record.name or record.image_id} has a mask without confidences; were its "
                "labels written by pseudo_label?"
            )
        confidence = np.asarray(open_png(record.confidence))
        keep = confidence >= self.limits[classes]
        self.images += 1
        self.ignored_images += not keep.any()
        self.pixels += np.bincount(classes.ravel(), minlength=256)
        self.kept += np.bincount(classes[keep], minlength=256)
        bins = np.minimum(confidence.astype(int) * 20 // 255, 19)
        self.histogram += np.bincount(bins.ravel(), minlength=20)
        if truth.mask:
            check_mask(truth, self.num_classes)
            self.all_pixels.update(truth, MaskPrediction(classes, confidence))
            self.metric.update(truth, MaskPrediction(classes, confidence), keep)

    def result(self):
        """dict: `images`, `threshold`, `ignored_share` (of pixels), `ignored_images`, `pixels` and
        `pixels_per_class` (kept), `score_histogram` (20 bins of 0..1), `warnings`; with held-back
        labels also `mIoU` of the kept pixels, `mIoU_all` of all, and `IoU/NAME`.
        """
        total = int(self.pixels.sum())
        kept = int(self.kept.sum())
        warnings = []
        if total and kept / total < MIN_IMAGES_WITH_LABELS:
            warnings.append(
                f"only {kept / total:.1%} of pixels reach probability {self.threshold}: the "
                "student learns next to nothing; is the teacher trained, the threshold too high?"
            )
        if total and kept / total > ALL and self.limits.any():
            always = self.threshold <= 1 / self.num_classes
            reason = f" (of {self.num_classes} classes one always has that much)" if always else ""
            warnings.append(
                f"the threshold {self.threshold} ignores no pixel{reason}; is "
                "pseudo.score_threshold too low?"
            )
        lost = [c for c in np.flatnonzero(self.pixels) if not self.kept[c]]
        if lost and kept:
            names = ", ".join(self.names.get(int(c), str(c)) for c in lost[:5])
            warnings.append(f"no pixel is left of {len(lost)} classes that were found: {names}")
        human = {int(c): int(self.human[c]) for c in np.flatnonzero(self.human[:IGNORE_LABEL])}
        left = {int(c): int(self.kept[c]) for c in np.flatnonzero(self.kept)}
        warnings += starved_classes(human, left, self.names)
        result = {
            "images": self.images,
            "threshold": self.threshold,
            "pixels": kept,
            "ignored_share": 1 - kept / total if total else 0.0,
            "ignored_images": self.ignored_images,
            "pixels_per_class": {self.names.get(c, str(c)): n for c, n in left.items()},
            "score_histogram": self.histogram.tolist(),
            "warnings": warnings,
        }
        if self.metric.images:
            result |= self.metric.result()
            result["mIoU_all"] = self.all_pixels.result()["mIoU"]
        return result

    def error_message(self, result):
        """Why the labels are of no use at all, or None."""
        if result["pixels"]:
            return None
        return (
            f"the threshold {self.threshold} keeps no pixel of {self.images} images. Lower "
            "pseudo.score_threshold, or train the teacher longer"
        )


def mask_rows(result):
    """A result as (name, text) for people."""
    rows = [
        ("images", str(result["images"])),
        (f"pixels ignored (below {result['threshold']})", f"{result['ignored_share']:.1%}"),
        ("images ignored altogether", str(result["ignored_images"])),
    ]
    kept = max(result["pixels"], 1)
    rows += [(n, f"{c / kept:.1%} of pixels") for n, c in result["pixels_per_class"].items()]
    if "mIoU" in result:
        rows += [
            ("mIoU of the pixels kept", f"{100 * result['mIoU']:.1f}"),
            ("mIoU of all pixels", f"{100 * result['mIoU_all']:.1f}"),
        ]
    return rows


def open_png(png):
    return Image.open(io.BytesIO(png))


def check_mask(record, num_classes):
    """The mask `[H, W]` of a record, after a check of its class ids; 255 is ignored.

    Raises:
        UserError: naming the record, if it has no mask or a class id beyond `num_classes`.
    """
    if not record.mask:
        raise UserError(
            f"image {record.name or record.image_id} has no mask; segmentation needs one for every "
            "labeled image"
        )
    mask = np.asarray(open_png(record.mask))
    check_class(record, int(np.where(mask == IGNORE_LABEL, 0, mask).max()), num_classes)
    return mask

"""Mean intersection over union of class maps, on the host."""

import io

import numpy as np
from PIL import Image

from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.evaluation.label_statistics import display_names
from official_selftrain.ops import resize


class SegmentationMetric:
    """Collects the confusion of classes over all pixels of all images.

    Args:
        num_classes: C.
        class_names: `{class id: name}` for the per-class results, or None.
    """

    def __init__(self, num_classes, class_names=None):
        self.class_names = {int(key): name for key, name in (class_names or {}).items()}
        self.confusion = np.zeros((num_classes, num_classes), "int64")  # rows are the truth
        self.images = 0

    def update(self, record, prediction, keep=None):
        """Adds an image: an `ImageRecord` with a mask and a `MaskPrediction` of it.

        A prediction of another size is compared with the truth resized to it.

        Args:
            record: the truth.
            prediction: has `classes` `[h, w]`.
            keep: bool `[h, w]`, pixels to count, or None for all.
        """
        truth = np.asarray(Image.open(io.BytesIO(record.mask)))
        truth = _nearest(truth, prediction.classes.shape)
        self.update_pixels(truth, prediction.classes, keep)

    def update_pixels(self, truth, found, keep=None):
        """Adds pixels: class ids of equal shape, 255 in the truth where ignored."""
        counted = truth != IGNORE_LABEL
        counted = counted if keep is None else counted & keep
        count = len(self.confusion)
        pairs = truth[counted].astype("int64") * count + found[counted]
        self.confusion += np.bincount(pairs, minlength=count**2).reshape(count, count)
        self.images += 1

    def merge(self, other):
        """Adds the pixels of another metric."""
        self.confusion += other.confusion
        self.images += other.images

    def result(self):
        """`mIoU`, the mean over classes that occur in truth or prediction; `pixel_accuracy`; and
        `IoU/NAME` of each class, -1 where there is no truth."""
        hits = np.diag(self.confusion)
        truth, found = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        union = truth + found - hits
        iou = hits / np.maximum(union, 1)
        values = {
            "mIoU": float(iou[union > 0].mean()) if union.any() else -1.0,
            "pixel_accuracy": float(hits.sum() / truth.sum()) if truth.any() else -1.0,
        }
        names = display_names(range(len(iou)), self.class_names)
        for label, value in enumerate(iou):
            values[f"IoU/{names[label]}"] = float(value) if truth[label] else -1.0
        return values


def _nearest(mask, shape):
    """A mask `[H, W]` resized to `shape` by TF1's nearest neighbor, as masks are for training."""
    if mask.shape == shape:
        return mask
    rows, columns = map(resize.nearest_indices, mask.shape, shape)
    return mask[rows[:, None], columns]

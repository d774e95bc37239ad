"""Mean intersection over union of class maps, on the host."""

from collections.abc import Mapping

import numpy as np

from official_selftrain.data import png
from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.data.records import IGNORE_LABEL, ImageRecord
from official_selftrain.evaluation.label_statistics import display_names
from official_selftrain.ops import resize


class SegmentationMetric:
    """Collects the confusion of classes over all pixels of all images.

    Args:
        num_classes: number of classes; ids start at 0.
        class_names: `{class id: name}` for the results of single classes, or None.
    """

    def __init__(self, num_classes: int, class_names: Mapping[int, str] | None = None) -> None:
        self.class_names = {int(key): name for key, name in (class_names or {}).items()}
        self.confusion = np.zeros((num_classes, num_classes), "int64")  # rows are the truth
        self.images = 0

    def update(
        self, record: ImageRecord, prediction: MaskPrediction, keep: np.ndarray | None = None
    ) -> None:
        """Adds an image.

        If the prediction has another size than the mask, the mask is resized to it.

        Args:
            record: the image with its true mask.
            prediction: of the image, with `classes` `[h, w]`.
            keep: bool `[h, w]`, the pixels to count; None counts all.
        """
        truth = np.asarray(png.decode(record.mask))
        truth = _nearest(truth, prediction.classes.shape)
        self.update_pixels(truth, prediction.classes, keep)

    def update_pixels(
        self, truth: np.ndarray, found: np.ndarray, keep: np.ndarray | None = None
    ) -> None:
        """Adds the pixels of an image.

        Args:
            truth: class ids `[H, W]`, 255 where ignored.
            found: predicted class ids `[H, W]`.
            keep: bool `[H, W]`, the pixels to count; None counts all.
        """
        counted = truth != IGNORE_LABEL
        counted = counted if keep is None else counted & keep
        count = len(self.confusion)
        # One number per (truth, prediction) pair, so that a single histogram counts them all.
        pairs = truth[counted].astype("int64") * count + found[counted]
        self.confusion += np.bincount(pairs, minlength=count**2).reshape(count, count)
        self.images += 1

    def merge(self, other: "SegmentationMetric") -> None:
        """Adds the pixels of another metric, such as that of another worker."""
        self.confusion += other.confusion
        self.images += other.images

    def result(self) -> dict[str, float]:
        """The metrics, in 0 to 1, or -1 where they are not defined.

        Returns:
            dict: `mIoU`, the mean over the classes that occur in the truth or in a prediction;
            `pixel_accuracy`; and `IoU/NAME` of each class, -1 if the truth does not have it.
        """
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


def _nearest(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask `[H, W]` resized to `shape` by TF1's nearest neighbor, as masks are for training."""
    if mask.shape == shape:
        return mask
    rows, columns = map(resize.nearest_indices, mask.shape, shape)
    return mask[rows[:, None], columns]

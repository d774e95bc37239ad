"""COCO average precision and mean intersection over union, on the host.

faster-coco-eval is used where it is installed: the same digits as pycocotools, 8 times faster.
"""

import contextlib
import functools
import io
import logging
import math

import numpy as np
from PIL import Image

from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.utils.errors import UserError

NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl",
)  # fmt: skip


class DetectionMetric:
    """Collects truth and detections of images; `result` computes the 12 COCO box metrics.

    Args:
        class_names: `{class id: name}` for the per-class results, or None.
    """

    def __init__(self, class_names=None):
        self.class_names = {int(key): name for key, name in (class_names or {}).items()}
        self._images, self._truth, self._found = [], [], []

    def update(self, record, detections):
        """Adds an image: an `ImageRecord` with the truth and what was detected in it."""
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "height": record.height, "width": record.width})
        for box, label, area, crowd in zip(
            _to_pixels(record.boxes, record),
            record.classes,
            record.areas,
            record.is_crowd,
            strict=True,
        ):
            self._truth.append(
                {
                    "id": len(self._truth) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
        rows = zip(
            _to_pixels(detections.boxes, record), detections.scores, detections.classes, strict=True
        )
        for box, score, label in rows:
            self._found.append(
                {
                    "image_id": image_id,
                    "category_id": int(label),
                    "bbox": box.tolist(),
                    "score": float(score),
                }
            )

    def merge(self, other):
        """Adds the images of another metric."""
        images, truth = len(self._images), len(self._truth)

        def moved(row):
            return row | {"image_id": row["image_id"] + images}

        self._images += [row | {"id": row["id"] + images} for row in other._images]
        self._truth += [moved(row) | {"id": row["id"] + truth} for row in other._truth]
        self._found += [moved(row) for row in other._found]

    def result(self):
        """`{metric: value}` with the AP of each class under `AP/NAME`; -1 where there is no truth.

        Values are finite, in [0, 1] or -1.
        """
        held = {row["category_id"] for row in self._truth}
        labels = sorted(held | {row["category_id"] for row in self._found} | set(self.class_names))
        if self._found and self._truth:
            stats, classes = self._evaluate(labels)
        else:  # the evaluators fail without detections
            stats = [0.0 if self._truth else -1.0] * len(NAMES)
            classes = {label: 0.0 if label in held else -1.0 for label in labels}
        values = dict(zip(NAMES, map(_finite, stats), strict=False))
        names = _names(labels, self.class_names)
        return values | {f"AP/{names[c]}": _finite(value) for c, value in classes.items()}

    def _evaluate(self, labels):
        """The 12 metrics in order, and `{class id: AP}`."""
        COCO, COCOeval = _evaluator()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a progress report
            truth = COCO()
            truth.dataset = {
                "info": {},
                "images": self._images,
                "annotations": self._truth,
                "categories": [{"id": label, "name": str(label)} for label in labels],
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(self._found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"]  # [IoU, recall, class, area, detections]
        classes = {}
        for index, label in enumerate(evaluation.params.catIds):
            of_class = precision[:, :, index, 0, -1]
            of_class = of_class[of_class > -1]
            classes[int(label)] = of_class.mean() if of_class.size else -1.0
        return evaluation.stats[: len(NAMES)], classes


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
        names = _names(range(len(iou)), self.class_names)
        for label, value in enumerate(iou):
            values[f"IoU/{names[label]}"] = float(value) if truth[label] else -1.0
        return values


def _names(labels, class_names):
    """`{class id: name}`, a name with its id where classes share it."""
    names = {label: class_names.get(label, str(label)) for label in labels}
    every = list(names.values())
    return {c: name if every.count(name) == 1 else f"{name} ({c})" for c, name in names.items()}


def _finite(value):
    """A float, -1 for what is not defined."""
    return float(value) if math.isfinite(value) else -1.0


def _nearest(mask, shape):
    """A mask `[H, W]` resized to `shape` by TF1's nearest neighbour, as masks are for training."""
    if mask.shape == shape:
        return mask
    index = [
        np.floor(np.arange(new, dtype="float32") * (np.float32(old) / np.float32(new))).astype(int)
        for old, new in zip(mask.shape, shape, strict=True)
    ]
    return mask[index[0][:, None], index[1]]


@functools.cache  # told once
def _evaluator():
    """The classes COCO and COCOeval of faster-coco-eval, or of pycocotools where it is absent or
    broken."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

        logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
        return COCO, COCOeval
    except ModuleNotFoundError:
        pass
    except Exception as error:  # a broken package raises anything
        logging.warning("faster_coco_eval is broken, pycocotools takes its place: %s", error)
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except Exception as error:
        raise UserError(
            f"pycocotools cannot be imported ({error}): pip install --force-reinstall pycocotools"
        ) from None
    return COCO, COCOeval


def _to_pixels(boxes, record):
    """COCO's (x, y, width, height) in pixels from fractions (ymin, xmin, ymax, xmax)."""
    ymin, xmin, ymax, xmax = np.moveaxis(np.asarray(boxes, "float64").reshape(-1, 4), 1, 0)
    x, y = xmin * record.width, ymin * record.height
    return np.stack([x, y, xmax * record.width - x, ymax * record.height - y], axis=-1)

"""COCO average precision, on the host.

faster-coco-eval is used where it is installed: the same digits as pycocotools, 8 times faster.
"""

import contextlib
import functools
import io
import logging
import math

import numpy as np

from official_selftrain.evaluation.label_statistics import display_names
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
        names = display_names(labels, self.class_names)
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


def _finite(value):
    """A float, -1 for what is not defined."""
    return float(value) if math.isfinite(value) else -1.0


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

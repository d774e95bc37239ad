"""COCO average precision, on the host.

faster-coco-eval is used if it is installed: it gives the same digits as pycocotools and is 8 times
faster.
"""

import contextlib
import functools
import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from official_selftrain.data.predictions import Detections
from official_selftrain.data.records import ImageRecord
from official_selftrain.evaluation.label_statistics import display_names
from official_selftrain.utils.errors import UserError

NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl",
    "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl",
)  # fmt: skip


class DetectionMetric:
    """Collects truth and detections of images; `result` computes the 12 COCO box metrics.

    Args:
        class_names: `{class id: name}` for the results of single classes, or None.
    """

    def __init__(self, class_names: Mapping[int, str] | None = None) -> None:
        self.class_names = {int(key): name for key, name in (class_names or {}).items()}
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def update(self, record: ImageRecord, detections: Detections) -> None:
        """Adds an image.

        Args:
            record: the image with its true boxes.
            detections: what was detected in it, in fractions of the image as well.
        """
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
                    "id": len(self._truth) + 1,  # the evaluators take a match with id 0 for none
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

    def merge(self, other: "DetectionMetric") -> None:
        """Adds the images of another metric, such as that of another worker."""
        # Each metric has counted its images and boxes from 1.
        images, truth = len(self._images), len(self._truth)

        def moved(row):
            return row | {"image_id": row["image_id"] + images}

        self._images += [row | {"id": row["id"] + images} for row in other._images]
        self._truth += [moved(row) | {"id": row["id"] + truth} for row in other._truth]
        self._found += [moved(row) for row in other._found]

    def result(self) -> dict[str, float]:
        """The metrics of all images added.

        Returns:
            `{metric: value}` with the 12 of `NAMES`, and the AP of each class under `AP/NAME`.
            Values are finite: in [0, 1], or -1 if there is no truth to compare with.
        """
        held = {row["category_id"] for row in self._truth}
        labels = sorted(held | {row["category_id"] for row in self._found} | set(self.class_names))
        if self._found and self._truth:
            stats, classes = self._evaluate(labels)
        else:  # the evaluators raise without detections
            stats = [0.0 if self._truth else -1.0] * len(NAMES)
            classes = {label: 0.0 if label in held else -1.0 for label in labels}
        values = dict(zip(NAMES, map(_finite, stats), strict=False))
        names = display_names(labels, self.class_names)
        return values | {f"AP/{names[c]}": _finite(value) for c, value in classes.items()}

    def _evaluate(self, labels: list[int]) -> tuple[Sequence[float], dict[int, float]]:
        """The 12 metrics in the order of `NAMES`, and `{class id: AP}`."""
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
            of_class = of_class[of_class > -1]  # -1 where there is no truth
            classes[int(label)] = of_class.mean() if of_class.size else -1.0
        return evaluation.stats[: len(NAMES)], classes


def _finite(value: float) -> float:
    """The value as a Python float, -1 if it is not defined."""
    return float(value) if math.isfinite(value) else -1.0


@functools.cache  # a broken package is reported once
def _evaluator() -> tuple[Any, Any]:
    """The classes COCO and COCOeval of faster-coco-eval, or of pycocotools if that fails.

    Raises:
        UserError: if neither can be imported.
    """
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

        logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
        return COCO, COCOeval
    except ModuleNotFoundError:
        pass
    except Exception as error:  # a broken package raises anything
        logging.warning("faster_coco_eval is broken, pycocotools is used instead: %s", error)
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except Exception as error:
        raise UserError(
            f"pycocotools cannot be imported ({error}): pip install --force-reinstall pycocotools"
        ) from None
    return COCO, COCOeval


def _to_pixels(boxes: np.ndarray, record: ImageRecord) -> np.ndarray:
    """COCO's `[N, 4]` (x, y, width, height) in pixels from (ymin, xmin, ymax, xmax) fractions."""
    ymin, xmin, ymax, xmax = np.moveaxis(np.asarray(boxes, "float64").reshape(-1, 4), 1, 0)
    x, y = xmin * record.width, ymin * record.height
    return np.stack([x, y, xmax * record.width - x, ymax * record.height - y], axis=-1)

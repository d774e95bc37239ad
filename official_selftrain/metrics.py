"""COCO average precision, on the host.

faster-coco-eval is used where it is installed: the same digits as pycocotools, 8 times faster.
"""

import contextlib
import io
import logging

import numpy as np

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

    def result(self):
        """`{metric: value}` with AP of each class under `AP/NAME`; -1 where there is no truth."""
        labels = {row["category_id"] for row in self._truth + self._found}
        labels = sorted(labels | set(self.class_names))
        if not self._found or not self._truth:
            empty = 0.0 if self._truth else -1.0
            return dict.fromkeys(NAMES, empty)
        evaluation = self._evaluate(labels)
        values = {name: float(value) for name, value in zip(NAMES, evaluation.stats, strict=False)}
        precision = evaluation.eval["precision"]  # [IoU, recall, class, area, detections]
        for index, label in enumerate(evaluation.params.catIds):
            of_class = precision[:, :, index, 0, -1]
            of_class = of_class[of_class > -1]
            name = self.class_names.get(int(label), str(label))
            values[f"AP/{name}"] = float(of_class.mean()) if of_class.size else -1.0
        return values

    def _evaluate(self, labels):
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
        return evaluation


def _evaluator():
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

        logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    except ModuleNotFoundError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    return COCO, COCOeval


def _to_pixels(boxes, record):
    """COCO's (x, y, width, height) in pixels from fractions (ymin, xmin, ymax, xmax)."""
    ymin, xmin, ymax, xmax = np.moveaxis(np.asarray(boxes, "float64").reshape(-1, 4), 1, 0)
    x, y = xmin * record.width, ymin * record.height
    return np.stack([x, y, xmax * record.width - x, ymax * record.height - y], axis=-1)

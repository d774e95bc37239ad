"""The teacher: a trained model turns images into pseudo-labelled records, and reports on them.

All scores above the detector's low floor are stored; the threshold is applied where labels are
read, so it can be changed without running the teacher again (paper section 3.2, point 3).
"""

import dataclasses
import logging
import pathlib

import numpy as np
from tqdm import tqdm

from official_selftrain.data import inputs, records
from official_selftrain.errors import UserError

FEW, MANY = 0.05, 0.95  # shares of images with a box that call for a second look


def predict(task, model, files, batch_size, title="predict", total=None):
    """Yields (record, prediction) for every image of TFRecord files, in order.

    Args:
        task: see `tasks`.
        model: the trained network.
        files: TFRecord files.
        batch_size: images per call.
        title, total: of the progress bar; `total` images, None if unknown.
    """
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(images, labels):
        return task.predict(model, images, labels)

    stream = records.read(files)
    dataset = inputs.prediction_dataset(files, task.parser(), batch_size)
    with tqdm(total=total, desc=title, unit="image") as progress:
        for images, labels, count in dataset:
            count = int(count)
            for prediction in task.predictions(step(images, labels), count):
                yield next(stream), prediction
            progress.update(count)


def label(task, model, files, folder, batch_size, teacher):
    """Writes one pseudo-labelled shard for each shard of images; finished shards are kept.

    Labels that the images may have are not passed on.

    Args:
        task, model, files, batch_size: as in `predict`.
        folder: where `pseudo-*.tfrecord` are written.
        teacher: name stored in the records.

    Returns:
        The files written, one for each of `files`.
    """
    written = []
    for index, file in enumerate(files):
        output = str(pathlib.Path(folder) / f"pseudo-{index:05d}.tfrecord")
        written.append(output)
        if pathlib.Path(output).exists():
            logging.info("%s is labelled already", file)
            continue
        title = f"label {index + 1}/{len(files)}"
        labelled = predict(task, model, [file], batch_size, title)
        records.write(output, (task.to_record(r, p, teacher) for r, p in labelled))
    return written


def report(files, truth_files, threshold, class_names=None):
    """What the student will see of pseudo labels at a threshold.

    Args:
        files: pseudo-labelled TFRecords.
        truth_files: the same images with held-back labels, or with none.
        threshold: scores above it are kept.
        class_names: `{class id: name}`.

    Returns:
        dict: `images`, `stored_boxes`, `boxes` (kept), `boxes_per_image`, `boxes_per_class`,
        `empty_share` (of images), `score_histogram` (20 bins of 0..1), `largest_score`; with
        held-back labels also `precision` and `recall` at IoU 0.5; and `warnings`.

    Raises:
        UserError: if the threshold keeps nothing at all.
    """
    tally = _Tally(threshold)
    for record, truth in zip(records.read(files), records.read(truth_files), strict=True):
        tally.add(record, truth)
    result = tally.result({int(k): v for k, v in (class_names or {}).items()})
    if not result["boxes"]:
        raise UserError(
            f"the score threshold {threshold} keeps no box of {result['images']} images; the "
            f"highest score is {result['largest_score']:.2f}. Lower pseudo.score_threshold, or "
            "train the teacher longer"
        )
    for warning in result["warnings"]:
        logging.warning("PSEUDO LABELS: %s", warning)
    return result


@dataclasses.dataclass
class _Tally:
    threshold: float
    images: int = 0
    stored: int = 0
    empty: int = 0
    scores: list = dataclasses.field(default_factory=list)
    per_class: dict = dataclasses.field(default_factory=dict)
    correct: int = 0
    truth: int = 0

    def add(self, record, truth):
        keep = record.scores > self.threshold
        self.images += 1
        self.stored += len(keep)
        self.empty += not keep.any()
        self.scores.extend(record.scores.tolist())
        for label in record.classes[keep].tolist():
            self.per_class[label] = self.per_class.get(label, 0) + 1
        self.truth += int((~truth.is_crowd).sum())
        self.correct += matches(record.boxes[keep], record.classes[keep], truth)

    def result(self, names):
        kept = sum(self.per_class.values())
        share = 1 - self.empty / self.images
        warnings = []
        if share < FEW:
            warnings.append(
                f"only {share:.1%} of images keep a box above {self.threshold}: the student "
                "learns mostly background; is the teacher trained, the threshold too high?"
            )
        if self.stored and kept / self.stored > MANY and self.stored > self.images:
            warnings.append(
                f"{kept / self.stored:.0%} of all boxes are above {self.threshold}: scores that "
                "do not tell good from bad; is the threshold too low?"
            )
        histogram, _ = np.histogram(self.scores, bins=20, range=(0, 1))
        result = {
            "images": self.images,
            "threshold": self.threshold,
            "stored_boxes": self.stored,
            "boxes": kept,
            "boxes_per_image": kept / self.images,
            "boxes_per_class": {names.get(k, str(k)): v for k, v in sorted(self.per_class.items())},
            "empty_share": self.empty / self.images,
            "score_histogram": histogram.tolist(),
            "largest_score": max(self.scores, default=0.0),
            "warnings": warnings,
        }
        if self.truth:
            result["precision"] = self.correct / kept if kept else 0.0
            result["recall"] = self.correct / self.truth
        return result


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
    for box, label in zip(boxes, classes, strict=True):
        low = np.maximum(box[:2], truth.boxes[:, :2])
        high = np.minimum(box[2:], truth.boxes[:, 2:])
        overlap = np.prod(np.maximum(high - low, 0), axis=1)
        areas = np.prod(truth.boxes[:, 2:] - truth.boxes[:, :2], axis=1)
        union = np.prod(box[2:] - box[:2]) + areas - overlap
        iou = np.where(free & (truth.classes == label), overlap / np.maximum(union, 1e-12), 0)
        if iou.size and iou.max() >= threshold:
            free[iou.argmax()] = False
            count += 1
    return count

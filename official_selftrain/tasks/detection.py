"""Object detection with RetinaNet: labels, loss, predictions and pseudo labels."""

import numpy as np
from keras import ops

from official_selftrain.config import DetectionConfig, changed
from official_selftrain.data.predictions import Detections
from official_selftrain.evaluation import coco
from official_selftrain.evaluation.box_labels import BoxLabelStatistics, box_rows
from official_selftrain.evaluation.label_statistics import check_class
from official_selftrain.models import build_detector
from official_selftrain.ops import anchors as anchor_ops
from official_selftrain.ops import boxes as box_ops
from official_selftrain.ops import losses, nms


class DetectionTask:
    """RetinaNet.

    Labels are a dict: `boxes` `[M, 4]` in pixels of the network input, `classes` `[M]` int32 and
    `scores` `[M]`, all -1 where padded, and `image_info` `[4, 2]` as in `geometry.plan_resize`.

    Args:
        config: `DetectionConfig` with `num_classes` set; None takes the defaults.
        changes: fields of it in place of those of `config`.

    Raises:
        UserError: for a field that does not exist or a value that is out of range.
    """

    headline = "AP"  # the metric that tells which weights are best

    def __init__(self, config=None, **changes):
        self.config = config or DetectionConfig()
        if changes:
            self.config = changed(self.config, **changes)
        self.anchors = anchor_ops.anchor_boxes(
            self.config.image_size, anchor_size=self.config.anchor_size
        )
        self.nms_settings = self.config.nms.model_dump()

    def build_model(self):
        return build_detector(self.config)

    def inference_model(self, model):
        """The network that `predict` needs: `model`."""
        return model

    def parser(self, source=None, training=False):
        """A function (decoded example, seed `[2]`) -> (image, labels) for `data.inputs`.

        Args:
            source: `config.InputConfig` whose augmentation and score threshold apply in training.
            training: crowds are dropped and the image is augmented; otherwise it is only fitted.
        """
        import tensorflow as tf

        from official_selftrain.data.augmentation import geometry, image_ops

        size, max_boxes = self.config.image_size, self.config.max_instances
        pseudo = training and hasattr(source, "thresholds")
        if pseudo:
            thresholds = tf.constant(source.thresholds(self.config.num_classes), tf.float32)
        augmentation = geometry.Augmentation(source, size) if training else None

        def pad(values, value=-1):
            values = values[:max_boxes]
            padding = [[0, max_boxes - tf.shape(values)[0]]] + [[0, 0]] * (len(values.shape) - 1)
            padded = tf.pad(values, padding, constant_values=value)
            return tf.ensure_shape(padded, [max_boxes, *values.shape[1:]])

        def parse(example, seed):
            scene = {"image": example["image"], "boxes": example["boxes"]}
            if training:
                scene = augmentation(scene, seed)
            else:
                scene = geometry.fit(
                    scene, geometry.plan_resize(tf.shape(scene["image"])[:2], size)
                )
            keep = image_ops.non_empty(scene["boxes"])
            if training:
                keep = tf.logical_and(keep, tf.logical_not(example["is_crowd"]))
            if pseudo:
                needed = _thresholds_of(example["classes"], thresholds)
                keep = tf.logical_and(keep, example["scores"] > needed)
            labels = {
                "boxes": pad(scene["boxes"][keep]),
                "classes": pad(example["classes"][keep]),
                "scores": pad(example["scores"][keep]),
                "image_info": scene["image_info"],
            }
            return tf.ensure_shape(scene["image"], [*size, 3]), labels

        return parse

    def check_record(self, record):
        """Checks that the boxes of a record are of the task's classes.

        Raises:
            UserError: naming the record and the class id.
        """
        check_class(record, max(record.classes, default=0), self.config.num_classes)

    def make_record_filter(self, source):
        """A function serialized example -> bool: a box is above the thresholds of `source`."""
        import tensorflow as tf

        thresholds = tf.constant(source.thresholds(self.config.num_classes), tf.float32)

        def keep(serialized):
            features = {
                "image/object/score": tf.io.VarLenFeature(tf.float32),
                "image/object/class/label": tf.io.VarLenFeature(tf.int64),
            }
            values = tf.io.parse_single_example(serialized, features)
            classes = tf.cast(values["image/object/class/label"].values, tf.int32)
            needed = _thresholds_of(classes, thresholds)
            return tf.reduce_any(values["image/object/score"].values > needed)

        return keep

    def loss_sums(self, outputs, labels):
        """Sums of the losses over a batch, and the number of positive anchors.

        The loss is the sum divided by `normalizer(count)`, the count being that of the global batch
        of this source, so an image or a whole source without boxes is legal.

        Returns:
            dict of scalars `class`, `box` and `total` = class + weight * box; and a scalar.
        """
        targets = anchor_ops.assign(self.anchors, labels["boxes"], labels["classes"])
        return self.loss_sums_of_targets(outputs, *targets)

    def loss_sums_of_targets(self, outputs, class_targets, box_targets, positives):
        """`loss_sums` after matching; arguments are what `anchors.assign` returns."""
        config = self.config
        class_sum, box_sum = losses.detection_loss_sums(
            ops.cast(outputs["class_logits"], "float32"),
            ops.cast(outputs["box_deltas"], "float32"),
            class_targets,
            box_targets,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
            delta=config.huber_delta,
        )
        box_sum = box_sum / 4.0
        total = class_sum + config.box_weight * box_sum
        return {"class": class_sum, "box": box_sum, "total": total}, ops.sum(positives)

    def normalizer(self, count):
        """1 + the positive anchors (released code)."""
        return 1.0 + count

    def label_density(self, labels):
        """Mean number of labeled objects per image of a batch."""
        present = ops.cast(labels["classes"] >= 0, "float32")
        return ops.mean(ops.sum(present, axis=-1))

    def predict(self, model, images, labels):
        """Detections of a batch as arrays, in fractions of the original image.

        Args:
            model: a `RetinaNet`.
            images: `[B, S, S, 3]` normalized.
            labels: dict with `image_info` `[B, 4, 2]`.

        Returns:
            dict: `boxes` `[B, D, 4]`, `scores` `[B, D]` (-1 in empty slots), `classes` `[B, D]`.
        """
        boxes, scores = self.decode(model(images, training=False), labels["image_info"])
        boxes, scores, classes = nms.class_wise_nms(boxes, scores, **self.nms_settings)
        size, _, scale, _ = (labels["image_info"][:, row] for row in range(4))
        whole = ops.concatenate([size * scale] * 2, axis=-1)[:, None, :]
        return {
            "boxes": ops.clip(boxes / whole, 0.0, 1.0),
            "scores": scores,
            "classes": classes + 1,
        }

    def decode(self, outputs, image_info):
        """All boxes before suppression, `[B, R, 4]` in pixels of the network input, inside the
        image, and their scores `[B, R, C - 1]` without the background."""
        scores = ops.sigmoid(ops.cast(outputs["class_logits"], "float32"))[..., 1:]
        boxes = box_ops.decode(ops.cast(outputs["box_deltas"], "float32"), self.anchors)
        return box_ops.clip(boxes, image_info[:, 1]), scores

    def predictions(self, arrays, count):
        """`Detections` of the first `count` images of what `predict` returned."""
        boxes, scores, classes = (np.asarray(arrays[k]) for k in ("boxes", "scores", "classes"))
        found = []
        for image in range(count):
            # The released decoding may turn a box of less than a pixel inside out.
            sides = boxes[image][:, 2:] - boxes[image][:, :2]
            keep = (scores[image] > nms.NO_SCORE) & (sides > 0).all(axis=-1)
            found.append(Detections(boxes[image][keep], scores[image][keep], classes[image][keep]))
        return found

    def metric(self, class_names=None):
        return coco.DetectionMetric(class_names)

    def to_record(self, record, detections, teacher):
        """The record with the teacher's labels instead of its own; every score is kept."""
        return record.relabeled(
            teacher,
            boxes=detections.boxes,
            classes=detections.classes,
            scores=detections.scores,
        )

    def label_statistics(self, source, class_names=None, human=()):
        """Collects pseudo labels for their report; see `BoxLabelStatistics`."""
        return BoxLabelStatistics(source, self.config.num_classes, class_names, human)

    def label_rows(self, result):
        """A result of `BoxLabelStatistics` as (name, text) for people."""
        return box_rows(result)


def _thresholds_of(classes, thresholds):
    """The threshold of each box; `check_record` tells which record has an unknown class."""
    import tensorflow as tf

    known = tf.debugging.assert_less(
        classes, tf.size(thresholds), "a class id is beyond task.num_classes"
    )
    with tf.control_dependencies([known]):
        return tf.gather(thresholds, classes)

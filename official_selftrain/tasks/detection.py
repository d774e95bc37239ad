"""Object detection with RetinaNet: labels, loss, predictions and pseudo labels."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from official_selftrain.config import Config, DetectionConfig, InputConfig, PseudoConfig, changed
from official_selftrain.data import records
from official_selftrain.data.predictions import Detections
from official_selftrain.data.prepared import PreparedData
from official_selftrain.data.records import ImageRecord
from official_selftrain.evaluation import coco
from official_selftrain.evaluation.box_labels import (
    BoxLabelStatistics,
    BoxScores,
    best_of_object,
    box_rows,
    density_thresholds,
    kept_boxes,
)
from official_selftrain.evaluation.label_statistics import check_class
from official_selftrain.models import build_detector
from official_selftrain.ops import anchors as anchor_ops
from official_selftrain.ops import boxes as box_ops
from official_selftrain.ops import losses, nms
from official_selftrain.tasks import multiscale
from official_selftrain.tasks.base import Labels
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import Tensor


class DetectionTask:
    """A task whose labels are boxes, learned by a RetinaNet; the methods are those of `base.Task`.

    The labels of an image are a dict: `boxes` `[M, 4]`, (ymin, xmin, ymax, xmax) in pixels of the
    network input, `classes` `[M]` int32 from 1, `scores` `[M]` in [0, 1], all three -1 where they
    are padding, and `image_info` `[4, 2]` as in `geometry.plan_resize`.

    Args:
        config: `DetectionConfig` with `num_classes` set; None takes the defaults.
        labeling: predict at `label_scales`, for pseudo labels, instead of `eval_scales`.
        changes: fields of the config that replace those of `config`.

    Raises:
        UserError: if a field does not exist or a value is out of range.
    """

    headline = "AP"
    label_unit = "boxes per image"
    draws_masks = False
    class_layer = "retinanet.class_net.class-predict"

    def __init__(
        self, config: DetectionConfig | None = None, labeling: bool = False, **changes: Any
    ) -> None:
        self.config: Any = config or DetectionConfig()
        if changes:
            self.config = changed(self.config, **changes)
        self.anchors = anchor_ops.anchor_boxes(
            self.config.image_size, anchor_size=self.config.anchor_size
        )
        self.nms_settings = self.config.nms.model_dump()
        scales = self.config.label_scales if labeling else self.config.eval_scales
        self.flip = self.config.label_flip if labeling else self.config.eval_flip
        self.scales = multiscale.Scales(self.config.image_size, scales)

    @functools.cached_property
    def _anchors(self):
        """The anchors of each scale; those of scale 1 are `anchors`."""
        return [
            self.anchors
            if size == self.config.image_size
            else anchor_ops.anchor_boxes(size, self.config.anchor_size)
            for size in self.scales.sizes
        ]

    def build_model(self) -> keras.Model:
        """A `RetinaNet`, `[B, S, S, 3]` -> `class_logits` `[B, R, C]`, `box_deltas` `[B, R, 4]`."""
        return build_detector(self.config)

    def inference_model(self, model: keras.Model) -> keras.Model:
        """`model`, or its weights in a network for images of any size if the scales need that.

        Raises:
            UserError: if the backbone has a fixed size and there are several scales.
        """
        return self.scales.network(model, self.config, build_detector)

    @staticmethod
    def check_sources(data: PreparedData) -> None:
        """Raises a `UserError` if the human-labeled images hold no box at all."""
        if "human" in data.summaries and not data.summaries["human"]["boxes"]:
            raise UserError("the labeled images hold no box; is human.annotations given?")

    @staticmethod
    def has_truth(summary: Mapping[str, Any]) -> bool:
        """Whether a prepared source holds boxes."""
        return bool(summary["boxes"])

    def warnings(self, config: Config, data: PreparedData) -> Iterator[str]:
        """Sentences on boxes beyond `max_instances`, which a training would leave out."""
        limit = self.config.max_instances
        for name in ("human", "pseudo"):
            if getattr(config, name) is None or name not in data.summaries:
                continue
            counts = data.summaries[name].get("boxes_per_image", {})
            counts = {int(boxes): images for boxes, images in counts.items()}
            if name == "pseudo" and max(counts, default=0) > limit:
                counts = self._boxes_per_image(config.pseudo, data.files("pseudo"))
            lost = sum((boxes - limit) * n for boxes, n in counts.items() if boxes > limit)
            if lost:
                images = sum(n for boxes, n in counts.items() if boxes > limit)
                yield (
                    f"{images} images of {name} have more than task.max_instances={limit} boxes: "
                    f"{lost} of its {sum(b * n for b, n in counts.items())} boxes are left out and "
                    f"count as background; task.max_instances={max(counts)} keeps all"
                )

    def _boxes_per_image(self, source, files):
        """`{number of boxes that the student reads: number of pseudo-labeled images}`."""
        return collections.Counter(len(self.kept(r, source).boxes) for r in records.read(files))

    def parser(self, source: InputConfig | None = None) -> Callable:
        """A function (decoded example, seed `[2]`) -> (image `[S, S, 3]`, labels).

        Args:
            source: that is trained on: its augmentation applies, and its thresholds of pseudo
                labels, and crowds are dropped. Without one the image is only fitted; if the task
                has other scales than 1, it is then a tuple of one for each of V scales, and the
                labels are only `image_info` `[V, 4, 2]`.
        """
        if source is None and self.scales.scales != (1.0,):
            return self.scales.parser()
        import tensorflow as tf

        from official_selftrain.data.augmentation import geometry, image_ops

        size, max_boxes = self.config.image_size, self.config.max_instances
        pseudo = source if isinstance(source, PseudoConfig) else None
        confident = self._confident_boxes(pseudo) if pseudo else None
        augmentation = geometry.Augmentation(source, size) if source else None

        def pad(values, value=-1):
            values = values[:max_boxes]
            padding = [[0, max_boxes - tf.shape(values)[0]]] + [[0, 0]] * (len(values.shape) - 1)
            padded = tf.pad(values, padding, constant_values=value)
            return tf.ensure_shape(padded, [max_boxes, *values.shape[1:]])

        def parse(example, seed):
            scene = {"image": example["image"], "boxes": example["boxes"]}
            if augmentation:
                scene = augmentation(scene, seed)
            else:
                scene = geometry.fit(
                    scene, geometry.plan_resize(tf.shape(scene["image"])[:2], size)
                )
            keep = image_ops.non_empty(scene["boxes"])
            if augmentation:
                keep = tf.logical_and(keep, tf.logical_not(example["is_crowd"]))
            if confident is not None:
                keep = tf.logical_and(keep, confident(example))
            labels = {
                "boxes": pad(scene["boxes"][keep]),
                "classes": pad(example["classes"][keep]),
                "scores": pad(example["scores"][keep]),
                "image_info": scene["image_info"],
            }
            if pseudo is not None and pseudo.score_weighting:
                labels["weights"] = pad(example["scores"][keep], 0)
            return tf.ensure_shape(scene["image"], [*size, 3]), labels

        return parse

    def _confident_boxes(self, source):
        """A function example -> bool `[N]`: boxes that the student reads, as `kept` tells them."""
        import tensorflow as tf

        thresholds = tf.constant(source.thresholds(self.config.num_classes), tf.float32)
        overlap = source.agnostic_nms_iou

        def confident(example):
            classes, scores = example["classes"], example["scores"]
            keep = scores > _thresholds_of(classes, thresholds)
            if overlap is None:
                return keep
            # A NumPy function, so that the statistics and the student cannot disagree.
            rows = [x[keep] for x in (example["boxes"], classes, scores)]
            best = tf.numpy_function(lambda *x: best_of_object(*x, overlap), rows, tf.bool)
            return tf.tensor_scatter_nd_update(keep, tf.where(keep), best)

        return confident

    def check_record(self, record: ImageRecord) -> None:
        """Checks that the boxes of a record are of the task's classes.

        Raises:
            UserError: naming the record and the class id.
        """
        check_class(record, max(record.classes, default=0), self.config.num_classes)

    def check_pseudo_record(self, record: ImageRecord, source: PseudoConfig) -> None:
        """Accepts every record: boxes and scores are all that a pseudo label needs."""

    def make_record_filter(self, source: PseudoConfig) -> Callable[[Tensor], Tensor]:
        """A function serialized example -> bool: some box is above the thresholds of `source`."""
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

    def loss_sums(self, outputs: Labels, labels: Labels) -> tuple[dict[str, Tensor], Tensor]:
        """Sums of the losses over a batch, and the number of positive anchors.

        The loss is the sum divided by `normalizer(count)`, where the count is that of the global
        batch of this source, so an image or a whole source without boxes is legal.

        Args:
            outputs: `class_logits` `[B, R, C]` and `box_deltas` `[B, R, 4]` of R anchors.
            labels: `boxes` `[B, M, 4]` and `classes` `[B, M]`, -1 where they are padding; with
                `pseudo.score_weighting` also `weights` `[B, M]`, which count instead of 1 for the
                anchors of each box, in the sums and in the number.

        Returns:
            Dict of scalars `class`, `box` and `total` = class + `box_weight` * box; and a scalar.
        """
        targets = anchor_ops.assign(
            self.anchors, labels["boxes"], labels["classes"], weights=labels.get("weights")
        )
        return self.loss_sums_of_targets(outputs, *targets)

    def loss_sums_of_targets(
        self,
        outputs: Labels,
        class_targets: Tensor,
        box_targets: Tensor,
        positives: Tensor,
        weights: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`loss_sums` after matching; the targets are what `anchors.assign` returns."""
        config = self.config
        class_sum, box_sum = losses.detection_loss_sums(
            ops.cast(outputs["class_logits"], "float32"),
            ops.cast(outputs["box_deltas"], "float32"),
            class_targets,
            box_targets,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
            delta=config.huber_delta,
            weights=weights,
        )
        box_sum = box_sum / 4.0
        total = class_sum + config.box_weight * box_sum
        return {"class": class_sum, "box": box_sum, "total": total}, ops.sum(positives)

    def normalizer(self, count: Tensor) -> Tensor:
        """1 + the number of positive anchors, as in the released code."""
        return 1.0 + count

    def label_density(self, labels: Labels) -> Tensor:
        """Mean number of boxes per image of a batch."""
        present = ops.cast(labels["classes"] >= 0, "float32")
        return ops.mean(ops.sum(present, axis=-1))

    def predict(self, model: keras.Model, images: Tensor, labels: Labels) -> dict[str, Tensor]:
        """Detections of a batch, in fractions of the original image.

        Args:
            model: what `inference_model` returned.
            images: `[B, S, S, 3]`, normalized, or a tuple of such for several scales.
            labels: dict with `image_info` `[B, 4, 2]`, or `[B, V, 4, 2]` for V scales.

        Returns:
            Dict: `boxes` `[B, D, 4]`, (ymin, xmin, ymax, xmax) in [0, 1], `scores` `[B, D]`, -1 in
            empty slots, `classes` `[B, D]` from 1.
        """
        infos = labels["image_info"]
        if len(infos.shape) == 3:
            images, infos = (images,), infos[:, None]
        found = []
        for index, batch in enumerate(images):
            # Boxes of all scales are merged in pixels of the first one.
            ratio = infos[:, 0, 2] / infos[:, index, 2]
            for flip in (False, True) if self.flip else (False,):
                outputs = model(ops.flip(batch, axis=2) if flip else batch, training=False)
                boxes, scores = self.decode(outputs, infos[:, index], index, flip)
                if index:
                    boxes = boxes * ops.concatenate([ratio, ratio], axis=-1)[:, None, :]
                found.append((boxes, scores))
        boxes, scores = (ops.concatenate(x, axis=1) for x in zip(*found, strict=True))
        boxes, scores, classes = nms.class_wise_nms(boxes, scores, **self.nms_settings)
        size, _, scale, _ = (infos[:, 0, row] for row in range(4))
        whole = ops.concatenate([size * scale] * 2, axis=-1)[:, None, :]
        return {
            "boxes": ops.clip(boxes / whole, 0.0, 1.0),
            "scores": scores,
            "classes": classes + 1,
        }

    def decode(
        self, outputs: Labels, image_info: Tensor, scale: int = 0, mirrored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """All boxes before suppression, clipped to the image.

        Args:
            outputs: of the network.
            image_info: `[B, 4, 2]`.
            scale: number of the scale at which the network has seen the images.
            mirrored: whether it has seen their mirror images.

        Returns:
            Boxes `[B, R, 4]` in pixels of the network input, and scores `[B, R, C - 1]`, which
            leave out the background.
        """
        scores = ops.sigmoid(ops.cast(outputs["class_logits"], "float32"))[..., 1:]
        boxes = box_ops.decode(ops.cast(outputs["box_deltas"], "float32"), self._anchors[scale])
        if mirrored:
            ymin, xmin, ymax, xmax = (boxes[..., side] for side in range(4))
            width = float(self.scales.sizes[scale][1])
            boxes = ops.stack([ymin, width - xmax, ymax, width - xmin], axis=-1)
        return box_ops.clip(boxes, image_info[:, 1]), scores

    def serving(self, model: keras.Model, nms: str = "hard") -> Callable:
        """What a SavedModel of `model` computes from `(images, image_info)`.

        Args:
            model: a `RetinaNet`.
            nms: "hard", "soft", or "none" for all boxes before suppression.

        Returns:
            A `serving.Detector`.
        """
        from official_selftrain.tasks import serving

        sigma = serving.SOFT_SIGMA if nms == "soft" else 0.0
        settings = changed(self.config.nms, soft_sigma=sigma)
        # Not `changed`: an exported network may be of a size that training refuses.
        changes = {"nms": settings, "eval_scales": (1.0,), "eval_flip": False}
        task = DetectionTask(self.config.model_copy(update=changes))
        return serving.Detector(model, task, suppress=nms != "none")

    def predictions(self, arrays: Mapping[str, np.ndarray], count: int) -> list[Detections]:
        """`Detections` of the first `count` images of what `predict` returned."""
        boxes, scores, classes = (np.asarray(arrays[k]) for k in ("boxes", "scores", "classes"))
        found = []
        for image in range(count):
            # The released decoding may turn a box of less than a pixel inside out.
            sides = boxes[image][:, 2:] - boxes[image][:, :2]
            keep = (scores[image] > nms.NO_SCORE) & (sides > 0).all(axis=-1)
            found.append(Detections(boxes[image][keep], scores[image][keep], classes[image][keep]))
        return found

    def metric(self, class_names: Mapping[int, str] | None = None) -> coco.DetectionMetric:
        """An empty COCO metric."""
        return coco.DetectionMetric(class_names)

    def to_record(self, record: ImageRecord, prediction: Detections, teacher: str) -> ImageRecord:
        """The record with the teacher's boxes in place of its own labels; every score is kept."""
        return record.relabeled(
            teacher,
            boxes=prediction.boxes,
            classes=prediction.classes,
            scores=prediction.scores,
        )

    def label_statistics(
        self,
        source: PseudoConfig,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> BoxLabelStatistics:
        """Empty statistics of pseudo boxes; see `BoxLabelStatistics`."""
        return BoxLabelStatistics(source, self.config.num_classes, class_names, human)

    def threshold_search(self, source: PseudoConfig) -> BoxScores:
        """An empty search for the thresholds of pseudo boxes; see `BoxScores`."""
        return BoxScores(source, self.config.num_classes)

    def density_thresholds(
        self,
        pseudo: Iterable[ImageRecord],
        human: Iterable[ImageRecord],
        class_names: Mapping[int, str],
    ) -> dict[str, dict[str, Any]]:
        """Thresholds that keep as many boxes of each class in an image as the human labels have."""
        return density_thresholds(pseudo, human, class_names)

    def kept(self, record: ImageRecord, source: PseudoConfig) -> ImageRecord:
        """A pseudo-labeled record with only those boxes that the student reads."""
        _, keep = kept_boxes(record, source, self.config.num_classes)
        return record.relabeled(
            record.teacher,
            boxes=record.boxes[keep],
            classes=record.classes[keep],
            scores=record.scores[keep],
        )

    def label_rows(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The statistics of pseudo boxes as (name, text)."""
        return box_rows(result)


def _thresholds_of(classes, thresholds):
    """The threshold of each box; `check_record` tells which record has an unknown class."""
    import tensorflow as tf

    known = tf.debugging.assert_less(
        classes, tf.size(thresholds), "a class id is beyond task.num_classes"
    )
    with tf.control_dependencies([known]):
        return tf.gather(thresholds, classes)

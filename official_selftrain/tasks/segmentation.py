"""Semantic segmentation: labels, loss, multi-scale predictions and pseudo labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from official_selftrain.applications.layers import BilinearUpsample
from official_selftrain.config import (
    Config,
    InputConfig,
    PseudoConfig,
    SegmentationConfig,
    changed,
)
from official_selftrain.data import png, records
from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.data.prepared import PreparedData
from official_selftrain.data.records import IGNORE_LABEL, ImageRecord
from official_selftrain.evaluation import miou
from official_selftrain.evaluation.mask_labels import (
    MaskLabelStatistics,
    MaskScores,
    byte_limits,
    check_mask,
    mask_rows,
)
from official_selftrain.models import build_segmenter
from official_selftrain.ops import losses
from official_selftrain.tasks import multiscale
from official_selftrain.tasks.base import Labels
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import Tensor


class SegmentationTask:
    """A task whose labels are masks of class ids; the methods are those of `base.Task`.

    The network's output is `{"logits": [B, S / r, S / r, C]}`, where r is a whole number. The
    labels of an image are a dict: in training `mask` `[S, S]` int32, 255 where it is ignored, or
    with soft labels `[S, S, 2 K]`, which holds K classes, the likeliest first, and then K
    probabilities times 255; in prediction `image_info` `[V, 4, 2]`, one for each of V scales, as in
    `geometry.plan_resize`.

    Args:
        config: `SegmentationConfig` with `num_classes` set; None takes the defaults.
        labeling: predict at `label_scales`, for pseudo labels, instead of `eval_scales`.
        changes: fields of the config that replace those of `config`.

    Raises:
        UserError: if a field does not exist or a value is out of range.
    """

    headline = "mIoU"
    label_unit = "of the pixels are labeled"
    draws_masks = True
    class_layer = "segmentation.conv2d"

    def __init__(
        self, config: SegmentationConfig | None = None, labeling: bool = False, **changes: Any
    ) -> None:
        config = config or SegmentationConfig()
        self.config: Any = changed(config, **changes) if changes else config
        config = self.config
        scales = config.label_scales if labeling else config.eval_scales
        self.scales = multiscale.Scales(config.image_size, scales)
        self.flip = config.label_flip if labeling else config.eval_flip
        self.at_network_size = config.eval_size == "network" and not labeling
        self.stored = self._label_classes() if labeling else 1

    def build_model(self) -> keras.Model:
        """A new `Segmenter`, `[B, S, S, 3]` -> `logits` `[B, S / r, S / r, C]`."""
        return build_segmenter(self.config)

    def inference_model(self, model: keras.Model) -> keras.Model:
        """`model`, or its weights in a network for images of any size if the scales need that.

        Raises:
            UserError: if the backbone has a fixed size and there are several scales.
        """
        return self.scales.network(model, self.config, build_segmenter)

    @staticmethod
    def check_sources(data: PreparedData) -> None:
        """Raises a `UserError` if an image that is learned from or measured on has no mask."""
        for name in ("human", "evaluation"):
            summary = data.summaries.get(name)
            if summary and summary["masks"] < summary["images"]:
                missing = summary["images"] - summary["masks"]
                raise UserError(f"{missing} images of {name} have no mask; is {name}.masks given?")

    @staticmethod
    def has_truth(summary: Mapping[str, Any]) -> bool:
        """Always: `check_sources` has refused an evaluation source without masks."""
        return True

    def warnings(self, config: Config, data: PreparedData) -> Iterator[str]:
        """None: every pixel of a mask is learned from."""
        return iter(())

    def serving(self, model: keras.Model, nms: str = "hard") -> Callable:
        """What a SavedModel of `model` computes from `(images, image_info)`.

        Args:
            model: a `Segmenter`.
            nms: makes no difference for masks.

        Returns:
            A `serving.ClassMap`.
        """
        from official_selftrain.tasks import serving

        return serving.ClassMap(model, self.config.image_size)

    def _label_classes(self):
        """Number of classes stored for each pixel of a pseudo label, at most all there are."""
        return min(self.config.label_classes, self.config.num_classes)

    # --- Input -------------------------------------------------------------------------------

    def parser(self, source: InputConfig | None = None) -> Callable:
        """A function (decoded example, seed `[2]`) -> (image, labels) for `data.inputs`.

        The image is `[S, S, 3]` in training, and in prediction a tuple of one for each scale.

        Args:
            source: that is trained on: its augmentation applies, and its thresholds of pseudo
                labels. Without one the image is only fitted.
        """
        import tensorflow as tf

        from official_selftrain.data.augmentation import geometry

        size = self.config.image_size
        if source is None:
            return self.scales.parser()
        augmentation = geometry.Augmentation(source, size)
        pseudo = source if isinstance(source, PseudoConfig) else None
        confident = self._confident_pixels(pseudo) if pseudo else None
        soft, weighted = (pseudo.soft, pseudo.score_weighting) if pseudo else (False, False)
        stored = self._label_classes() if soft else 1

        def parse(example, seed):
            mask = example["mask"]
            with tf.control_dependencies(self._mask_faults(mask)):
                mask = tf.identity(mask)
            if confident is not None:
                mask = tf.where(confident(example), mask, tf.constant(IGNORE_LABEL, tf.uint8))
            if soft or weighted:
                mask = _stack(mask, example, stored)
                mask = tf.ensure_shape(mask, [None, None, 2 * stored])
            scene = {"image": example["image"], "boxes": example["boxes"], "mask": mask}
            scene = augmentation(scene, seed)
            image, mask = tf.ensure_shape(scene["image"], [*size, 3]), scene["mask"]
            labels = {}
            if weighted:
                weights = tf.cast(mask[..., stored], tf.float32) / 255.0
                labels["weights"] = tf.ensure_shape(weights, size)
                mask = mask if soft else mask[..., 0]
            channels = [2 * stored] if soft else []
            return image, {"mask": tf.ensure_shape(mask, [*size, *channels]), **labels}

        return parse

    def _mask_faults(self, mask):
        """Checks a mask where it is read; `check_record` tells which record has the fault."""
        import tensorflow as tf

        beyond = (tf.cast(mask, tf.int32) >= self.config.num_classes) & (mask != IGNORE_LABEL)
        message = "a class id of a mask is beyond task.num_classes"
        return [
            tf.debugging.assert_positive(tf.size(mask), "an image has no mask"),
            tf.debugging.Assert(~tf.reduce_any(beyond), [message]),
        ]

    def check_record(self, record: ImageRecord) -> None:
        """Checks that a record has a mask and that the task knows its classes.

        Raises:
            UserError: naming the record and the fault.
        """
        check_mask(record, self.config.num_classes)

    def check_pseudo_record(self, record: ImageRecord, source: PseudoConfig) -> None:
        """Checks that a soft pseudo label holds as many classes per pixel as are to be learned.

        Raises:
            UserError: if it holds another number.
        """
        if not source.soft:
            return
        further = (
            png.decode(record.runner_up_masks).height // record.height
            if record.runner_up_masks
            else 0
        )
        if further + 1 != self._label_classes():
            raise UserError(
                f"pseudo.soft with task.label_classes={self.config.label_classes}: the labels hold "
                f"{further + 1} of {self.config.num_classes} classes per pixel; label again with "
                "this setting, or change it"
            )

    def make_record_filter(self, source: PseudoConfig) -> Callable[[Tensor], Tensor]:
        """A function serialized example -> bool: some pixel reaches the thresholds of `source`."""
        import tensorflow as tf

        confident = self._confident_pixels(source)
        return lambda serialized: tf.reduce_any(confident(records.decode(serialized)))

    def _confident_pixels(self, source):
        """A function example -> bool `[H, W]`: pixels that reach the threshold of their class."""
        import tensorflow as tf

        limits = tf.constant(byte_limits(source.thresholds(self.config.num_classes)))

        def confident(example):
            needed = tf.gather(limits, tf.cast(example["mask"], tf.int32))
            return tf.cast(example["confidence"], tf.int32) >= needed

        return confident

    # --- Loss --------------------------------------------------------------------------------

    def loss_sums(self, outputs: Labels, labels: Labels) -> tuple[dict[str, Tensor], Tensor]:
        """Sum of the cross entropy over the labeled pixels of a batch, and their number.

        With `loss_size="logits"` every r-th pixel of the mask is compared. For a whole r, this
        equals both the released code's bilinear resize of the labels and the nearest label. With
        "mask" the logits are upsampled. Soft labels give the distribution to learn. The loss is the
        sum divided by `normalizer(count)`, where the count is that of the global batch of this
        source, so an image or a whole source without labels is legal.

        Args:
            outputs: `logits` `[B, S / r, S / r, C]`.
            labels: `mask` `[B, S, S]`, or `[B, S, S, 2 K]` with soft labels; with
                `pseudo.score_weighting` also `weights` `[B, S, S]`, which count instead of 1 for
                each pixel, in the sum and in the number.

        Returns:
            Dict with the scalar `total`; and a scalar.
        """
        config = self.config
        logits, mask = ops.cast(outputs["logits"], "float32"), labels["mask"]
        weights, stride = labels.get("weights"), mask.shape[1] // logits.shape[1]
        if config.loss_size == "logits":
            mask = mask[:, ::stride, ::stride]
            weights = weights if weights is None else weights[:, ::stride, ::stride]
        else:
            logits = BilinearUpsample(stride)(logits)
        probabilities = None
        if len(mask.shape) == 4:
            mask, probabilities = _distribution(mask, logits.shape[-1], logits.dtype)
        total, pixels = losses.segmentation_loss_sum(
            logits,
            mask,
            ignore_label=IGNORE_LABEL,
            label_smoothing=config.label_smoothing,
            class_weights=config.class_weights,
            probabilities=probabilities,
            weights=weights,
        )
        return {"total": total}, pixels

    def normalizer(self, count: Tensor) -> Tensor:
        """The number of labeled pixels, at least 1."""
        return ops.maximum(count, 1.0)

    def label_density(self, labels: Labels) -> Tensor:
        """Fraction of the pixels of a batch that are labeled, in [0, 1]."""
        mask = labels["mask"]
        mask = mask[..., 0] if len(mask.shape) == 4 else mask
        return ops.mean(ops.cast(mask != IGNORE_LABEL, "float32"))

    # --- Predictions -------------------------------------------------------------------------

    def predict(self, model: keras.Model, images: Tensor, labels: Labels) -> dict[str, Tensor]:
        """Logits of a batch in each view, which is a scale or the mirror image of one.

        Args:
            model: what `inference_model` returned.
            images: tuple of `[B, h, w, 3]`, normalized, one for each scale.
            labels: dict with `image_info` `[B, V, 4, 2]`.

        Returns:
            Dict: `logits`, a tuple of `[B, h / r, w / r, C]`; `image_info`, as given.
        """
        views = []
        for batch in images:
            views.append(model(batch, training=False)["logits"])
            if self.flip:
                mirrored = model(ops.flip(batch, axis=2), training=False)["logits"]
                views.append(ops.flip(mirrored, axis=2))
        logits = tuple(ops.cast(view, "float32") for view in views)
        return {"logits": logits, "image_info": labels["image_info"]}

    def predictions(self, arrays: Mapping[str, Any], count: int) -> list[MaskPrediction]:
        """`MaskPrediction` of the first `count` images of what `predict` returned.

        Each view's logits are resized to the image and turned into probabilities, whose mean
        decides. The paper only says that it evaluates at several scales; averaging probabilities is
        our choice. Images are assembled strip by strip, so that memory does not grow with their
        size.
        """
        infos = np.asarray(arrays["image_info"])
        all_logits = [np.asarray(logits) for logits in arrays["logits"]]
        repeats, sizes = 2 if self.flip else 1, self.scales.sizes
        found = []
        for index in range(count):
            views = [
                multiscale.inside(
                    logits[index], infos[index, view // repeats], sizes[view // repeats]
                )
                for view, logits in enumerate(all_logits)
            ]
            size = views[0].shape[:2] if self.at_network_size else infos[index, 0, 0].astype(int)
            height, width = size
            found.append(multiscale.merge_views(views, height, width, self.stored))
        return found

    def metric(self, class_names: Mapping[int, str] | None = None) -> miou.SegmentationMetric:
        """An empty mIoU."""
        return miou.SegmentationMetric(self.config.num_classes, class_names)

    def to_record(
        self, record: ImageRecord, prediction: MaskPrediction, teacher: str
    ) -> ImageRecord:
        """The record with the teacher's mask in place of its own labels; every pixel is kept."""
        return record.relabeled(
            teacher,
            mask=png.encode(prediction.classes),
            confidence=png.encode(prediction.confidence),
            runner_up_masks=_png_or_none(prediction.runner_up_classes),
            runner_up_confidences=_png_or_none(prediction.runner_up_confidences),
        )

    # --- Reports -----------------------------------------------------------------------------

    def label_statistics(
        self,
        source: PseudoConfig,
        class_names: Mapping[int, str] | None = None,
        human: Iterable[ImageRecord] = (),
    ) -> MaskLabelStatistics:
        """Empty statistics of pseudo masks; see `MaskLabelStatistics`."""
        return MaskLabelStatistics(source, self.config.num_classes, class_names, human)

    def threshold_search(self, source: PseudoConfig) -> MaskScores:
        """An empty search for the thresholds of pseudo masks; see `MaskScores`."""
        return MaskScores(self.config.num_classes)

    def density_thresholds(
        self,
        pseudo: Iterable[ImageRecord],
        human: Iterable[ImageRecord],
        class_names: Mapping[int, str],
    ) -> dict[str, dict[str, Any]]:
        """None: every pixel has a class, whatever its confidence."""
        return {}

    def kept(self, record: ImageRecord, source: PseudoConfig) -> ImageRecord:
        """A pseudo-labeled record whose mask is 255 at the pixels that the student ignores."""
        classes = check_mask(record, self.config.num_classes)
        confidence = np.asarray(png.decode(record.confidence))
        keep = confidence >= byte_limits(source.thresholds(self.config.num_classes))[classes]
        mask = np.where(keep, classes, np.uint8(IGNORE_LABEL))
        return record.relabeled(record.teacher, mask=png.encode(mask), confidence=record.confidence)

    def label_rows(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The statistics of pseudo masks as (name, text)."""
        return mask_rows(result)


def _stack(mask, example, stored):
    """uint8 `[H, W, 2 K]`: K = `stored` classes, then K confidences, of a decoded pseudo label."""
    import tensorflow as tf

    def maps(first, further):
        if stored == 1:
            return first[None]
        further = tf.reshape(further, tf.concat([[-1], tf.shape(first)], axis=0))
        return tf.concat([first[None], further], axis=0)

    classes = maps(mask, example["runner_up_masks"])
    confidences = maps(example["confidence"], example["runner_up_confidences"])
    return tf.transpose(tf.concat([classes, confidences], axis=0), [1, 2, 0])


def _distribution(mask, num_classes, dtype):
    """(likeliest class `[B, H, W]`, probabilities `[B, H, W, C]`) of a batch of soft labels.

    The probability of the classes that are not stored is distributed over the stored ones.
    """
    stored = mask.shape[-1] // 2
    classes, confidences = mask[..., :stored], ops.cast(mask[..., stored:], dtype)
    one_hot = ops.cast(classes[..., None] == ops.arange(num_classes, dtype=mask.dtype), dtype)
    probabilities = ops.sum(one_hot * confidences[..., None], axis=-2)
    total = ops.sum(confidences, axis=-1, keepdims=True)
    return classes[..., 0], probabilities / ops.maximum(total, 1.0)


def _png_or_none(maps):
    return png.encode(maps) if len(maps) else b""

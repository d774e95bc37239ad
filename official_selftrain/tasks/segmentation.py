"""Semantic segmentation: labels, loss, multi-scale predictions and pseudo labels."""

import math

import numpy as np
from keras import ops

from official_selftrain.applications.layers import BilinearUpsample
from official_selftrain.config import SegmentationConfig, changed
from official_selftrain.data import records
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.evaluation import miou
from official_selftrain.evaluation.mask_labels import (
    MaskLabelStatistics,
    byte_limits,
    check_mask,
    mask_rows,
    open_png,
)
from official_selftrain.models import build_segmenter
from official_selftrain.ops import losses
from official_selftrain.tasks import multiscale
from official_selftrain.utils.errors import UserError

MULTIPLE = 128  # of network inputs: 2 to the coarsest level of the pyramid


class SegmentationTask:
    """A network whose output is `{"logits": [B, S / r, S / r, C]}`, r a whole number.

    Labels are a dict: in training `mask` `[S, S]` int32 with 255 where ignored, or `[S, S, 2 K]`
    with soft labels: K classes, the likeliest first, then K probabilities times 255; in prediction
    `image_info` `[V, 4, 2]`, one for each scale, as in `geometry.plan_resize`.

    Args:
        config: `SegmentationConfig` with `num_classes` set.
        labeling: predict at `label_scales`, for pseudo labels, instead of `eval_scales`.
        changes: fields of the config in place of those of `config`.

    Raises:
        UserError: for a field that does not exist or a value that is out of range.
    """

    headline = "mIoU"  # the metric that tells which weights are best

    def __init__(self, config=None, labeling=False, **changes):
        config = config or SegmentationConfig()
        self.config = config = changed(config, **changes) if changes else config
        self.scales = config.label_scales if labeling else config.eval_scales
        self.flip = config.label_flip if labeling else config.eval_flip
        self.at_network_size = config.eval_size == "network" and not labeling
        self.stored = self._label_classes() if labeling else 1

    def build_model(self):
        return build_segmenter(self.config)

    def inference_model(self, model):
        """The network that `predict` needs: `model`, or its weights in one for images of any size.

        Raises:
            UserError: if the backbone has a fixed size and there are several scales.
        """
        if self._sizes() == [self.config.image_size]:
            return model
        if self.config.backbone.startswith("spinenet"):
            raise UserError(
                f"scales {self.scales}: a SpineNet has one image size; set task.eval_scales and "
                "task.label_scales to [1.0]"
            )
        # Not `changed`: no config has an open size.
        any_size = build_segmenter(self.config.model_copy(update={"image_size": (None, None)}))
        any_size.set_weights(model.get_weights())
        return any_size

    def _label_classes(self):
        """Classes stored for each pixel of a pseudo label: no more than there are."""
        return min(self.config.label_classes, self.config.num_classes)

    def _targets(self):
        """(height, width) that an image is fitted into, for each scale."""
        return [[round(s * side) for side in self.config.image_size] for s in self.scales]

    def _sizes(self):
        """(height, width) of the network input for each scale: padded for the pyramid."""
        return [
            tuple(math.ceil(side / MULTIPLE) * MULTIPLE for side in target)
            for target in self._targets()
        ]

    # --- Input -------------------------------------------------------------------------------

    def parser(self, source=None, training=False):
        """A function (decoded example, seed `[2]`) -> (image, labels) for `data.inputs`.

        In prediction the image is a tuple, one for each scale.

        Args:
            source: `config.InputConfig` whose augmentation and thresholds apply in training.
            training: the image is augmented; otherwise it is only fitted.
        """
        import tensorflow as tf

        from official_selftrain.data.augmentation import geometry

        size = self.config.image_size
        if not training:
            return self._prediction_parser()
        augmentation = geometry.Augmentation(source, size)
        confident = self._confident_pixels(source) if hasattr(source, "thresholds") else None
        soft = confident is not None and source.soft
        channels = (2 * self._label_classes(),) if soft else ()

        def parse(example, seed):
            mask = example["mask"]
            with tf.control_dependencies(self._mask_faults(mask)):
                mask = tf.identity(mask)
            if confident is not None:
                mask = tf.where(confident(example), mask, tf.constant(IGNORE_LABEL, tf.uint8))
            if soft:
                mask = _stack(mask, example)
                mask = tf.ensure_shape(mask, [None, None, *channels])
            scene = {"image": example["image"], "boxes": example["boxes"], "mask": mask}
            scene = augmentation(scene, seed)
            image = tf.ensure_shape(scene["image"], [*size, 3])
            return image, {"mask": tf.ensure_shape(scene["mask"], [*size, *channels])}

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

    def _prediction_parser(self):
        import tensorflow as tf

        from official_selftrain.data.augmentation import geometry

        def parse(example, seed):
            images, infos = [], []
            for target, size in zip(self._targets(), self._sizes(), strict=True):
                info = geometry.plan_resize(tf.shape(example["image"])[:2], target)
                image = geometry.resize_image(example["image"], info, size)
                images.append(tf.ensure_shape(image, [*size, 3]))
                infos.append(info)
            return tuple(images), {"image_info": tf.stack(infos)}

        return parse

    def check_record(self, record):
        """Checks that a record has a mask, and that it is of the task's classes.

        Raises:
            UserError: naming the record and the fault.
        """
        check_mask(record, self.config.num_classes)

    def check_soft(self, record):
        """Checks that a pseudo label holds as many classes a pixel as are to be learnt.

        Raises:
            UserError: if it holds another number.
        """
        further = (
            open_png(record.runner_up_masks).height // record.height
            if record.runner_up_masks
            else 0
        )
        if further + 1 != self._label_classes():
            raise UserError(
                f"pseudo.soft with task.label_classes={self.config.label_classes}: the labels hold "
                f"{further + 1} of {self.config.num_classes} classes a pixel; label again with "
                "this setting, or change it"
            )

    def make_record_filter(self, source):
        """A function serialized example -> bool: a pixel reaches the thresholds of `source`."""
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

    def loss_sums(self, outputs, labels):
        """Sum of the cross entropy over the labeled pixels of a batch, and their number.

        With `loss_size="logits"` every r-th pixel of the mask is compared, which is what the
        released bilinear resize of the labels comes to for a whole r, and the nearest label; with
        "mask" the logits are up-sampled. Soft labels give the distribution to learn. The loss is
        the sum divided by `normalizer(count)`, the count being that of the global batch of this
        source, so an image or a whole source without labels is legal.

        Returns:
            dict with the scalar `total`; and a scalar.
        """
        config = self.config
        logits, mask = ops.cast(outputs["logits"], "float32"), labels["mask"]
        stride = mask.shape[1] // logits.shape[1]
        if config.loss_size == "logits":
            mask = mask[:, ::stride, ::stride]
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
        )
        return {"total": total}, pixels

    def normalizer(self, count):
        """The labeled pixels, at least 1."""
        return ops.maximum(count, 1.0)

    def label_density(self, labels):
        """Mean share of labeled pixels in a batch."""
        mask = labels["mask"]
        mask = mask[..., 0] if len(mask.shape) == 4 else mask
        return ops.mean(ops.cast(mask != IGNORE_LABEL, "float32"))

    # --- Predictions -------------------------------------------------------------------------

    def predict(self, model, images, labels):
        """Logits of a batch in each view: every scale and, where wanted, its mirror image.

        Args:
            model: what `predictor` returned.
            images: tuple of `[B, h, w, 3]`, normalized, one for each scale.
            labels: dict with `image_info` `[B, V, 4, 2]`.

        Returns:
            dict: `logits`, tuple of `[B, h / r, w / r, C]`; `image_info`, as given.
        """
        views = []
        for batch in images:
            views.append(model(batch, training=False)["logits"])
            if self.flip:
                mirrored = model(ops.flip(batch, axis=2), training=False)["logits"]
                views.append(ops.flip(mirrored, axis=2))
        logits = tuple(ops.cast(view, "float32") for view in views)
        return {"logits": logits, "image_info": labels["image_info"]}

    def predictions(self, arrays, count):
        """`MaskPrediction` of the first `count` images of what `predict` returned.

        Each view's logits are resized to the image and turned into probabilities; their mean
        decides (choice 17 of the paper's gaps). Images are put together in strips, so that memory
        does not grow with their size.
        """
        infos = np.asarray(arrays["image_info"])
        all_logits = [np.asarray(logits) for logits in arrays["logits"]]
        repeats, sizes = 2 if self.flip else 1, self._sizes()
        found = []
        for index in range(count):
            views = [
                multiscale.inside(
                    logits[index], infos[index, view // repeats], sizes[view // repeats]
                )
                for view, logits in enumerate(all_logits)
            ]
            size = views[0].shape[:2] if self.at_network_size else infos[index, 0, 0].astype(int)
            found.append(multiscale.merge_views(views, *size, self.stored))
        return found

    def metric(self, class_names=None):
        return miou.SegmentationMetric(self.config.num_classes, class_names)

    def to_record(self, record, prediction, teacher):
        """The record with the teacher's mask instead of its own labels; every pixel is kept."""
        return record.relabeled(
            teacher,
            mask=records.encode_png(prediction.classes),
            confidence=records.encode_png(prediction.confidence),
            runner_up_masks=_png_or_none(prediction.runner_up_classes),
            runner_up_confidences=_png_or_none(prediction.runner_up_confidences),
        )

    # --- Reports -----------------------------------------------------------------------------

    def label_statistics(self, source, class_names=None, human=()):
        """Collects pseudo labels for their report; see `MaskLabelStatistics`."""
        return MaskLabelStatistics(source, self.config.num_classes, class_names, human)

    def label_rows(self, result):
        """A result of `MaskLabelStatistics` as (name, text) for people."""
        return mask_rows(result)


def _stack(mask, example):
    """uint8 `[H, W, 2 K]`: K classes, then K confidences, of a decoded soft label."""
    import tensorflow as tf

    def maps(first, further):
        further = tf.reshape(further, tf.concat([[-1], tf.shape(first)], axis=0))
        return tf.concat([first[None], further], axis=0)

    classes = maps(mask, example["runner_up_masks"])
    confidences = maps(example["confidence"], example["runner_up_confidences"])
    return tf.transpose(tf.concat([classes, confidences], axis=0), [1, 2, 0])


def _distribution(mask, num_classes, dtype):
    """(likeliest class `[B, H, W]`, probabilities `[B, H, W, C]`) of a batch of soft labels.

    What classes beyond the stored ones had is shared out among these.
    """
    stored = mask.shape[-1] // 2
    classes, confidences = mask[..., :stored], ops.cast(mask[..., stored:], dtype)
    one_hot = ops.cast(classes[..., None] == ops.arange(num_classes, dtype=mask.dtype), dtype)
    probabilities = ops.sum(one_hot * confidences[..., None], axis=-2)
    total = ops.sum(confidences, axis=-1, keepdims=True)
    return classes[..., 0], probabilities / ops.maximum(total, 1.0)


def _png_or_none(maps):
    return records.encode_png(maps) if len(maps) else b""

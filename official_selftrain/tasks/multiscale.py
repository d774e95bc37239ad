"""Images at many scales, and one class map out of the logits of all, strip by strip."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from official_selftrain.data.predictions import MaskPrediction
from official_selftrain.ops import resize
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import Tensor

MULTIPLE = 128  # of network inputs: 2 to the coarsest level of the pyramid
MAX_PROBABILITIES = 2**24  # probabilities held at a time while an image is put together


class Scales:
    """The sizes at which an image is predicted.

    Attributes:
        targets: (height, width) that an image is fitted into, for each scale.
        sizes: (height, width) of the network input for each scale: padded for the pyramid.

    Args:
        image_size: (height, width) at scale 1 in pixels.
        scales: relative to `image_size`.
    """

    def __init__(self, image_size: Sequence[int], scales: Sequence[float]) -> None:
        self.image_size, self.scales = tuple(image_size), tuple(scales)
        self.targets = [tuple(round(s * side) for side in image_size) for s in scales]
        self.sizes = [
            tuple(math.ceil(side / MULTIPLE) * MULTIPLE for side in target)
            for target in self.targets
        ]

    def parser(self) -> Callable:
        """A function (decoded example, seed) -> (an image for each scale, `image_info`).

        The images are a tuple of `[h, w, 3]`; `image_info` is `[V, 4, 2]` for V scales.
        """
        import tensorflow as tf

        from official_selftrain.data.augmentation import geometry

        def parse(example, seed):
            images, infos = [], []
            for target, size in zip(self.targets, self.sizes, strict=True):
                info = geometry.plan_resize(tf.shape(example["image"])[:2], target)
                image = geometry.resize_image(example["image"], info, size)
                images.append(tf.ensure_shape(image, [*size, 3]))
                infos.append(info)
            return tuple(images), {"image_info": tf.stack(infos)}

        return parse

    def network(
        self, model: keras.Model, config: Any, build: Callable[[Any], keras.Model]
    ) -> keras.Model:
        """`model`, or its weights in a network for images of any size if the scales need that.

        Args:
            model: made by `build` from `config`.
            config: a `NetworkConfig`.
            build: function config -> network.

        Raises:
            UserError: if the backbone has a fixed size and there are several scales.
        """
        if self.sizes == [self.image_size]:
            return model
        if config.backbone.startswith("spinenet"):
            raise UserError(
                f"scales {self.scales}: a SpineNet has one image size; set task.eval_scales and "
                "task.label_scales to [1.0]"
            )
        # `changed` would refuse an open size, which no training can have.
        any_size = build(config.model_copy(update={"image_size": (None, None)}))
        any_size.set_weights(model.get_weights())
        return any_size


def inside(logits: np.ndarray, info: np.ndarray, size: Sequence[int]) -> Tensor:
    """Logits at the pixels of the fitted image, without the padding: `[h, w, C]`.

    Args:
        logits: `[H / r, W / r, C]` of the padded network input.
        info: `[4, 2]`, as in `geometry.plan_resize`.
        size: (H, W) of the padded network input in pixels.
    """
    import tensorflow as tf

    height, width = (int(side) for side in np.rint(info[0] * info[2]))
    return tf.raw_ops.ResizeBilinear(images=logits[None], size=size)[0, :height, :width]


def merge_views(views: Sequence[Tensor], height: int, width: int, stored: int) -> MaskPrediction:
    """The classes with the largest mean probabilities over all views, at every pixel.

    Args:
        views: logits `[h, w, C]`, each of a size of its own.
        height, width: of the result in pixels.
        stored: number of classes to keep for each pixel.
    """
    import tensorflow as tf

    rows = max(1, MAX_PROBABILITIES // (width * views[0].shape[-1]))
    classes, confidences = [], []
    for first in range(0, height, rows):
        last = min(first + rows, height)
        mean = tf.add_n(
            [tf.nn.softmax(_resized_rows(v, first, last, height, width)) for v in views]
        )
        largest, which = tf.math.top_k(mean, stored)
        classes.append(which.numpy().astype("uint8"))
        confidences.append(np.rint(255 / len(views) * largest.numpy()).astype("uint8"))
    # One map below the other.
    classes, confidences = (
        np.concatenate(strips).transpose(2, 0, 1).reshape(stored * height, width)
        for strips in (classes, confidences)
    )
    return MaskPrediction(
        classes[:height], confidences[:height], classes[height:], confidences[height:]
    )


def _resized_rows(x, first, last, height, width):
    """Rows `first` to `last` of `x` resized to (height, width), by TF1's bilinear rule."""
    import tensorflow as tf

    low, high, weight = (v[first:last] for v in resize.bilinear_weights(x.shape[0], height))
    top = tf.gather(x, low)
    rows = top + (tf.gather(x, high) - top) * weight[:, None, None]
    return tf.raw_ops.ResizeBilinear(images=rows[None], size=[last - first, width])[0]

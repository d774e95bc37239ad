"""What a task predicts for an image: boxes or a class map."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Detections:
    """Objects found in one image, best first.

    Attributes:
        boxes: `[N, 4]` float32, (ymin, xmin, ymax, xmax) as fractions of the image.
        scores: `[N]` in (0, 1].
        classes: `[N]` int, from 1.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@dataclasses.dataclass(frozen=True)
class MaskPrediction:
    """The class of every pixel of one image.

    Attributes:
        classes: `[H, W]` uint8 class ids.
        confidence: `[H, W]` uint8, 255 times the probability of the class.
        runner_up_classes, runner_up_confidences: the same of the second, third, ... class,
            `[K H, W]`, one map below the other; K is 0 unless `label_classes` asks for more.
    """

    classes: np.ndarray
    confidence: np.ndarray
    runner_up_classes: np.ndarray = ()
    runner_up_confidences: np.ndarray = ()

"""What a task predicts for an image: boxes or a class map."""

import dataclasses
from typing import Any

import numpy as np

NO_MAPS: Any = ()


@dataclasses.dataclass(frozen=True)
class Detections:
    """Objects found in one image, best first.

    Attributes:
        boxes: `[N, 4]` float32, (ymin, xmin, ymax, xmax) as fractions of the image.
        scores: `[N]` in (0, 1].
        classes: `[N]` int class ids, from 1.
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
        runner_up_classes: uint8 `[K H, W]`, the second, third, ... likeliest classes, K maps one
            below the other; empty unless `label_classes` asks for more than one class.
        runner_up_confidences: the same of their probabilities.
    """

    classes: np.ndarray
    confidence: np.ndarray
    runner_up_classes: np.ndarray = NO_MAPS
    runner_up_confidences: np.ndarray = NO_MAPS

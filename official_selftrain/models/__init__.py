"""Networks for a task: plain functional Keras models."""

from official_selftrain.models.retinanet import RetinaNet

__all__ = ["RetinaNet"]

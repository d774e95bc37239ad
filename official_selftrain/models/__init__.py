"""Networks for a task: plain functional Keras models."""

from official_selftrain.models.build import build_model
from official_selftrain.models.cost import multiply_adds
from official_selftrain.models.fpn import FPN
from official_selftrain.models.nasfpn import NASFPN
from official_selftrain.models.retinanet import RetinaNet
from official_selftrain.models.segmenter import ASPP, Segmenter

__all__ = ["ASPP", "FPN", "NASFPN", "RetinaNet", "Segmenter", "build_model", "multiply_adds"]

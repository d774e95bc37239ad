"""Networks for detection and segmentation: plain functional Keras models."""

from official_selftrain.models.build import build_detector, build_segmenter
from official_selftrain.models.cost import multiply_adds
from official_selftrain.models.fpn import FPN
from official_selftrain.models.nasfpn import NASFPN
from official_selftrain.models.retinanet import RetinaNet
from official_selftrain.models.segmenter import ASPP, Segmenter

__all__ = [
    "ASPP",
    "FPN",
    "NASFPN",
    "RetinaNet",
    "Segmenter",
    "build_detector",
    "build_segmenter",
    "multiply_adds",
]

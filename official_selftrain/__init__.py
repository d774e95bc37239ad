"""Rethinking Pre-training and Self-training (Zoph et al., NeurIPS 2020) in Keras 3.

Importing the package starts no device and reads no flag; public names load when first used.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

_PUBLIC = {
    "DetectionTask": "tasks.detection",
    "Detections": "data.predictions",
    "ImageRecord": "data.records",
    "LossNormalizer": "self_training",
    "FPN": "models.fpn",
    "MaskPrediction": "data.predictions",
    "NASFPN": "models.nasfpn",
    "RetinaNet": "models.retinanet",
    "Segmenter": "models.segmenter",
    "SegmentationTask": "tasks.segmentation",
    "SelfTrainer": "self_training",
    "UserError": "errors",
    "combined_loss": "self_training",
    "zip_streams": "data.inputs",
}

__all__ = sorted(_PUBLIC)


# Saved models load once their layers are registered. A command (`python -m`) imports what it needs
# by itself, so that a misspelt flag is answered without waiting for Keras.
if sys.argv[:1] != ["-m"]:
    import official_selftrain.applications.layers  # noqa: F401
else:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return [*globals(), *__all__]

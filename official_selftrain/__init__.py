"""Rethinking Pre-training and Self-training (Zoph et al., NeurIPS 2020) in Keras 3.

    import official_selftrain as ost

    config = ost.load_experiment("demo")
    ost.run(config, "runs/demo")

Importing the package starts no device and reads no flag; public names load when first used.
"""

# ruff: noqa: F401 (the names below are for editors)
import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers, which do not call `__getattr__`
    from official_selftrain.applications import *  # noqa: F403
    from official_selftrain.config import (
        Config,
        DetectionConfig,
        SegmentationConfig,
        load_experiment,
    )
    from official_selftrain.data.inputs import zip_streams
    from official_selftrain.data.predictions import Detections, MaskPrediction
    from official_selftrain.data.records import ImageRecord
    from official_selftrain.models.fpn import FPN
    from official_selftrain.models.nasfpn import NASFPN
    from official_selftrain.models.retinanet import RetinaNet
    from official_selftrain.models.segmenter import Segmenter
    from official_selftrain.pipeline import evaluate, pseudo_label, run, train  # type: ignore
    from official_selftrain.self_training import LossNormalizer, SelfTrainer, combined_loss
    from official_selftrain.tasks import DetectionTask, SegmentationTask, Task
    from official_selftrain.utils.errors import UserError

_MODULES = {
    "applications": (
        *("EfficientNetB0", "EfficientNetB1", "EfficientNetB2", "EfficientNetB3"),
        *("EfficientNetB4", "EfficientNetB5", "EfficientNetB6", "EfficientNetB7"),
        *("EfficientNetB8", "EfficientNetL2", "EfficientNetLite0", "EfficientNetLite1"),
        *("EfficientNetLite2", "EfficientNetLite3", "EfficientNetLite4", "ResNet18", "ResNet34"),
        *("ResNet50", "ResNet101", "ResNet152", "ResNet200", "SpineNet49", "SpineNet49S"),
        *("SpineNet96", "SpineNet143", "SpineNet143L", "SpineNet190"),
    ),
    "config": ("Config", "DetectionConfig", "SegmentationConfig", "load_experiment"),
    "data.inputs": ("zip_streams",),
    "data.predictions": ("Detections", "MaskPrediction"),
    "data.records": ("ImageRecord",),
    "models.fpn": ("FPN",),
    "models.nasfpn": ("NASFPN",),
    "models.retinanet": ("RetinaNet",),
    "models.segmenter": ("Segmenter",),
    "pipeline": ("evaluate", "pseudo_label", "run", "train"),
    "self_training": ("LossNormalizer", "SelfTrainer", "combined_loss"),
    "tasks": ("DetectionTask", "SegmentationTask", "Task"),
    "utils.errors": ("UserError",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever imports the command `official_selftrain.run` binds that module to its package; the
        # name must go on meaning the function.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# Saved models load once their layers are registered. A command (`python -m`) imports what it needs
# by itself, so that a misspelled flag is answered without waiting for Keras.
if sys.argv[:1] != ["-m"]:
    import official_selftrain.applications.layers
else:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return ["__doc__", "__version__", *__all__]

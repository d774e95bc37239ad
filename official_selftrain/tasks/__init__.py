"""Tasks: what boxes and masks mean. `base.Task` is the protocol that both follow."""

from official_selftrain.config import DetectionConfig, SegmentationConfig
from official_selftrain.tasks.base import Task
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.tasks.segmentation import SegmentationTask

_TYPES = {"detection": DetectionTask, "segmentation": SegmentationTask}


def task_type(config: DetectionConfig | SegmentationConfig) -> type[Task]:
    """The class of the task that a config belongs to."""
    return _TYPES[config.kind]


def make_task(config: DetectionConfig | SegmentationConfig, labeling: bool = False) -> Task:
    """The task that a config belongs to.

    Args:
        config: with `num_classes` set.
        labeling: predict pseudo labels, for which scales and stored classes can differ from those
            of an evaluation.
    """
    return task_type(config)(config, labeling=labeling)

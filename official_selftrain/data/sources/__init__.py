"""Sources as TFRecord shards: COCO, VOC, YOLO, masks, folders, tars, TFDS, TFRecords."""

from official_selftrain.data.sources.prepare import (
    check_disjoint,
    prepare,
    read_index,
    shared_images,
    verify,
)
from official_selftrain.data.sources.problems import hints

__all__ = ["hints", "check_disjoint", "prepare", "read_index", "shared_images", "verify"]

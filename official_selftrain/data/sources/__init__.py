"""Sources as TFRecord shards: COCO, VOC, YOLO, masks, folders, tars, TFDS, TFRecords."""

from official_selftrain.data.sources.prepare import (
    check_disjoint,
    prepare,
    read_index,
    shared_images,
    verify,
)

__all__ = ["check_disjoint", "prepare", "read_index", "shared_images", "verify"]

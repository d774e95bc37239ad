"""Sources as TFRecord shards: COCO, VOC, YOLO, masks, folders, tars, TFDS, TFRecords."""

from official_selftrain.data.sources.prepare import (
    check_disjoint,
    find_damage,
    prepare,
    prepare_part,
    read_index,
    read_summary,
    shared_images,
    verify,
)

__all__ = [
    "check_disjoint", "find_damage", "prepare", "prepare_part", "read_index", "read_summary",
    "shared_images", "verify",
]  # fmt: skip

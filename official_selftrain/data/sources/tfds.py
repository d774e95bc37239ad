"""Data sets of tensorflow-datasets as records; needs the extra `[tfds]`.

`coco/2017`, `voc/2012`, `open_images_v4`, `imagenet2012` and others with the same feature names.
The bytes of the image files are used as they are stored, not decoded and encoded again.
"""

from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from official_selftrain.config import SourceConfig
from official_selftrain.data import records
from official_selftrain.data.sources import stores
from official_selftrain.data.sources.record_errors import RecordErrors
from official_selftrain.utils.errors import UserError, did_you_mean, one_line
from official_selftrain.utils.extras import import_extra

# COCO's category ids have gaps, which tensorflow-datasets closes. These are the original ids, which
# trained weights know.
COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [number for number in range(1, 91) if number not in COCO_GAPS]
OBJECTS = ("bobjects", "objects")  # Open Images has both, and its `objects` have no boxes
# Objects that are neither right nor wrong in an evaluation, as crowds are.
CROWDS = ("is_crowd", "is_difficult", "is_group_of")


def open_tfds(
    source: SourceConfig, wanted: Container[str], images_per_shard: int
) -> tuple[dict[int, str], list[str], int, Any, list[str]]:
    """The fields of a `readers.Reader`, in their order.

    Args:
        source: source with `tfds` and `split`.
        wanted: names of the images to read.
        images_per_shard: number of images that become one TFRecord file.

    Raises:
        UserError: without the extra, or if the data set is unknown or cannot be loaded.
    """
    tfds = import_extra("tensorflow_datasets", "tfds", "tfds")
    try:
        builder = tfds.builder(source.tfds)
        if not builder.info.splits:  # not downloaded yet
            builder.download_and_prepare()
    except Exception as error:
        reason = one_line(error, 300)
        raise UserError(f"cannot load the data set {source.tfds!r}: {reason}") from None
    if source.split not in builder.info.splits:
        hint = did_you_mean(source.split, list(builder.info.splits))
        raise UserError(f"{source.tfds} has no split {source.split!r}{hint}")
    count = builder.info.splits[source.split].num_examples
    shards = [
        f"{source.split}[{first}:{min(first + images_per_shard, count)}]"
        for first in range(0, count, images_per_shard)
    ]
    objects = next((key for key in OBJECTS if key in builder.info.features), None)
    is_coco = str(source.tfds).split("/")[0].split(":")[0] == "coco"

    def read(shard: str, errors: RecordErrors) -> Iterator[records.ImageRecord]:
        data = builder.as_dataset(
            split=shard, decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False
        )
        for example in tfds.as_numpy(data):
            name = _name(example)
            if name not in wanted:
                continue
            try:
                yield _record(example, name, objects, is_coco, builder.info.name)
            except UserError as error:
                errors.add(error)
            except Exception as error:  # whatever is wrong with an example, it can be skipped
                kind = type(error).__name__
                errors.add(UserError(f"image {name!r} cannot be read: {kind}: {error}"))

    names = _class_names(builder.info.features, objects, is_coco)
    return names, shards, count, read, [f"{builder.info.full_name} {source.split} {count}"]


def _class_names(features, objects, is_coco):
    if objects is None:
        return dict(enumerate(features["label"].names)) if "label" in features else {}
    names = features[objects].feature["label"].names
    return dict(zip(COCO_IDS if is_coco else range(1, len(names) + 1), names, strict=True))


def _name(example):
    for key in ("image/filename", "file_name"):
        if key in example:
            return example[key].decode()
    return ""


def _record(example, name, objects, is_coco, dataset):
    encoded, height, width, _ = stores.check_image(
        bytes(example["image"]), f"{name} of {dataset}", shown=lambda stored, turned: False
    )
    fields = {"image_id": _image_id(example, name or encoded)}
    if objects is None:
        fields["label"] = int(example.get("label", -1))
        fields["origin"] = "human" if fields["label"] >= 0 else "none"
    else:
        items = example[objects]
        label = items["label"].astype("int64")
        flags = [items[key] for key in CROWDS if key in items]
        fields |= {
            "boxes": items["bbox"],
            "classes": np.array(COCO_IDS)[label] if is_coco else label + 1,
            "is_crowd": flags[0].astype(bool) if flags else None,
            "areas": items["area"].astype("float32") if "area" in items else None,
        }
    return records.ImageRecord(
        encoded=encoded, height=height, width=width, name=name, dataset=dataset, **fields
    )


def _image_id(example, name):
    return int(example["image/id"]) if "image/id" in example else records.hashed_id(name)

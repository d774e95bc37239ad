"""Batches from records in memory by NumPy and Pillow, for machines without TensorFlow.

Only policy S1 is available: flip, scale jitter and crop. Images are resized by Pillow, which
smooths them when it shrinks them, so they differ slightly from those of `data.inputs`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from official_selftrain.config import SourceConfig
from official_selftrain.data import png
from official_selftrain.data.records import IGNORE_LABEL, ImageRecord
from official_selftrain.data.sources.readers import open_reader
from official_selftrain.data.sources.record_errors import RecordErrors, merged, tell
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.errors import UserError


def read_records(source: SourceConfig) -> list[ImageRecord]:
    """All records of a source whose `images` are a folder, a glob or tar files.

    Raises:
        UserError: if anything is wrong with the source.
    """
    reader = open_reader(source, str)
    problems = RecordErrors(source.on_bad_record == "skip")
    found = [record for shard in reader.shards for record in reader.read(shard, problems)]
    left_out = merged([reader.left_out, problems.left_out])
    skipped = [*reader.skipped, *problems.messages]
    tell(str(source.images), skipped, left_out, problems.turned, problems.first_turned)
    return found


def training_batches(
    streams: Mapping[str, tuple[list[ImageRecord], int]],
    size: tuple[int, int],
    seed: int = 0,
    *,
    jitter: tuple[float, float] = (0.8, 1.2),
    max_boxes: int = 100,
    threshold: float = 0.0,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]]:
    """Endless batches for `SelfTrainer.train_on_batch`, in a new order in each epoch.

    Args:
        streams: `{"human" or "pseudo": (records, images per batch)}`.
        size: (height, width) of the network input.
        seed: seed of order and augmentation.
        jitter: smallest and largest scale.
        max_boxes: the most boxes of an image that reach the loss.
        threshold: pseudo boxes whose score is not above it are dropped, and pixels whose confidence
            is below it are ignored.

    Raises:
        UserError: when the first batch is requested, if a stream has no record.

    Yields:
        (`{stream: images float32 [B, h, w, 3]}`, `{stream: labels}`). Labels are a dict of `boxes`
        `[B, max_boxes, 4]` in pixels, `classes` and `scores` `[B, max_boxes]`, all -1 where padded;
        with masks also `mask` `[B, h, w]` int32, 255 where ignored.
    """
    for name, (records, _) in streams.items():
        if not records:
            raise UserError(f"the stream {name} has no image to make batches of")
    # Each stream has its own generator, so that one does not depend on the length of the other.
    endless = {
        name: _scenes(records, size, np.random.default_rng([seed, index]), jitter, threshold)
        for index, (name, (records, _)) in enumerate(streams.items())
    }
    while True:
        images, labels = {}, {}
        for name, (_, count) in streams.items():
            scenes = [next(endless[name]) for _ in range(count)]
            images[name] = np.stack([scene["image"] for _, scene in scenes])
            rows = [_labels(record, scene, max_boxes, threshold) for record, scene in scenes]
            labels[name] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        yield images, labels


def fit(
    record: ImageRecord,
    size: Any,
    scale: float = 1.0,
    position: Any = (0.0, 0.0),
    *,
    mirrored: bool = False,
    threshold: float = 0.0,
) -> dict[str, np.ndarray]:
    """A record resized, cropped and padded to the network input.

    Args:
        record: the image with its labels.
        size: (height, width) of the network input.
        scale: size of the image relative to the one that just fits into the input.
        position: (y, x) in [0, 1), where to crop an image that is too large.
        mirrored: whether to flip the image left to right.
        threshold: pixels of a mask with a confidence below it are ignored.

    Returns:
        dict: `image` float32 `[h, w, 3]`, normalized, 0 where padded; `boxes` float32 `[N, 4]`,
        (ymin, xmin, ymax, xmax) in pixels; `mask` int32 `[h, w]`, 255 where ignored or padded, if
        the record has one; `image_info` float32 `[4, 2]` as of `geometry.plan_resize`.
    """
    size, whole = np.array(size), np.array([record.height, record.width])
    scaled = np.maximum(np.rint(whole * (np.rint(scale * size) / whole).min()), 1).astype(int)
    offset = np.floor(np.maximum(scaled - size, 0) * position).astype(int)

    def cut(picture, method, padding):
        pixels = np.asarray(picture.resize(scaled[::-1].tolist(), method))
        pixels = pixels[:, ::-1] if mirrored else pixels
        pixels = pixels[offset[0] :, offset[1] :][: size[0], : size[1]]
        canvas = np.full((*size, *pixels.shape[2:]), padding, "float32")
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        return canvas

    picture = png.decode(record.encoded).convert("RGB")
    # The padding is the mean color, so 0 once it is normalized; NaN marks it until then.
    image = cut(picture, Image.Resampling.BILINEAR, np.nan)
    boxes = (
        record.boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1) + (0, 1, 0, 1) if mirrored else record.boxes
    )
    pixels = boxes * np.tile(scaled, 2) - np.tile(offset, 2)
    mean, stddev = np.array(MEAN, "float32"), np.array(STDDEV, "float32")
    scene = {
        "image": np.nan_to_num((image / 255 - mean) / stddev),
        "boxes": np.clip(pixels, 0, np.tile(size - 1, 2)).astype("float32"),
        "image_info": np.stack([whole, size, scaled / whole, offset]).astype("float32"),
    }
    if record.mask:
        mask = np.array(png.decode(record.mask))
        if record.confidence:
            confident = np.asarray(png.decode(record.confidence))
            mask[confident < np.rint(255 * threshold)] = IGNORE_LABEL
        mask = cut(Image.fromarray(mask), Image.Resampling.NEAREST, IGNORE_LABEL)
        scene["mask"] = mask.astype("int32")
    return scene


def _scenes(
    records: list[ImageRecord],
    size: tuple[int, int],
    rng: np.random.Generator,
    jitter: tuple[float, float],
    threshold: float,
) -> Iterator[tuple[ImageRecord, dict[str, np.ndarray]]]:
    """Endless (record, augmented scene), every record once per epoch."""
    while True:
        for index in rng.permutation(len(records)):
            record = records[index]
            scale, position = rng.uniform(*jitter), rng.uniform(size=2)
            mirrored = rng.random() < 0.5
            scene = fit(record, size, scale, position, mirrored=mirrored, threshold=threshold)
            yield record, scene


def _labels(
    record: ImageRecord, scene: dict[str, np.ndarray], max_boxes: int, threshold: float
) -> dict[str, np.ndarray]:
    """The labels of a scene without boxes that were cropped away or score too low."""
    boxes = scene["boxes"]
    # Crowds are groups of objects, which no single box can be learned from.
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~record.is_crowd
    if record.origin == "pseudo":
        keep &= record.scores > threshold

    def pad(values):  # all images of a batch have the same number of rows
        values = values[keep][:max_boxes]
        return np.concatenate([values, np.full((max_boxes - len(values), *values.shape[1:]), -1)])

    labels = {
        "boxes": pad(boxes).astype("float32"),
        "classes": pad(record.classes).astype("int32"),
        "scores": pad(record.scores).astype("float32"),
    }
    return labels | ({"mask": scene["mask"]} if "mask" in scene else {})

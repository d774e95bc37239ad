"""Batches from records in memory by NumPy and PIL, for machines with JAX and without TensorFlow.

Policy S1 alone: mirroring, scale jitter, crop. Resizing is PIL's, which smooths where it shrinks,
so that images differ a little from those of `data.inputs`.
"""

import numpy as np
from PIL import Image

from official_selftrain.data import png
from official_selftrain.data.records import IGNORE_LABEL
from official_selftrain.data.sources.readers import open_reader
from official_selftrain.data.sources.record_errors import RecordErrors, merged, tell
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.errors import UserError


def read_records(source):
    """All `ImageRecord`s of a `config.SourceConfig` with `images`: a folder, glob or tars.

    Raises:
        UserError: for anything wrong with the source.
    """
    reader = open_reader(source, str)
    problems = RecordErrors(source.on_bad_record == "skip")
    found = [record for unit in reader.units for record in reader.read(unit, problems)]
    left_out = merged([reader.left_out, problems.left_out])
    skipped = [*reader.skipped, *problems.messages]
    tell(source.images, skipped, left_out, problems.turned, problems.first_turned)
    return found


def training_batches(sources, size, seed=0, jitter=(0.8, 1.2), max_boxes=100, threshold=0.0):
    """Endless batches for `SelfTrainer.train_on_batch`, shuffled anew in each epoch.

    Args:
        sources: `{"human" or "pseudo": (list of `ImageRecord`, images in a batch)}`.
        size: (height, width) of the network input.
        seed: of order and augmentation.
        jitter: smallest and largest scale.
        max_boxes: boxes of an image that reach the loss.
        threshold: pseudo boxes with a score at or below it are dropped, pixels below it ignored.

    Raises:
        UserError: when the first batch is asked for, if a source has no record.

    Yields:
        (`{source: images [B, h, w, 3]}`, `{source: labels}`), the labels being `boxes`
        `[B, max_boxes, 4]` in pixels, `classes` and `scores` `[B, max_boxes]`, -1 where
        padded; with masks also `mask` `[B, h, w]` int32.
    """
    for name, (records, _) in sources.items():
        if not records:
            raise UserError(f"no image in {name}: batches of it cannot be made")
    streams = {
        name: _scenes(records, size, np.random.default_rng([seed, index]), jitter, threshold)
        for index, (name, (records, _)) in enumerate(sources.items())
    }
    while True:
        images, labels = {}, {}
        for name, (_, count) in sources.items():
            scenes = [next(streams[name]) for _ in range(count)]
            images[name] = np.stack([scene["image"] for _, scene in scenes])
            rows = [_labels(record, scene, max_boxes, threshold) for record, scene in scenes]
            labels[name] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        yield images, labels


def fit(record, size, scale=1.0, position=(0.0, 0.0), mirrored=False, threshold=0.0):
    """A record as a network gets it; pixels of a confidence below the threshold are ignored.

    Returns:
        dict: `image` `[h, w, 3]` float32, normalized, 0 where padded; `boxes` `[N, 4]` in pixels;
        `mask` `[h, w]` int32, 255 where padded, if the record has one; `image_info` `[4, 2]`.
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
    image = cut(picture, Image.Resampling.BILINEAR, np.nan)
    boxes = (
        record.boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1) + (0, 1, 0, 1) if mirrored else record.boxes
    )
    pixels = boxes * np.tile(scaled, 2) - np.tile(offset, 2)
    scene = {
        "image": np.nan_to_num((image / 255 - np.float32(MEAN)) / np.float32(STDDEV)),
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


def _scenes(records, size, rng, jitter, threshold):
    while True:
        for index in rng.permutation(len(records)):
            scale, position, mirrored = (
                rng.uniform(*jitter),
                rng.uniform(size=2),
                rng.random() < 0.5,
            )
            record = records[index]
            yield record, fit(record, size, scale, position, mirrored, threshold)


def _labels(record, scene, max_boxes, threshold):
    """The labels of a scene, boxes that were cropped away or score too low left out."""
    boxes = scene["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~record.is_crowd
    if record.origin == "pseudo":
        keep &= record.scores > threshold

    def pad(values):
        values = values[keep][:max_boxes]
        return np.concatenate([values, np.full((max_boxes - len(values), *values.shape[1:]), -1)])

    labels = {
        "boxes": pad(boxes).astype("float32"),
        "classes": pad(record.classes).astype("int32"),
        "scores": pad(record.scores).astype("float32"),
    }
    return labels | ({"mask": scene["mask"]} if "mask" in scene else {})

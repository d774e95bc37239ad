"""The built-in data set: real handwritten digits on real photographs, with exact boxes and masks.

It is made from the data in scikit-learn and scikit-image, so it needs no download and is the same
on every machine. Train, unlabeled and val share neither a digit nor a region of a photograph. The
extra `[demo]` installs both packages.
"""

import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from official_selftrain.data import png
from official_selftrain.data.records import ImageRecord
from official_selftrain.utils.extras import import_extra

DIGITS = (0, 1, 2, 3, 4)
CLASSES = {index + 1: f"digit {digit}" for index, digit in enumerate(DIGITS)}
SIZES = {"train": 60, "unlabeled": 1000, "val": 250}
# Range, as fractions, of the digits of each class and of the width of each photograph.
SHARES = {"train": (0.0, 0.2), "unlabeled": (0.2, 0.8), "val": (0.8, 1.0)}
SIDE = 128
DIGIT_SIDES = (30, 56)
# Photographs fade to this range; ink lies outside it, so that few labels teach what is background.
FADED = (64, 192)
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip


def scenes(split: str) -> Iterator[ImageRecord]:
    """Yields the `ImageRecord`s of "train", "unlabeled" or "val"; the unlabeled ones keep labels.

    These labels only serve to score pseudo labels; a training does not read them.

    Raises:
        UserError: if the extra `[demo]` is missing.
    """
    digits, photographs = _digits(split), _photographs(split)
    rng = np.random.default_rng(list(SHARES).index(split))
    for index in range(SIZES[split]):
        yield _scene(rng, index, split, digits, photographs)


def _scene(rng, index, split, digits, photographs):
    canvas = _background(rng, photographs)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    boxes, classes = [], []
    for _ in range(rng.integers(1, 5)):
        label = int(rng.integers(len(DIGITS)))
        alpha = _stroke(rng, digits[label])
        height, width = alpha.shape
        top, left = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
        window = np.s_[top : top + height, left : left + width]
        if mask[window].any():
            continue
        ink = _tint(rng, canvas[window])
        canvas[window] += alpha[..., None] * (ink - canvas[window])
        mask[window][alpha > 0.5] = label + 1
        boxes.append([top, left, top + height, left + width])
        classes.append(label + 1)
    return ImageRecord(
        image_id=index,
        encoded=png.encode(canvas.astype(np.uint8)),
        height=SIDE,
        width=SIDE,
        name=f"{split}_{index:04d}.png",
        boxes=np.array(boxes, "float32").reshape(-1, 4) / SIDE,
        classes=classes,
        mask=png.encode(mask),
        origin="none" if split == "unlabeled" else "human",
        dataset=f"digits {split}",
    )


def _background(rng, photographs):
    photograph = photographs[rng.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = int(rng.uniform(0.5, 1.0) * min(height, width))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), "float32")
    return FADED[0] + pixels * ((FADED[1] - FADED[0]) / 255)


def _stroke(rng, samples):
    """Opacity of one scaled, rotated digit, cropped to its ink."""
    sample = samples[rng.integers(len(samples))]
    side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    glyph = Image.fromarray(np.pad(sample, 2)).resize(
        (side * 3 // 2,) * 2, Image.Resampling.BICUBIC
    )
    glyph = glyph.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    alpha = np.clip(np.asarray(glyph, "float32") / 255 * 1.4 - 0.2, 0, 1)
    rows, columns = np.where(alpha > 0.5)
    return alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _tint(rng, beneath):
    """A color darker or lighter than every photograph, whichever differs more from `beneath`."""
    low, high = (0, FADED[0]) if beneath.mean() > 127 else (FADED[1], 255)
    return rng.uniform(low, high, 3).astype("float32")


@functools.cache
def _sources():
    skimage, sklearn = (
        import_extra(module, "demo", "the built-in data set digits")
        for module in ("skimage.data", "sklearn.datasets")
    )
    photographs = []
    for name in PHOTOGRAPHS:
        image = getattr(skimage, name)()
        photographs.append(np.stack([image] * 3, axis=-1) if image.ndim == 2 else image[..., :3])
    return sklearn.load_digits(), photographs


def _part(count, split):
    start, end = SHARES[split]
    return slice(round(start * count), round(end * count))


def _digits(split):
    """Per class the 8x8 samples of a split, uint8 0..255."""
    data, _ = _sources()
    samples = (data.images * (255 / 16)).astype(np.uint8)
    by_class = [samples[data.target == digit] for digit in DIGITS]
    return [images[_part(len(images), split)] for images in by_class]


def _photographs(split):
    _, photographs = _sources()
    return [image[:, _part(image.shape[1], split)] for image in photographs]

"""Records drawn: boxes and masks on images, and contact sheets."""

import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from official_selftrain.data import png
from official_selftrain.data.records import IGNORE_LABEL, ImageRecord, decode, to_example
from official_selftrain.ops.colors import MEAN, STDDEV
from official_selftrain.utils.types import StrPath

COLORS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324",
    "#808000", "#000075", "#ffe119", "#46f0f0", "#bcf60c", "#fabebe", "#800000", "#aaffc3",
    "#e6beff", "#ffd8b1", "#808080", "#fffac8",
)  # fmt: skip
MARGIN = 4
CAPTION_HEIGHT = 16
LONGEST_NAME = 24  # characters of a class name that are drawn


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None = None,
    names: Mapping[int, str] | None = None,
) -> Image.Image:
    """A copy of an image with labeled boxes, the best on top.

    Args:
        image: to draw on.
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image. Boxes outside the image
            are left out.
        classes: `[N]` class ids.
        scores: `[N]`, written beside the names, or None.
        names: `{class id: name}`, or None to write the ids.
    """
    image = image.convert("RGB")
    canvas = ImageDraw.Draw(image)
    # The best last, so that the others do not cover it.
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    for index in order:
        corners = _corners(boxes[index], image)
        if corners is None:
            continue
        label = int(classes[index])
        color = COLORS[label % len(COLORS)]
        canvas.rectangle(corners, outline=color, width=2)
        text = _drawable((names or {}).get(label, label), label)
        if scores is not None:
            text += f" {scores[index]:.2f}"
        width = canvas.textlength(text)
        # Above the box, moved inwards where the text would leave the image.
        origin = (max(min(corners[0] + 2, image.width - width), 0), max(corners[1] - 11, 0))
        canvas.rectangle(canvas.textbbox(origin, text), fill=color)
        canvas.text(origin, text, fill="white")
    return image


def _corners(box: np.ndarray, image: Image.Image) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of a box in pixels, or None if it lies outside the image."""
    ymin, xmin, ymax, xmax = box
    if not (np.isfinite(box).all() and ymin <= ymax and xmin <= xmax):
        return None
    if ymin >= 1 or xmin >= 1 or ymax <= 0 or xmax <= 0:
        return None
    ymin, xmin, ymax, xmax = np.clip(box, 0.0, 1.0)
    left, top = xmin * image.width, ymin * image.height
    return left, top, max(xmax * image.width - 1, left), max(ymax * image.height - 1, top)


def _drawable(name: str | int, label: int) -> str:
    """A class name in characters that Pillow's font has; the id is added if some were replaced."""
    text = "".join(_letter(letter) for letter in str(name)[:LONGEST_NAME])
    text += ".." if len(str(name)) > LONGEST_NAME else ""
    return f"{text} ({label})" if "?" in text or not text.strip() else text


def _letter(letter: str) -> str:
    if letter <= "\xff" and letter.isprintable():
        return letter
    base = unicodedata.normalize("NFKD", letter)[:1]  # without its accents
    return base if base.isascii() and base.isprintable() else "?"


def draw_record(
    record: ImageRecord,
    side: int,
    *,
    names: Mapping[int, str] | None = None,
    threshold: float = 0.0,
    masks: bool = False,
) -> Image.Image:
    """The image of a record with its labels.

    Args:
        record: to draw.
        side: longer side of the picture in pixels.
        names: `{class id: name}`, or None to write the ids.
        threshold: smallest score of a box, or confidence of a pixel, that is drawn.
        masks: whether to draw the mask instead of the boxes.
    """
    # Not rotated by its EXIF orientation: labels refer to the pixels as they are stored.
    image: Image.Image = png.decode(record.encoded)
    factor = side / max(image.size)
    image = image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    )
    if masks:
        if not record.mask:
            return image
        return draw_mask(image, _mask_above(record, threshold, image.size))
    keep = record.scores >= threshold
    scores = record.scores[keep] if record.origin == "pseudo" else None
    return draw_boxes(image, record.boxes[keep], record.classes[keep], scores, names)


def _mask_above(record: ImageRecord, threshold: float, size: tuple[int, int]) -> np.ndarray:
    """The mask of a record at (width, height), 255 where its confidence is below `threshold`."""
    mask = np.asarray(png.decode(record.mask).resize(size, Image.Resampling.NEAREST))
    if not record.confidence:
        return mask
    confidence = png.decode(record.confidence).resize(size, Image.Resampling.NEAREST)
    return np.where(np.asarray(confidence) < 255 * threshold, IGNORE_LABEL, mask)


def draw_mask(image: Image.Image, mask: np.ndarray, opacity: float = 0.55) -> Image.Image:
    """A copy of an image with its mask laid over it in colors.

    Args:
        image: to draw on.
        mask: class ids uint8 `[H, W]`, as large as the image. Class 0 is left transparent, and
            ignored pixels (255) are white.
        opacity: of the colors, 0 to 1.
    """
    image = image.convert("RGB")
    palette = np.zeros((256, 4), "uint8")
    for label in range(1, IGNORE_LABEL):
        palette[label, :3] = ImageColor.getrgb(COLORS[label % len(COLORS)])
    palette[1:, 3] = round(255 * opacity)
    palette[IGNORE_LABEL, :3] = 255
    overlay = Image.fromarray(palette[np.asarray(mask)], "RGBA")
    image.paste(overlay, (0, 0), overlay)
    return image


def augmentation_sheet(
    path: StrPath,
    records: Iterable[ImageRecord],
    count: int,
    names: Mapping[int, str] | None = None,
    seed: int = 0,
    side: int = 240,
) -> None:
    """Writes a picture with a row per record: the original, and a draw of each of S1 to S4.

    Args:
        path: of the PNG file.
        records: to draw, with their boxes and masks.
        count: number of records, from the first on.
        names: `{class id: name}`, or None to write the ids.
        seed: seed of the draws.
        side: height and width of a picture in pixels.
    """
    import tensorflow as tf

    from official_selftrain.config import InputConfig
    from official_selftrain.data.augmentation import geometry

    def original(scene, _):
        info = geometry.plan_resize(tf.shape(scene["image"])[:2], (side, side))
        return geometry.fit(scene, info)

    policies = ("S1", "S2", "S3", "S4")
    sources = [InputConfig(policy=name) for name in policies]  # type: ignore[arg-type]
    augmented = [geometry.Augmentation(source, (side, side)) for source in sources]
    views: list[Callable] = [original, *augmented]
    rows = []
    for index, record in zip(range(count), records, strict=False):
        example = decode(to_example(record))
        keys = ("image", "boxes", "mask") if record.mask else ("image", "boxes")
        scene = {key: example[key] for key in keys}
        drawn = []
        for column, view in enumerate(views):
            position = tf.constant([seed, len(views) * index + column], tf.int64)
            drawn.append(_draw_view(view(scene, position), record.classes, names))
        rows.append(drawn)
    pathlib.Path(path).write_bytes(png.encode(contact_sheet(rows, ["original", *policies])))


def _draw_view(
    view: Mapping[str, Any], classes: np.ndarray, names: Mapping[int, str] | None
) -> Image.Image:
    """A scene as the network gets it, with its labels, in the colors that it had before."""
    from official_selftrain.data.augmentation import image_ops

    pixels = np.asarray(view["image"]) * STDDEV + MEAN
    image = Image.fromarray((255 * pixels).round().clip(0, 255).astype("uint8"))
    if "mask" in view:
        image = draw_mask(image, np.asarray(view["mask"], "uint8"))
    keep = np.asarray(image_ops.non_empty(view["boxes"]))
    boxes = np.asarray(view["boxes"])[keep] / image.width
    return draw_boxes(image, boxes, classes[keep], names=names)


def contact_sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """A table of images.

    Args:
        rows: the images of each row; there may be no row.
        captions: text above each column.
    """
    width = max((image.width for row in rows for image in row), default=0) + MARGIN
    heights = [max(image.height for image in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (width * len(captions), sum(heights) + CAPTION_HEIGHT), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        canvas.text((column * width + 2, 2), caption, fill="black")
    top = CAPTION_HEIGHT
    # Rows may be of different heights: images keep their aspect ratio.
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (column * width, top))
        top += height
    return sheet


def preview(
    path: StrPath,
    records: Iterable[ImageRecord],
    count: int,
    names: Mapping[int, str] | None = None,
    threshold: float = 0.0,
    *,
    columns: int = 4,
    side: int = 240,
    masks: bool = False,
) -> None:
    """Writes a picture of the first records with their labels.

    Args:
        path: of the PNG file.
        records: to draw.
        count: number of records, from the first on.
        names: `{class id: name}`, or None to write the ids.
        threshold: smallest score of a box, or confidence of a pixel, that is drawn.
        columns: images per row.
        side: longer side of each image in pixels.
        masks: whether to draw masks instead of boxes.
    """
    drawn = [
        draw_record(record, side, names=names, threshold=threshold, masks=masks)
        for record, _ in zip(records, range(count), strict=False)
    ]
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    captions = ["" if threshold == 0 else f"score > {threshold}"] * columns
    pathlib.Path(path).write_bytes(png.encode(contact_sheet(rows, captions)))

"""Pictures: boxes on images, contact sheets, curves and histograms."""

import unicodedata

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from official_selftrain.data import png

COLORS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324",
    "#808000", "#000075", "#ffe119", "#46f0f0", "#bcf60c", "#fabebe", "#800000", "#aaffc3",
    "#e6beff", "#ffd8b1", "#808080", "#fffac8",
)  # fmt: skip
MARGIN = 4
CAPTION_HEIGHT = 16
LONGEST_NAME = 24  # letters of a class name that are drawn


def draw_boxes(image, boxes, classes, scores=None, names=None):
    """A copy of a PIL image with labeled boxes, the best on top.

    Args:
        image: PIL image.
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image. Those without a part in
            the image are left out.
        classes: `[N]` int.
        scores: `[N]` written beside the names, or None.
        names: `{class id: name}` or None.
    """
    image = image.convert("RGB")
    canvas = ImageDraw.Draw(image)
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
        place = (max(min(corners[0] + 2, image.width - width), 0), max(corners[1] - 11, 0))
        canvas.rectangle(canvas.textbbox(place, text), fill=color)
        canvas.text(place, text, fill="white")
    return image


def _corners(box, image):
    """(left, top, right, bottom) of a box in pixels; None where the image has no part of it."""
    ymin, xmin, ymax, xmax = box
    if not (np.isfinite(box).all() and ymin <= ymax and xmin <= xmax):
        return None
    if ymin >= 1 or xmin >= 1 or ymax <= 0 or xmax <= 0:
        return None
    ymin, xmin, ymax, xmax = np.clip(box, 0.0, 1.0)
    left, top = xmin * image.width, ymin * image.height
    return left, top, max(xmax * image.width - 1, left), max(ymax * image.height - 1, top)


def _drawable(name, label):
    """A class name in letters that every font has; with the id where some had to be replaced."""
    text = "".join(_letter(letter) for letter in str(name)[:LONGEST_NAME])
    text += ".." if len(str(name)) > LONGEST_NAME else ""
    return f"{text} ({label})" if "?" in text or not text.strip() else text


def _letter(letter):
    if letter <= "\xff" and letter.isprintable():
        return letter
    base = unicodedata.normalize("NFKD", letter)[:1]  # without its accents
    return base if base.isascii() and base.isprintable() else "?"


def draw_record(record, side, names=None, threshold=0.0, masks=False):
    """An `ImageRecord` with its labels scored above `threshold`, its longer side `side` pixels.

    Args:
        record: `ImageRecord`.
        side: in pixels.
        names: `{class id: name}` or None.
        threshold: smallest score, or confidence of a pixel, that is drawn.
        masks: draw the mask, not the boxes.
    """
    image = png.decode(record.encoded)  # as stored: labels refer to that
    factor = side / max(image.size)
    image = image.resize([max(1, round(length * factor)) for length in image.size])
    if masks:
        return (
            draw_mask(image, _mask_above(record, threshold, image.size)) if record.mask else image
        )
    keep = record.scores >= threshold
    scores = record.scores[keep] if record.origin == "pseudo" else None
    return draw_boxes(image, record.boxes[keep], record.classes[keep], scores, names)


def _mask_above(record, threshold, size):
    """The mask of a record at `size`, ignored where its confidence is below `threshold`."""
    mask = np.asarray(png.decode(record.mask).resize(size, Image.Resampling.NEAREST))
    if not record.confidence:
        return mask
    confidence = png.decode(record.confidence).resize(size, Image.Resampling.NEAREST)
    return np.where(np.asarray(confidence) < 255 * threshold, 255, mask)


def draw_mask(image, mask, opacity=0.55):
    """A PIL image with the class ids `[H, W]` of its mask laid over in colors, ignored in white.

    Class 0 is left clear.
    """
    image = image.convert("RGB")
    palette = np.zeros((256, 4), "uint8")
    for label in range(1, 255):
        palette[label, :3] = ImageColor.getrgb(COLORS[label % len(COLORS)])
    palette[1:, 3] = round(255 * opacity)
    palette[255, :3] = 255
    overlay = Image.fromarray(palette[np.asarray(mask)], "RGBA")
    image.paste(overlay, (0, 0), overlay)
    return image


def augmentation_sheet(path, records, count, names=None, seed=0, side=240):
    """Writes a picture of records beside a draw of each of S1 to S4, with boxes and masks drawn.

    Args:
        path: of the PNG file.
        records: iterable of `ImageRecord`.
        count: records, a row each.
        names: `{class id: name}` or None.
        seed: of the draws.
        side: of a picture in pixels.
    """
    import tensorflow as tf

    from official_selftrain.config import InputConfig
    from official_selftrain.data import records as record_lib
    from official_selftrain.data.augmentation import geometry

    policies = ("S1", "S2", "S3", "S4")
    views = [lambda scene, _: geometry.fit(scene, geometry.plan_resize(size(scene), (side, side)))]
    views += [geometry.Augmentation(InputConfig(policy=name), (side, side)) for name in policies]
    size = lambda scene: tf.shape(scene["image"])[:2]  # noqa: E731
    rows = []
    for index, record in zip(range(count), records, strict=False):
        example = record_lib.decode(record_lib.to_example(record))
        keys = ("image", "boxes", "mask") if record.mask else ("image", "boxes")
        scene = {key: example[key] for key in keys}
        drawn = []
        for column, view in enumerate(views):
            place = tf.constant([seed, len(views) * index + column], tf.int64)
            drawn.append(_draw_view(view(scene, place), record.classes, names))
        rows.append(drawn)
    _write_png(path, contact_sheet(rows, ["original", *policies]))


def _draw_view(view, classes, names):
    from official_selftrain.data.augmentation import geometry, image_ops

    pixels = np.asarray(view["image"]) * geometry.STDDEV + geometry.MEAN
    image = Image.fromarray((255 * pixels).round().clip(0, 255).astype("uint8"))
    if "mask" in view:
        image = draw_mask(image, np.asarray(view["mask"], "uint8"))
    keep = np.asarray(image_ops.non_empty(view["boxes"]))
    boxes = np.asarray(view["boxes"])[keep] / image.width
    return draw_boxes(image, boxes, classes[keep], names=names)


def contact_sheet(rows, captions):
    """A table of pictures.

    Args:
        rows: lists of PIL images, one list a row; there may be none.
        captions: text over each column.
    """
    width = max((image.width for row in rows for image in row), default=0) + MARGIN
    heights = [max(image.height for image in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (width * len(captions), sum(heights) + CAPTION_HEIGHT), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        canvas.text((column * width + 2, 2), caption, fill="black")
    top = CAPTION_HEIGHT
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (column * width, top))
        top += height
    return sheet


def preview(path, records, count, names=None, threshold=0.0, columns=4, side=240, masks=False):
    """Writes a picture of the first `count` records with their labels above `threshold`.

    Args:
        path: of the PNG file.
        records: iterable of `ImageRecord`.
        count: pictures, in rows of `columns`, the longer side of each `side` pixels.
        names: `{class id: name}` or None.
        threshold: smallest score drawn.
        masks: draw masks, not boxes.
    """
    drawn = [
        draw_record(record, side, names, threshold, masks)
        for record, _ in zip(records, range(count), strict=False)
    ]
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    captions = ["" if threshold == 0 else f"score > {threshold}"] * columns
    _write_png(path, contact_sheet(rows, captions))


def _write_png(path, image):
    with open(path, "wb") as file:
        file.write(png.encode(image))

"""Pictures: boxes on images, contact sheets, curves and histograms."""

import io

from PIL import Image, ImageDraw

COLOURS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324",
    "#808000", "#000075",
)  # fmt: skip
MARGIN = 4
CAPTION_HEIGHT = 16


def draw_boxes(image, boxes, classes, scores=None, names=None):
    """A copy of a PIL image with labelled boxes.

    Args:
        image: PIL image.
        boxes: `[N, 4]`, (ymin, xmin, ymax, xmax) as fractions of the image.
        classes: `[N]` int.
        scores: `[N]` written beside the names, or None.
        names: `{class id: name}` or None.
    """
    image = image.convert("RGB")
    canvas = ImageDraw.Draw(image)
    for index, (box, label) in enumerate(zip(boxes, classes, strict=True)):
        ymin, xmin, ymax, xmax = box
        corners = (
            xmin * image.width,
            ymin * image.height,
            max(xmax * image.width - 1, xmin * image.width),
            max(ymax * image.height - 1, ymin * image.height),
        )
        colour = COLOURS[int(label) % len(COLOURS)]
        canvas.rectangle(corners, outline=colour, width=2)
        text = (names or {}).get(int(label), str(int(label)))
        if scores is not None:
            text += f" {scores[index]:.2f}"
        place = (corners[0] + 2, max(corners[1] - 11, 0))
        canvas.rectangle(canvas.textbbox(place, text), fill=colour)
        canvas.text(place, text, fill="white")
    return image


def draw_record(record, side, names=None, threshold=0.0):
    """An `ImageRecord` with its labels scored above `threshold`, its longer side `side` pixels."""
    image = Image.open(io.BytesIO(record.encoded))
    factor = side / max(image.size)
    image = image.resize([max(1, round(length * factor)) for length in image.size])
    keep = record.scores >= threshold
    scores = record.scores[keep] if record.origin == "pseudo" else None
    return draw_boxes(image, record.boxes[keep], record.classes[keep], scores, names)


def contact_sheet(rows, captions):
    """A table of pictures.

    Args:
        rows: lists of PIL images, one list a row, equally long.
        captions: text over each column.
    """
    width = max(image.width for row in rows for image in row) + MARGIN
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


def preview(path, records, count, names=None, threshold=0.0, columns=4, side=240):
    """Writes a picture of the first `count` records with their labels above `threshold`.

    Args:
        path: of the PNG file.
        records: iterable of `ImageRecord`.
        count: pictures, in rows of `columns`, the longer side of each `side` pixels.
        names: `{class id: name}` or None.
        threshold: smallest score drawn.
    """
    drawn = [
        draw_record(record, side, names, threshold)
        for record, _ in zip(records, range(count), strict=False)
    ]
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    captions = ["" if threshold == 0 else f"score > {threshold}"] * columns
    with open(path, "wb") as file:
        file.write(png(contact_sheet(rows, captions)))


def png(image):
    """PNG bytes of a PIL image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def curves(histories, names):
    """SVG text of scalars over steps, one panel a name, or None without the extra `[report]`.

    Args:
        histories: `{label: [{"step": ..., name: value}, ...]}`.
        names: scalars to draw.
    """
    figure, panels = _figure(len(names))
    if figure is None:
        return None
    for panel, name in zip(panels, names, strict=True):
        for label, history in histories.items():
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=label)
        panel.set_title(name.replace("_", " "))
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend()
    return _svg(figure)


def histogram(counts, threshold):
    """SVG text of a histogram of scores 0..1, or None without the extra `[report]`."""
    figure, panels = _figure(1)
    if figure is None:
        return None
    width = 1 / len(counts)
    panels[0].bar([i * width for i in range(len(counts))], counts, width, align="edge")
    panels[0].axvline(threshold, color="black", linestyle="--")
    panels[0].set_xlabel("score")
    panels[0].set_title("stored pseudo boxes")
    return _svg(figure)


def _figure(panels):
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None, None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.2), squeeze=False)
    return figure, axes[0]


def _svg(figure):
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]

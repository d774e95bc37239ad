"""COCO JSON, bare folders, TFRecords and the embedded data, all as `ImageRecord`s."""

import hashlib
import io
import json
import logging
import os
import pathlib

from PIL import Image
from tqdm import tqdm

from official_selftrain.config import did_you_mean
from official_selftrain.data import records
from official_selftrain.errors import UserError

IMAGES_PER_SHARD = 500
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# Annotation tools round; a box may leave its image by this many pixels and is clipped.
PIXEL_TOLERANCE = 2.0


class Problems:
    """Faults of single records: raised, or counted and named where the user allows skipping."""

    def __init__(self, skip):
        self.skip = skip
        self.messages = []

    def add(self, error):
        if not self.skip:
            raise UserError(f"{error} (on_bad_record=skip goes on without it)") from None
        logging.warning("skipped: %s", error)
        self.messages.append(str(error))


def prepare(source, path, name, at_least=1):
    """Writes a source as TFRecord shards, once; a finished folder is used again.

    Args:
        source: a `config.SourceConfig`.
        path: function from a relative path of `source` to a real one.
        name: prefix of the files, `FOLDER/NAME`.
        at_least: images that must be found.

    Returns:
        The summary: `files`, `images`, `boxes`, `empty` (images without boxes), `classes` (names by
        id, where known), `largest_class`, `skipped` (messages).

    Raises:
        UserError: for anything wrong with the source.
    """
    summary_file = pathlib.Path(f"{name}.json")
    key = _fingerprint(source, path)
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["source"] == key and all(os.path.exists(file) for file in summary["files"]):
            return summary
    if source.records:
        files = records.matching_files(path(source.records))
        summary = _summarize(records.read(files))
        summary["files"] = files
    else:
        problems = Problems(source.on_bad_record == "skip")
        class_names, total, stream = _open(source, path, problems)
        summary = _summarize(
            tqdm(stream, desc=f"reading {pathlib.Path(name).name}", total=total, unit="image"),
            lambda batch, index: _write_shard(name, index, batch),
        )
        summary |= {"classes": class_names, "skipped": problems.messages}
    if summary["images"] < at_least:
        place = source.images or source.records
        skipped = summary.get("skipped", [])
        why = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(
            f"no usable image in {path(place)!r}{why} (looking for {', '.join(SUFFIXES)})"
        )
    if summary.get("skipped"):
        logging.warning("%d records of %s were skipped", len(summary["skipped"]), name)
    summary["source"] = key
    summary_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(summary_file, json.dumps(summary, indent=1))
    return summary


def write_text(path, text):
    """Writes a text file that appears only when complete."""
    temporary = pathlib.Path(f"{path}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def _write_shard(name, index, batch):
    file = f"{name}-{index:05d}.tfrecord"
    records.write(file, batch)
    return file


def _summarize(stream, write=None):
    """Counts a stream of records, handing it on in shards to `write`."""
    summary = {"files": [], "images": 0, "boxes": 0, "empty": 0, "largest_class": 0}
    batch = []

    def flush():
        if write and batch:
            summary["files"].append(write(batch, len(summary["files"])))
        batch.clear()

    for record in stream:
        summary["images"] += 1
        summary["boxes"] += len(record.boxes)
        summary["empty"] += not len(record.boxes)
        largest = int(record.classes.max(initial=0))
        summary["largest_class"] = max(summary["largest_class"], largest)
        batch.append(record)
        if len(batch) == IMAGES_PER_SHARD:
            flush()
    flush()
    return summary


def _fingerprint(source, path):
    """Changes when the source's settings or any of its files change."""
    parts = [source.model_dump_json(include=set(type(source).model_fields) & _SOURCE_FIELDS)]
    for field in ("annotations", "image_list"):
        if getattr(source, field):
            parts.append(_stat(path(getattr(source, field))))
    if source.images:
        folder = _existing_folder(path(source.images))
        parts += [_stat(file) for file in sorted(folder.rglob("*"))]
    elif source.records:
        parts += [_stat(file) for file in records.matching_files(path(source.records))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_SOURCE_FIELDS = {"records", "images", "annotations", "image_list", "embedded", "on_bad_record"}


def _stat(file):
    try:
        stat = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def _open(source, path, problems):
    """Class names by id, number of images if known, and the stream of records."""
    if source.embedded:
        from official_selftrain.data import embedded

        return embedded.CLASSES, embedded.SIZES[source.embedded], embedded.scenes(source.embedded)
    wanted = _read_list(path(source.image_list)) if source.image_list else None
    if source.annotations:
        return _coco(path(source.images), path(source.annotations), wanted, problems)
    return _folder(path(source.images), wanted, problems)


def _existing_folder(folder):
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        parent = folder.parent
        near = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(
            f"the image folder {folder} does not exist{did_you_mean(folder.name, near)}"
        )
    return folder


def _read_list(path):
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read the image list {path}: {error.strerror}") from None
    return {line.strip() for line in lines if line.strip()}


def _wanted(name, wanted):
    return wanted is None or name in wanted or pathlib.Path(name).stem in wanted


def _check_all_found(names, wanted, where):
    known = {*names, *(pathlib.Path(name).stem for name in names)}
    missing = sorted(wanted - known) if wanted is not None else []
    if missing:
        hint = did_you_mean(missing[0], sorted(known)[:100_000]) if len(known) < 10_000 else ""
        raise UserError(
            f"{len(missing)} images of the image list are not in {where}, "
            f"the first {missing[0]!r}{hint if 'mean' in hint else ''}"
        )


def _folder(folder, wanted, problems):
    folder = _existing_folder(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    names = [str(p.relative_to(folder)) for p in files]
    _check_all_found(names, wanted, folder)
    chosen = [(n, p) for n, p in zip(names, files, strict=True) if _wanted(n, wanted)]

    def stream():
        for name, file in chosen:
            try:
                encoded, height, width = _load_image(file, upright=True)
                yield records.ImageRecord(
                    image_id=records.hashed_id(name),
                    encoded=encoded,
                    height=height,
                    width=width,
                    name=name,
                    origin="none",
                    dataset=folder.name,
                )
            except UserError as error:
                problems.add(error)

    return {}, len(chosen), stream()


def _load_image(file, upright=False):
    """Bytes that every decoder reads, height and width; decodes once to find corrupt files.

    Args:
        upright: turn the image as its EXIF orientation says. Annotated images stay as stored,
            since their boxes refer to the stored pixels.
    """
    try:
        encoded = pathlib.Path(file).read_bytes()
        image = Image.open(io.BytesIO(encoded))
        turned = upright and image.getexif().get(0x0112, 1) != 1
        image.load()
    except FileNotFoundError:
        raise UserError(f"the image file {file} does not exist") from None
    except Exception as error:
        raise UserError(f"the image file {file} cannot be decoded: {error}") from None
    if image.format not in ("JPEG", "PNG") or image.mode not in ("RGB", "L") or turned:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image) if turned else image
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        encoded = buffer.getvalue()
    return encoded, image.height, image.width


def _coco(folder, annotations, wanted, problems):
    folder = _existing_folder(folder)
    content = _load_coco_json(annotations)
    names = {category["id"]: category["name"] for category in content["categories"]}
    by_image = {}
    for annotation in content.get("annotations", []):
        by_image.setdefault(annotation.get("image_id"), []).append(annotation)
    _check_ids(content["images"], by_image, annotations)
    _check_all_found([i["file_name"] for i in content["images"]], wanted, annotations)
    chosen = [i for i in content["images"] if _wanted(i["file_name"], wanted)]
    labelled = "annotations" in content

    def stream():
        for image in chosen:
            try:
                encoded, height, width = _load_image(folder / image["file_name"])
                _check_size(image, height, width, annotations)
                objects = by_image.get(image["id"], [])
                yield records.ImageRecord(
                    image_id=image["id"],
                    encoded=encoded,
                    height=height,
                    width=width,
                    name=image["file_name"],
                    boxes=[_coco_box(a, height, width, annotations) for a in objects],
                    classes=[_coco_class(a, names, annotations) for a in objects],
                    is_crowd=_column(objects, "iscrowd", 0, bool),
                    areas=_column(objects, "area", None, "float32"),
                    origin="human" if labelled else "none",
                    dataset=pathlib.Path(annotations).stem,
                )
            except UserError as error:
                problems.add(error)

    return names, len(chosen), stream()


def _load_coco_json(path):
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the annotations {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    missing = [key for key in ("images", "categories") if key not in content]
    if not isinstance(content, dict) or missing:
        raise UserError(f"{path} is not a COCO file: it has no list called {missing[0]!r}")
    for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name"))):
        for index, item in enumerate(content[key]):
            for field in fields:
                if field not in item:
                    raise UserError(f"{path}: item {index} of {key!r} has no {field!r}")
    return content


def _check_ids(images, by_image, path):
    ids = [image["id"] for image in images]
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"{path}: two images have the id {twice}")
    strangers = set(by_image) - set(ids)
    if strangers:
        raise UserError(
            f"{path}: {len(strangers)} image ids of annotations are not in its list of images, "
            f"the first {sorted(strangers, key=str)[0]!r}"
        )


def _check_size(image, height, width, path):
    listed = (image.get("height", height), image.get("width", width))
    if listed != (height, width):
        raise UserError(
            f"{path} says {image['file_name']} is {listed[1]} x {listed[0]} pixels, the file is "
            f"{width} x {height}; the boxes would be off. Was the image scaled or turned later?"
        )


def _coco_class(annotation, names, path):
    given = annotation.get("category_id")
    if given not in names:
        raise UserError(
            f"{path}: annotation {annotation.get('id')} has the unknown category id {given}; "
            f"known: {', '.join(f'{i} {n}' for i, n in list(names.items())[:20])}"
        )
    return given


def _coco_box(annotation, height, width, path):
    """(ymin, xmin, ymax, xmax) fractions from [x, y, width, height] pixels."""
    box = annotation.get("bbox")
    where = f"{path}: annotation {annotation.get('id')} of image {annotation.get('image_id')}"
    try:
        x, y, w, h = (float(value) for value in box)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: bbox must be four numbers [x, y, width, height]; given {box}"
        ) from None
    if not all(map(_finite, (x, y, w, h))) or w <= 0 or h <= 0:
        raise UserError(f"{where}: bbox has no positive, finite width and height; given {box}")
    low, right, bottom = min(x, y), x + w - width, y + h - height
    if low < -PIXEL_TOLERANCE or max(right, bottom) > PIXEL_TOLERANCE:
        corners = w <= width and h <= height and w > x and h > y
        hint = "; are these corners (x1, y1, x2, y2)?" if corners and low >= 0 else ""
        raise UserError(
            f"{where}: bbox [x, y, width, height] = {box} leaves the {width} x {height} image{hint}"
        )
    if max(x, y, w, h) <= 1 and min(height, width) > 16:
        raise UserError(f"{where}: bbox {box} looks like fractions; COCO boxes are in pixels")
    corners = (y / height, x / width, (y + h) / height, (x + w) / width)
    return [min(max(value, 0.0), 1.0) for value in corners]


def _finite(value):
    return value == value and abs(value) != float("inf")


def _column(objects, key, default, dtype):
    import numpy as np

    values = [annotation.get(key, default) for annotation in objects]
    return None if any(value is None for value in values) else np.array(values, dtype)

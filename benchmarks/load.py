"""Measures seconds and memory for large sources, each read in a process of its own.

    python benchmarks/load.py [images boxes many_boxes]

`images`: 20,000 JPEGs of 32 x 32 pixels. `boxes`: a COCO file with 200,000 boxes in 1,000 classes
on 4,000 images. `many_boxes`: the same with 2,000,000 boxes.
"""

import json
import multiprocessing
import pathlib
import sys
import tempfile
import time

import harness
import numpy as np
from PIL import Image

COUNTS = {"images": (20_000, 0), "boxes": (4_000, 200_000), "many_boxes": (4_000, 2_000_000)}


def write(folder, images, boxes):
    """Writes images, and a COCO file if there are boxes; returns the fields of a source."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(images):
        pixels = rng.integers(0, 255, (32, 32, 3), "uint8")
        Image.fromarray(pixels).save(folder / f"images/{index}.jpg")
    if not boxes:
        return {"images": "images"}
    places = rng.integers(0, 16, (boxes, 4)).tolist()
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 32, "height": 32} for i in range(images)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i % images,
                "category_id": 1 + i % 1000,
                "bbox": [x, y, w + 1, h + 1],
                "area": (w + 1) * (h + 1),
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            for i, (x, y, w, h) in enumerate(places)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 1001)],
    }
    (folder / "t.json").write_text(json.dumps(content))
    return {"images": "images", "annotations": "t.json"}


def measure(folder, fields, sender):
    from official_selftrain.config import SourceConfig
    from official_selftrain.data import sources

    imports = harness.peak_megabytes()
    began, cpu = time.perf_counter(), time.process_time()
    summary = sources.prepare(SourceConfig(**fields), lambda p: str(folder / p), f"{folder}/o/x")
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    memory = harness.peak_megabytes()
    began = time.perf_counter()
    sources.prepare(SourceConfig(**fields), lambda p: str(folder / p), f"{folder}/o/x")
    again = time.perf_counter() - began
    sender.send((summary["images"], summary["boxes"], seconds, cpu, memory, imports, again))


def main():
    context = multiprocessing.get_context("spawn")
    for name in sys.argv[1:] or COUNTS:
        with tempfile.TemporaryDirectory() as scratch:
            fields = write(pathlib.Path(scratch), *COUNTS[name])
            receiver, sender = context.Pipe(duplex=False)
            context.Process(target=measure, args=(pathlib.Path(scratch), fields, sender)).start()
            sender.close()
            images, boxes, seconds, cpu, memory, imports, again = receiver.recv()
        print(
            f"{name}: {images} images, {boxes} boxes: {seconds:.1f} s ({cpu:.1f} s of CPU), peak "
            f"{memory:.0f} MB ({imports:.0f} MB for imports); a second call on the finished folder "
            f"{again:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

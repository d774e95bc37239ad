"""The whole method on built-in data, with boxes or with masks.

    python -m official_selftrain.run --experiment=demo --model_dir=runs/demo
    python -m official_selftrain.run --experiment=demo_segmentation --model_dir=runs/demo_masks

Data:     handwritten digits pasted on photographs, made on the spot (`data/sources/digits.py`) with
          the extra `[demo]`: 60 labeled images, 1,000 unlabeled ones, 250 for evaluation.
Machine:  two CPU cores.
Hours:    0.2.
Expected: the student beats its control, which trains on the human labels only. Means of three
          seeds: 59.1 AP to 56.1 for `demo`, 65.3 mIoU to 60.6 for `demo_segmentation`
          (docs/results/demo.md).
"""

TASK = {
    "image_size": (128, 128),
    "backbone_sizes": {"endpoint_filters": 32, "filter_size_scale": 0.25},
    "head_convs": 2,
    "head_filters": 32,
    "activation": "relu",
    "bn_momentum": 0.98,
    "bn_synchronized": False,
    "anchor_size": 3.0,
    "max_instances": 8,
    "nms": {"max_detections": 20},
}

DEMO = {
    "description": "digits on photographs: teacher, pseudo labels, student, control",
    "task": TASK,
    "human": {
        "builtin": "digits/train",
        "batch_size": 4,
        "flip": False,
        "jitter": (0.7, 1.3),
        "cache": True,
    },
    "unlabeled": {"builtin": "digits/unlabeled"},
    # A teacher of 60 images is overconfident: of its boxes above 0.5 two thirds are right, above
    # 0.7 four fifths. Everywhere else the default is the paper's 0.5.
    "pseudo": {
        "batch_size": 12,
        "score_threshold": 0.7,
        "flip": False,
        "jitter": (0.7, 1.3),
        "cache": True,
    },
    "evaluation": {"builtin": "digits/val", "batch_size": 16},
    "self_training": {
        "alpha": 1.0,
        "decay": "auto",
        "control": True,
        "teacher": {"trainer.steps": 1000, "human.batch_size": 16},
    },
    "optimizer": {
        "learning_rate": 0.2,
        "warmup_steps": 100,
        "warmup_learning_rate": 0.001,
        "l2": 1e-4,
    },
    "trainer": {"steps": 600, "steps_per_loop": 50, "checkpoint_interval": 200},
}

# The paper's magnitude of 10 would move the digits out of images as small as these.
S4 = {"policy": "S4", "magnitude": 4.0, "num_ops": 1}

SEGMENTATION = {
    **DEMO,
    "description": "digits on photographs, with masks instead of boxes",
    "task": {
        "kind": "segmentation",
        "image_size": (128, 128),
        "backbone": "resnet10",
        # In training digits are scaled by 0.7 to 1.3. Labels made at much smaller scales are worse.
        "label_scales": (0.75, 1.0, 1.25, 1.5),
        "neck": "fpn",
        "neck_filters": 32,
        "neck_separable": False,
        "head_convs": 2,
        "bn_momentum": 0.98,
        "bn_synchronized": False,
    },
    "human": {**DEMO["human"], **S4},
    "pseudo": {**DEMO["pseudo"], **S4, "score_threshold": 0.5},
    "self_training": {
        **DEMO["self_training"],
        "teacher": {"trainer.steps": 1600, "human.batch_size": 16},
    },
    # Nineteen of twenty pixels are easy background, so the mean loss is small, and so is its
    # gradient: the rate is ten times that of detection.
    "optimizer": {
        "learning_rate": 2.0,
        "warmup_steps": 100,
        "warmup_learning_rate": 0.01,
        "l2": 1e-5,
        "clip_norm": 1.0,
    },
    "trainer": {**DEMO["trainer"], "steps": 500, "checkpoint_interval": 100},
}

EXPERIMENTS = {"demo": DEMO, "demo_segmentation": SEGMENTATION}

# The stability figure: the plain loss against the normalized one. The teacher of a seed learns at
# S1, so that all variants have the same labels.
AT_S4 = ",".join(
    f"{s}.{key}={S4[key]}" for s in ("human", "pseudo") for key in S4 if key != "policy"
)

STUDIES = {
    "demo_alpha": {
        "description": "plain against normalized loss by alpha, at S1 and S4: who diverges?",
        "experiment": "demo",
        "overrides": [AT_S4, "self_training.teacher={human.policy: S1}"],
        "seeds": [0, 1, 2],
        "variants": {
            f"{loss} {policy} {alpha}": {
                "self_training.normalize": loss == "normalized",
                "human.policy": policy,
                "pseudo.policy": policy,
                "self_training.alpha": alpha,
            }
            for loss in ("plain", "normalized")
            for policy in ("S1", "S4")
            for alpha in (0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
        },
        "x": "self_training.alpha",
        "may_diverge": True,
    }
}

"""The whole method on built-in data, in minutes on a CPU.

    python -m official_selftrain.run --experiment=demo --model_dir=runs/demo

Handwritten digits pasted on photographs (`data/sources/digits.py`). Measured numbers are in
docs/results/demo.md.
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
    # 60 images make a teacher too sure of itself: above 0.5 two of three boxes are right, above 0.7
    # four of five. The paper's 0.5 is the default elsewhere.
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

# The images are small: at the paper's magnitude digits would leave them.
S4 = {"policy": "S4", "magnitude": 4.0, "num_ops": 1}

SEGMENTATION = {
    **DEMO,
    "description": "the same, the class of every pixel in place of boxes",
    "task": {
        "kind": "segmentation",
        "image_size": (128, 128),
        "backbone": "resnet10",
        # Digits in training are 0.7 to 1.3 times as large; much smaller ones make labels worse.
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
    # Nineteen of twenty pixels are easy background, so the mean over pixels is small.
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

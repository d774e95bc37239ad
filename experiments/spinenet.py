"""The released SpineNet detectors on COCO, supervised: published AP on val2017.

    python -m official_selftrain.train --experiment=coco_spinenet49 --model_dir=runs/spinenet49 \
        --params_override="human.records=COCO/train-*,evaluation.records=COCO/val-*"

Settings are those of the released configurations (batch 256, SGD, step schedule).
"""

# name      variant  size  scale jitter  head  anchor  drop  rate, steps       AP
CELLS = [
    ("49S", 640, (0.5, 2.0), (4, 128), 3.0, 0.2, 0.28, 231_500, 41.5),
    ("49", 640, (0.5, 2.0), (4, 256), 3.0, 0.2, 0.28, 231_500, 44.3),
    ("96", 1024, (0.5, 2.0), (4, 256), 3.0, 0.2, 0.28, 231_500, 48.5),
    ("143", 1280, (0.1, 1.9), (4, 256), 4.0, 0.16, 0.28, 231_500, 50.6),
    ("190", 1280, (0.1, 1.9), (7, 512), 4.0, 0.2, 0.3, 185_200, 52.0),
]


def _experiment(variant, size, jitter, head, anchor_size, drop, rate, steps, published):
    return {
        "description": f"SpineNet-{variant} RetinaNet, {size} px, COCO",
        "published": published,
        "task": {
            "num_classes": 91,
            "image_size": (size, size),
            "backbone": f"spinenet{variant}",
            "head_convs": head[0],
            "head_filters": head[1],
            "anchor_size": anchor_size,
            "stochastic_depth": drop,
            "bn_epsilon": 1e-4,
        },
        "human": {"batch_size": 256, "jitter": jitter},
        "evaluation": {"batch_size": 8},
        "optimizer": {
            "schedule": "step",
            "learning_rate": rate,
            "warmup_steps": 2000,
            "warmup_learning_rate": 0.0067,
            "step_boundaries": (steps - 13_890, steps - 4_630),
            "step_rates": (rate / 10, rate / 100),
            "l2": 4e-5,
            "clip_norm": 10.0,
        },
        "trainer": {"steps": steps},
    }


EXPERIMENTS = {f"coco_spinenet{cell[0]}": _experiment(*cell) for cell in CELLS}

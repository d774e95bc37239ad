"""The released SpineNet detectors on COCO: supervised training, no pseudo labels.

    python -m official_selftrain.train --experiment=coco_spinenet49 --model_dir=runs/spinenet49 \
        --params_override="human.records=COCO/train-*,evaluation.records=COCO/val-*"

Data:     COCO train2017 and val2017 as TFRecords, written by `prepare_data` (docs/data.md).
Machine:  batches of 256 images of 640 to 1280 pixels need several accelerators (docs/scale.md).
Hours:    unknown; not run yet.
Expected: `published`, the AP on val2017 of the released configurations, with hard NMS. The
          baselines in table 5 of the paper (50.9 and 52.6) are other trainings, of batch 128,
          measured with Soft-NMS.

Every setting is that of the released configuration; tests/test_experiments.py compares them. A
released checkpoint can be measured without training: docs/models.md.
"""


def _spinenet(
    variant,
    published,
    *,
    size,
    head_convs=4,
    head_filters=256,
    anchor_size=3.0,
    jitter=(0.5, 2.0),
    stochastic_depth=0.2,
    learning_rate=0.28,
    steps=231_500,
):
    return {
        "description": f"SpineNet-{variant} RetinaNet, {size} px, COCO",
        "published": published,
        "task": {
            "num_classes": 91,
            "image_size": (size, size),
            "backbone": f"spinenet{variant}",
            "head_convs": head_convs,
            "head_filters": head_filters,
            "anchor_size": anchor_size,
            "stochastic_depth": stochastic_depth,
            "bn_epsilon": 1e-4,
        },
        "human": {"batch_size": 256, "jitter": jitter},
        "evaluation": {"batch_size": 8},
        "optimizer": {
            "schedule": "step",
            "learning_rate": learning_rate,
            "warmup_steps": 2000,
            "warmup_learning_rate": 0.0067,
            # An epoch of COCO is 463 steps: the rate drops 30 and 10 epochs before the end.
            "step_boundaries": (steps - 13_890, steps - 4_630),
            "step_rates": (learning_rate / 10, learning_rate / 100),
            "l2": 4e-5,
            "clip_norm": 10.0,
        },
        "trainer": {"steps": steps},
    }


EXPERIMENTS = {
    "coco_spinenet49S": _spinenet("49S", 41.5, size=640, head_filters=128),
    "coco_spinenet49": _spinenet("49", 44.3, size=640),
    "coco_spinenet96": _spinenet("96", 48.5, size=1024),
    "coco_spinenet143": _spinenet(
        "143", 50.6, size=1280, anchor_size=4.0, jitter=(0.1, 1.9), stochastic_depth=0.16
    ),
    "coco_spinenet190": _spinenet(
        "190",
        52.0,
        size=1280,
        head_convs=7,
        head_filters=512,
        anchor_size=4.0,
        jitter=(0.1, 1.9),
        learning_rate=0.3,
        steps=185_200,
    ),
}

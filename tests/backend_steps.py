"""Some training steps, in a process of its own because a backend is chosen at import.

KERAS_BACKEND=jax python tests/backend_steps.py detection 4 1 FOLDER

The first process keeps the state before and after each step in FOLDER. Those that follow start
every step from the state kept there, so that rounding cannot grow from step to step.
"""

import json
import pathlib
import sys

import keras
import numpy as np
from golden_networks import set_hashed_weights
from helpers import update_error

from official_selftrain.config import DetectionConfig, OptimizerConfig, SegmentationConfig
from official_selftrain.engine.checkpoints import Checkpoints
from official_selftrain.engine.optimizers import make_optimizer
from official_selftrain.self_training import SelfTrainer
from official_selftrain.tasks import make_task

SIDE, HALF = 128, 2
COMMON = {
    "num_classes": 3, "image_size": (SIDE, SIDE), "backbone": "resnet10", "neck": "fpn",
    "neck_filters": 8, "bn_momentum": 0.9, "bn_synchronized": False,
}  # fmt: skip
TASKS = {
    "detection": DetectionConfig(**COMMON, head_convs=1, head_filters=8, max_instances=4),
    "segmentation": SegmentationConfig(**COMMON, head_convs=1),
}


def labels(kind, rng):
    if kind == "segmentation":
        return {"mask": rng.integers(0, 3, (HALF, SIDE, SIDE)).astype("int32")}
    corners = rng.uniform(0, 64, (HALF, 4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(16, 60, (HALF, 4, 2))], axis=-1)
    classes = rng.integers(-1, 3, (HALF, 4)).astype("int32")
    return {"boxes": boxes.astype("float32"), "classes": np.where(classes == 0, 1, classes)}


def main(kind, count, devices, folder):
    if devices > 1:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    task = make_task(TASKS[kind])
    network = task.build_model()
    set_hashed_weights(network, 1.0)
    trainer = SelfTrainer(network, task, alpha=0.5, decay=0.9, l2=1e-4, clip_norm=1.0)
    trainer.compile(make_optimizer(OptimizerConfig(learning_rate=0.01, warmup_steps=5), 100))
    trainer.optimizer.build(network.trainable_variables)
    saved = Checkpoints(folder, trainer, keep=count + 1)
    follows = bool(saved.steps())
    if not follows:
        saved.save(0)
    rng, rows = np.random.default_rng(0), []
    for index in range(count):
        images = {
            name: rng.standard_normal((HALF, SIDE, SIDE, 3)).astype("float32")
            for name in ("human", "pseudo")
        }
        batch = images, {name: labels(kind, rng) for name in images}
        if follows:
            before, expected = (dict(np.load(saved.path(index + i))) for i in (0, 1))
            for key, variable in saved.variables.items():
                variable.assign(before[key])
        step = trainer.train_on_batch(*batch, return_dict=True)
        trainer.reset_metrics()
        row = {name: float(value) for name, value in step.items()}
        if follows:
            found = {k: keras.ops.convert_to_numpy(v) for k, v in saved.variables.items()}
            row["update_error"] = update_error(before, expected, found)
        else:
            saved.save(index + 1)
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))

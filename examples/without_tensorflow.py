"""The whole method without TensorFlow: teacher, pseudo labels and student on JAX, fed by NumPy.

    KERAS_BACKEND=jax python examples/without_tensorflow.py FOLDER

FOLDER holds labeled images of one class in `train`, their boxes in the COCO file `train.json`, and
images without labels in `unlabeled`. Prints the losses of both trainings and how many boxes the
teacher found, as JSON. The settings suit a few small images.
"""

import json
import pathlib
import sys

import keras
import numpy as np

from official_selftrain.config import DetectionConfig, InputConfig
from official_selftrain.data import numpy_inputs
from official_selftrain.engine.distribution import JaxDistribution
from official_selftrain.engine.loop import make_loop, run_loop
from official_selftrain.self_training import SelfTrainer
from official_selftrain.tasks.detection import DetectionTask

SIZE = (128, 128)
ONE = JaxDistribution()


def train(task, **sources):
    keras.utils.set_random_seed(0)
    trainer = SelfTrainer(task.build_model(), task, decay=0.9, clip_norm=5.0)
    trainer.compile(keras.optimizers.SGD(0.01, momentum=0.9))
    trainer.optimizer.build(trainer.student.trainable_variables)
    batches = numpy_inputs.training_batches(sources, SIZE, max_boxes=4, threshold=0.001)
    rows = []
    run_loop(
        make_loop(trainer, batches, ONE),
        8,
        steps_per_loop=4,
        on_loop=lambda step, row: rows.append(row),
    )
    return trainer.student, rows


def main(folder):
    human = InputConfig(images=f"{folder}/train", annotations=f"{folder}/train.json")
    human = numpy_inputs.read_records(human)
    unlabeled = numpy_inputs.read_records(InputConfig(images=f"{folder}/unlabeled"))
    task = DetectionTask(
        DetectionConfig(
            num_classes=2, image_size=SIZE, backbone="resnet10", neck="fpn", neck_filters=8,
            head_convs=1, head_filters=8, bn_synchronized=False,
            nms={"max_detections": 5, "score_threshold": 0.0},
        )
    )  # fmt: skip
    teacher, rows = train(task, human=(human, 4))
    scenes = [numpy_inputs.fit(record, SIZE) for record in unlabeled]
    predict = ONE.compile_predict(lambda *batch: task.predict(teacher, *batch), teacher)
    images, infos = (np.stack([s[key] for s in scenes]) for key in ("image", "image_info"))
    found = task.predictions(predict(images, {"image_info": infos}), len(scenes))
    pseudo = [task.to_record(r, f, "teacher") for r, f in zip(unlabeled, found, strict=True)]
    _, student_rows = train(task, human=(human, 2), pseudo=(pseudo, 2))
    boxes = sum(len(record.boxes) for record in pseudo)
    print(json.dumps({"teacher": rows, "student": student_rows, "boxes": boxes}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

"""Tasks: what turns records into labels, outputs into losses and outputs into predictions.

A task has `build_model()`, `parser(source, training)`, `loss(outputs, labels, sum_over_replicas)`,
`objects(labels)`, `predict(model, images, labels)`, `predictions(arrays, count)`, `metric()` and
`to_record(record, prediction, teacher)`.
"""

from official_selftrain.errors import UserError


def make_task(config):
    """The task of a `config.TaskConfig`.

    Raises:
        UserError: for segmentation, whose networks convert and export but do not train yet.
    """
    if config.kind != "detection":
        raise UserError(
            f"there is no {config.kind} task yet: its networks convert and export, but do not "
            "train, label or evaluate"
        )
    from official_selftrain.tasks.detection import DetectionTask

    return DetectionTask(config)

"""Tasks: what turns records into labels, outputs into losses and outputs into predictions.

A task has `build_model()`, `parser(source, training)`, `loss(outputs, labels, sum_over_replicas)`,
`objects(labels)`, `predict(model, images, labels)`, `predictions(arrays, count)`, `metric()` and
`to_record(record, prediction, teacher)`.
"""


def make_task(config):
    """The task of a `config.TaskConfig`."""
    from official_selftrain.tasks.detection import DetectionTask

    return DetectionTask(config)

"""Tasks: what turns records into labels, outputs into losses and outputs into predictions.

A task has `build_model()`, `predictor(model)`, `parser(source, training)`, `loss_sums(outputs,
labels)`, `normalizer(count)`, `objects(labels)`, `predict(model, images, labels)`,
`predictions(arrays, count)`, `metric(class_names)`, `to_record(record, prediction, teacher)`,
`check_record(record)`, `keeps_something(source)`, `tally(source, class_names, human)` and
`label_rows(result)`.
"""


def make_task(config, labelling=False):
    """The task of a `config.TaskConfig`.

    Args:
        config: its config.
        labelling: for pseudo labels, where they are predicted in another way than for evaluation.
    """
    if config.kind == "segmentation":
        from official_selftrain.tasks.segmentation import SegmentationTask

        return SegmentationTask(config, labelling)
    from official_selftrain.tasks.detection import DetectionTask

    return DetectionTask(config)

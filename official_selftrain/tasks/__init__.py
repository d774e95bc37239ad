"""Tasks: what turns records into labels, outputs into losses and outputs into predictions.

A task has `build_model()`, `predictor(model)`, `parser(source, training)`, `loss_sums(outputs,
labels)`, `normalizer(count)`, `label_density(labels)`, `predict(model, images, labels)`,
`predictions(arrays, count)`, `metric(class_names)`, `to_record(record, prediction, teacher)`,
`check_record(record)`, `make_record_filter(source)`, `label_rows(result)` and
`label_statistics(source, class_names, human)`.
"""


def make_task(config, labeling=False):
    """The task of a `config.TaskConfig`.

    Args:
        config: its config.
        labeling: for pseudo labels, where they are predicted in another way than for evaluation.
    """
    if config.kind == "segmentation":
        from official_selftrain.tasks.segmentation import SegmentationTask

        return SegmentationTask(config, labeling)
    from official_selftrain.tasks.detection import DetectionTask

    return DetectionTask(config)

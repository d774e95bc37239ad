"""Tasks: what turns records into labels, outputs into losses and outputs into predictions.

A task has `build_model()`, `predictor(model)`, `parser(source, training)`, `loss_sums(outputs,
labels)`, `normalizer(count)`, `objects(labels)`, `predict(model, images, labels)`,
`predictions(arrays, count)`, `metric(class_names)`, `to_record(record, prediction, teacher)`,
`check_record(record)`, `keeps_something(source)`, `tally(source, class_names, human)` and
`label_rows(result)`.
"""

from official_selftrain.errors import UserError

STARVED = 0.25  # of a class's share among human labels, below which a pseudo share is told
ENOUGH = 10  # labels of a class before its share says something


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


def check_class(record, largest, num_classes):
    """Checks the largest class id of a record.

    Raises:
        UserError: naming the record, if it is beyond the task's classes.
    """
    if largest >= num_classes:
        raise UserError(
            f"image {record.name or record.image_id} has the class id {largest}, but "
            f"task.num_classes={num_classes} allows ids up to {num_classes - 1}; were its labels "
            "made for other classes?"
        )


def starved_classes(human, pseudo, names):
    """Warnings of classes whose share among pseudo labels is far below that among human ones.

    Args:
        human, pseudo: `{class id: number of labels}`.
        names: `{class id: name}`.
    """
    all_human, all_pseudo = sum(human.values()), sum(pseudo.values())
    warnings = []
    for label, count in sorted(human.items()):
        expected = count / all_human
        share = pseudo.get(label, 0) / max(all_pseudo, 1)
        enough = count >= ENOUGH and expected * all_pseudo >= ENOUGH
        if enough and share < STARVED * expected:
            warnings.append(
                f"class {names.get(label, label)} has {share:.1%} of the pseudo labels, but "
                f"{expected:.1%} of the human ones: the student may forget it; lower "
                f"pseudo.class_thresholds={{{label}: ...}}, or train the teacher longer"
            )
    return warnings

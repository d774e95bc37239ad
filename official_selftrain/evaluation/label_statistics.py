"""What labels can be checked for, whatever they are: class ids and the share of each class."""

from official_selftrain.utils.errors import UserError

STARVED = 0.25  # of a class's share among human labels, below which a pseudo share is told
ENOUGH = 10  # labels of a class before its share says something


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


def display_names(labels, class_names):
    """`{class id: name}`, a name with its id where classes share it."""
    names = {label: class_names.get(label, str(label)) for label in labels}
    every = list(names.values())
    return {c: name if every.count(name) == 1 else f"{name} ({c})" for c, name in names.items()}

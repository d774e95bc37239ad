"""The trainings of `run`: what sets teacher, student and control apart."""


def teacher_config(config):
    """Supervised training on the human labels, with the overrides of `self_training.teacher`."""
    return config.override({"pseudo": None, **config.self_training.teacher})


def student_config(config, records, init):
    """Joint training on human and pseudo labels; `records` are the pseudo-labeled images."""
    changes = {"pseudo.records": records}
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


def control_config(config, init):
    """The student's training without pseudo labels: same start, steps and images per step."""
    batch = config.human.batch_size + config.pseudo.batch_size
    changes = {"pseudo": None, "human.batch_size": batch}
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


def rounds(config):
    """The ends of the names of the folders of each round: "", "_2", ..."""
    return ["", *(f"_{number}" for number in range(2, config.self_training.rounds + 1))]


def stages(config):
    """`{stage: Config}` of the trainings of `run`, in its order; without their start and labels."""
    found = {"teacher": teacher_config(config)}
    for suffix in rounds(config):
        found[f"student{suffix}"] = config
    if config.self_training.control:
        found["control"] = control_config(config, None)
    return found

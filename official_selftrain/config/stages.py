"""The trainings of `run`: how teacher, student and control differ."""

from official_selftrain.config.schema import Config
from official_selftrain.utils.errors import UserError


def teacher_config(config: Config) -> Config:
    """Supervised training on human labels, with the overrides of `self_training.teacher`."""
    return config.override({"pseudo": None, **config.self_training.teacher})


def student_config(config: Config, records: str, init: str) -> Config:
    """Joint training on human and pseudo labels.

    Args:
        config: the config of the whole run.
        records: glob of the TFRecord files with the pseudo-labeled images.
        init: weights of the teacher, used if `self_training.student_init` says so.
    """
    changes: dict[str, object] = {"pseudo.records": records}
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


def control_config(config: Config, init: str | None) -> Config:
    """The student's training without pseudo labels: same start, steps and images per step.

    Any other difference between control and student would hide what the pseudo labels are worth.
    """
    assert config.pseudo is not None
    batch = config.human.batch_size + config.pseudo.batch_size
    changes: dict[str, object] = {"pseudo": None, "human.batch_size": batch}
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


def rounds(config: Config) -> list[str]:
    """Suffixes of the folders of each round: "", "_2", "_3", ..."""
    return ["", *(f"_{number}" for number in range(2, config.self_training.rounds + 1))]


def stages(config: Config) -> dict[str, Config]:
    """`{stage: Config}` of the trainings of `run`, in the order in which they run.

    Initial weights and pseudo labels are missing, because they do not exist yet.
    """
    found = {"teacher": teacher_config(config)}
    for suffix in rounds(config):
        found[f"student{suffix}"] = config
    if config.self_training.control:
        found["control"] = control_config(config, None)
    return found


def check_stages(config: Config) -> None:
    """Checks that a config has what all stages of `run` need.

    Raises:
        UserError: naming the section that is missing, or that must not be given.
    """
    missing = [name for name in ("unlabeled", "pseudo") if getattr(config, name) is None]
    if missing:
        raise UserError(f"`run` needs the section {missing[0]!r}; this experiment has none")
    if config.pseudo is not None and config.pseudo.given:
        raise UserError(
            "`run` labels the images of `unlabeled` itself, so pseudo.records, images, tfds and "
            "builtin must not be set; to learn from labels that exist, use "
            "`python -m official_selftrain.train`"
        )

"""The trainings of `run`: how teacher, student and control differ."""

from collections.abc import Callable

from official_selftrain.config.schema import Config
from official_selftrain.utils.errors import UserError


def teacher_config(config: Config) -> Config:
    """Supervised training on human labels, with the overrides of `self_training.teacher`.

    Raises:
        UserError: if they draw other labeled images; all stages of a run share one draw.
    """
    teacher = config.override({"pseudo": None, **config.self_training.teacher})
    if _draw(teacher) != _draw(config):
        raise UserError(
            "teacher and student share one draw of labeled images: set human.fraction, "
            "human.fraction_seed and selection for the whole run, not in self_training.teacher"
        )
    return teacher


def _draw(config):
    """The settings that decide which labeled images are used, and which are held out."""
    held_out = config.selection and config.selection.model_copy(update={"patience": 0})
    return config.human.fraction, config.human.fraction_seed, held_out


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
    changes: dict[str, object] = {"pseudo": None}
    ratio = 2.0  # of all images of a step to the human-labeled ones, in automatic batches
    if config.human.batch_size != "auto":
        changes["human.batch_size"] = config.images_per_step
        ratio = config.images_per_step / config.human.batch_size
    if config.trainer.epochs is not None:  # passes with the student's human-labeled part of a batch
        changes["trainer.epochs"] = config.trainer.epochs * ratio
    if config.self_training.student_init == "teacher":
        changes["trainer.init"] = init
    return config.override(changes)


def rounds(config: Config) -> list[str]:
    """Suffixes of the folders of each round: "", "_2", "_3", ..."""
    return ["", *(f"_{number}" for number in range(2, config.self_training.rounds + 1))]


def stages(
    config: Config, completed: Callable[[Config], Config] = lambda config: config
) -> dict[str, Config]:
    """`{stage: Config}` of the trainings of `run`, in the order in which they run.

    Initial weights and pseudo labels are missing, because they do not exist yet.

    Args:
        config: as it was given; each training has an automatic length of its own.
        completed: function that sets what follows from the data, `PreparedData.completed`.
    """
    found = {"teacher": teacher_config(config)}
    for suffix in rounds(config):
        found[f"student{suffix}"] = config
    if config.self_training.control:
        found["control"] = control_config(config, None)
    return {stage: completed(settings) for stage, settings in found.items()}


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

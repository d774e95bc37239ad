"""The stages of a study: equal ones, of whatever variant, seed or study, are one folder."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from official_selftrain import config as config_lib
from official_selftrain.config import (
    Config,
    InputConfig,
    PseudoConfig,
    SelfTrainingConfig,
    SourceConfig,
    changed,
)
from official_selftrain.utils.errors import UserError, short

SETTINGS = "settings.yaml"
# Where data and weights are. The parents, which are in the name of a stage, stand for the latter.
PLACES = ("data_dir", "pseudo.records", "trainer.init", "runtime")


@dataclasses.dataclass(frozen=True, eq=False)  # its name tells whether two are equal
class Stage:
    """A training or a set of labels, in a folder of its own.

    Attributes:
        kind: "teacher", "labels", "student" or "control".
        folder: its name tells the kind, and by a digest the settings and the parents.
        config: only what this kind of stage reads, so that equal stages have equal configs.
        parents: the stages that must end before this one begins; the first made its start or is
            the teacher of the labels.
    """

    kind: str
    folder: pathlib.Path
    config: Config
    parents: tuple["Stage", ...] = ()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    def command(self) -> list[str]:
        """The command line that runs the stage, or resumes it."""
        name = "pseudo_label" if self.kind == "labels" else "train"
        command = [sys.executable, "-m", f"official_selftrain.{name}"]
        command += [f"--config_file={self.folder / SETTINGS}", f"--model_dir={self.folder}"]
        return command + ([f"--weights={self.parents[0].folder}"] if name == "pseudo_label" else [])

    def check_unchanged(self) -> None:
        """Checks that what is in the folder was made with the same settings and data.

        Raises:
            UserError: naming what differs, such as a default of another version.
        """
        file = self.folder / SETTINGS
        if not file.exists():
            return
        before, now = config_lib.load(file), self.config
        old, new = dict(_flat(before.model_dump())), dict(_flat(now.model_dump()))
        for key in old.keys() & new.keys():
            if old[key] != new[key] and not key.startswith(PLACES):
                raise UserError(
                    f"{self.folder} was made with {key}={short(old[key])}, which is now "
                    f"{short(new[key])}; choose another --model_dir, or delete this folder"
                )
        moved = before.data_dir != now.data_dir
        if moved and before.data_dir and os.path.exists(before.data_dir):
            raise UserError(
                f"{self.folder} was made from the data in {before.data_dir}, but --data_dir is now "
                f"{now.data_dir}; choose another --model_dir, or delete this folder"
            )


def stages_of(config: Config, folder: pathlib.Path) -> dict[str, Stage]:
    """`{role: Stage}` of what `run` would do, such as "teacher", "labels", "student_2", "control".

    Args:
        config: of the whole run; without `pseudo` it is a supervised training, called teacher.
        folder: of all stages.
    """
    config = changed(config, description="", published=None)
    supervised = _training("teacher", config_lib.teacher_config(config))
    teacher = _stage("teacher", folder, lambda place: supervised)
    found = {"teacher": teacher}
    if config.pseudo is None:
        return found
    best, method = teacher, config.self_training
    for suffix in config_lib.rounds(config):
        labels = _stage("labels", folder, lambda place: _labeling(config, supervised), best)
        parents = (best, labels) if method.student_init == "teacher" else (labels,)
        student = _stage("student", folder, _student(config, best, labels), *parents)
        found |= {f"labels{suffix}": labels, f"student{suffix}": student}
        best = student
    if method.control:
        start = (teacher,) if method.student_init == "teacher" else ()
        found["control"] = _stage("control", folder, _control(config, teacher), *start)
    return found


def _student(config, teacher, labels):
    return lambda place: _training(
        "student", config_lib.student_config(config, place(labels), place(teacher))
    )


def _control(config, teacher):
    return lambda place: _training("control", config_lib.control_config(config, place(teacher)))


def _stage(
    kind: str,
    folder: pathlib.Path,
    settings: Callable[[Callable[[Stage], str]], Config],
    *parents: Stage,
) -> Stage:
    """A stage whose digest knows its parents by name, and whose config knows them by path."""
    named = settings(lambda parent: parent.name)
    # Without defaults, so that an option that does not exist yet changes no digest.
    values = named.model_dump(mode="json", exclude_defaults=True, exclude={"runtime", "data_dir"})
    content = [values, named.task.kind, [parent.name for parent in parents]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    config = settings(lambda parent: os.path.abspath(parent.folder))
    return Stage(kind, folder / f"{kind}-{digest[:10]}", config, parents)


def _training(kind, config):
    """The settings that a training reads: those of its parents and of `run` are left out."""
    method = SelfTrainingConfig()
    if config.pseudo is not None:
        of_run = {
            name: getattr(method, name) for name in ("student_init", "rounds", "control", "teacher")
        }
        method = changed(config.self_training, **of_run)
    return changed(config, experiment=kind, unlabeled=None, self_training=method)


def _labeling(config, teacher):
    """The settings that labeling reads: the teacher's, and what its statistics are made for.

    How a student augments labels does not matter; its thresholds do, because the statistics
    describe the labels that they keep.
    """
    augmentation = InputConfig.model_fields.keys() - SourceConfig.model_fields.keys()
    kept = {key: value for key, value in dict(config.pseudo).items() if key not in augmentation}
    if teacher.human.batch_size == "auto":
        kept["batch_size"] = "auto"  # both parts of a batch are, or none
    return changed(
        teacher,
        experiment="labels",
        task=config.task,
        unlabeled=config.unlabeled,
        pseudo=PseudoConfig(**kept),
        trainer=changed(teacher.trainer, micro_batches=1),  # a student's condition
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

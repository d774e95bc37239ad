"""A run taken further: stages that another run would only repeat are copied into its folder.

What a stage is made of decides, never its name alone: the settings that its result depends on, and
the content of its data, labels and start. The copies do not need the old folder any more.
"""

import json
import logging
import os
import pathlib
from typing import Any

from official_selftrain.config import Config
from official_selftrain.data.prepared import PreparedData
from official_selftrain.engine import checkpoints
from official_selftrain.pipeline.folder import (
    CONFIG,
    FREE_TO_CHANGE,
    METRICS,
    PLACES,
    Difference,
    chosen,
    content_now,
    content_told,
    differences,
    identity,
    made_of,
    saved_config,
    told,
)
from official_selftrain.pipeline.labeling import (
    LABEL_STATISTICS,
    made_before,
    made_by,
    other_labels,
)
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import copy, link_or_copy, read_json_or_none, sha256, write_json
from official_selftrain.utils.types import StrPath

RECORD = "reused.json"
# How images are evaluated, on which no trained weights depend but those that an evaluation chooses.
MEASURING = ("task.nms", "task.eval_scales", "task.eval_flip", "task.eval_size")
# Settings that no trained weights depend on: other stages, and what is labeled and measured.
ELSEWHERE = (
    *FREE_TO_CHANGE, *PLACES, "experiment", "unlabeled", "evaluation",
    "task.label_scales", "task.label_flip", "task.label_classes",
    "self_training.rounds", "self_training.control", "self_training.teacher",
    "self_training.student_init",
)  # fmt: skip
# Settings in which a teacher may differ from a student.
KEPT_BY_TEACHER = ("trainer.", "optimizer.", "human.", "selection.patience")
NOT_COPIED = (CONFIG, ".lock")
LAST = (checkpoints.WEIGHTS, LABEL_STATISTICS)  # a stage that has one is finished


class Reuse:
    """The finished run from whose stages a new run takes those that agree.

    The new run records it, so that resuming needs no flag.

    Args:
        folder: of the new run.
        source: folder of the finished one; None takes the one that is recorded, if there is any.

    Raises:
        UserError: if `source` holds no finished teacher.
    """

    def __init__(self, folder: StrPath, source: StrPath | None = None) -> None:
        self.folder = pathlib.Path(folder)
        record = _record(self.folder)
        self.stages: dict[str, str] = record.get("stages", {})
        given = source or record.get("run")
        self.source = pathlib.Path(os.path.abspath(given)) if given else None
        if self.source is None or "teacher" in self.stages:
            return
        if self.source == self.folder.absolute():
            raise UserError(f"--reuse={source} is --model_dir itself; choose another --model_dir")
        if not (self.source / "teacher" / checkpoints.WEIGHTS).exists():
            raise UserError(
                f"--reuse={given} holds no run whose teacher is finished: "
                f"{self.source}/teacher/{checkpoints.WEIGHTS} is missing"
            )

    def training(self, stage: Workspace) -> None:
        """Fills the folder of a training that has not begun yet, if the other run has the same one.

        Args:
            stage: with prepared data.

        Raises:
            UserError: if it is the teacher and the other run has another one, naming what differs.
        """
        if self.source is not None:
            with stage:
                stage.claim()
                stage.on_chief_first(lambda: self._take_training(stage))

    def _take_training(self, stage):
        name, config = stage.folder.name, stage.config
        found = self.source / name
        begun = any(checkpoints.saved_steps(stage.folder / "checkpoints"))
        if begun or (stage.folder / checkpoints.WEIGHTS).exists() or not found.is_dir():
            return
        settings, data = training_differences(config, stage.data, found)
        if settings or data:
            different = "; ".join([*told(settings), *data][:3])
            if name == "teacher":
                raise UserError(_refusal(found, different, settings, data))
            logging.info("%s: trained, as the one in %s differs: %s", name, found, different)
            return
        left_out = []
        if not _measured_alike(config, stage.data, found):
            left_out = [METRICS]
            if chosen(found) is None:  # otherwise selection images have chosen the best weights
                left_out += [checkpoints.BEST_RECORD, checkpoints.BEST]
        self._note(name)
        _copy(found, stage.folder, left_out)

    def labels(self, stage: Workspace, weights: StrPath) -> None:
        """Fills the folder of pseudo labels, if the other run has the same ones.

        Args:
            stage: with prepared data.
            weights: of the teacher, a `.weights.h5` file or a run folder.
        """
        if self.source is not None:
            with stage:
                stage.on_chief_first(lambda: self._take_labels(stage, weights))

    def _take_labels(self, stage, weights):
        name = stage.folder.name
        found = self.source / name
        if (stage.folder / LABEL_STATISTICS).exists() or not found.is_dir():
            return
        before = made_before(found, stage.config)
        different = ["not finished"]
        if before and (found / LABEL_STATISTICS).exists():
            different = other_labels(before, made_by(stage, weights))
        if different:
            logging.info("%s: made, as those in %s are %s", name, found, " and ".join(different))
            return
        self._note(name)
        _copy(found, stage.folder)

    def _note(self, name):
        self.stages[name] = str(self.source / name)
        write_json(self.folder / RECORD, {"run": str(self.source), "stages": self.stages})
        logging.info("%s: reused from %s", name, self.stages[name])


def reused_stages(folder: pathlib.Path) -> dict[str, str]:
    """`{stage: folder that it was copied from}` of a run."""
    return _record(folder).get("stages", {})


def _record(folder: pathlib.Path) -> dict[str, Any]:
    found = read_json_or_none(folder / RECORD)
    return found if isinstance(found, dict) else {}


def training_differences(
    config: Config, data: PreparedData, found: pathlib.Path
) -> tuple[list[Difference], list[str]]:
    """What tells a training from the finished one in another folder.

    Args:
        config: of the training, completed.
        data: that it reads.
        found: folder of the other training.

    Returns:
        Settings, as `differences` returns them; texts on data, labels and start.
    """
    before = saved_config(found)
    if before is None or not (found / checkpoints.WEIGHTS).exists():
        return [], ["it is not finished"]
    ignored = [*ELSEWHERE]
    ignored += [] if "selection" in data.summaries else MEASURING
    ignored += ["self_training"] if config.pseudo is None else []
    settings = differences(before, config, ignored)
    now, was = content_now(config, data), made_of(found)
    weights = sha256(found / checkpoints.WEIGHTS)
    if was.get("weights", weights) != weights:
        return [], ["its weights are damaged"]
    now.pop("evaluation", None)
    now["init"] = identity(config.trainer.init)
    changed = [key for key in now if was.get(key) != now[key]]
    return settings, content_told(was, now, changed)


def _measured_alike(config, data, found):
    """Whether the metrics of a finished training are those of this config and data, too."""
    before, now = saved_config(found), content_now(config, data)
    return (before.task, before.evaluation) == (config.task, config.evaluation) and (
        made_of(found).get("evaluation") == now.get("evaluation")
    )


def _refusal(found, different, settings, data):
    names = {name: before for name, before, _ in settings}
    text = f"--reuse: {found} is another teacher than this run needs: {different}; "
    if not data and all(name.startswith(KEPT_BY_TEACHER) for name in names):
        kept = ", ".join(f"{name}: {json.dumps(value)}" for name, value in names.items())
        return text + (
            "to change the student only, add "
            f"--params_override='{{self_training: {{teacher: {{{kept}}}}}}}'"
        )
    return text + "leave out --reuse to train a new one"


def _copy(found, folder, left_out=()):
    """Copies the results of a stage; the file that tells that it is finished comes last.

    Checkpoints stay behind, because nothing is left to resume.
    """
    files = [*found.iterdir(), *found.glob("tensorboard/*")]
    files = [file for file in files if file.is_file() and file.name not in (*NOT_COPIED, *left_out)]
    for file in sorted(files, key=lambda file: file.name in LAST):
        if file.suffixes[-1:] == [".npz"] or ".tmp" in file.name:
            continue
        target = folder / file.relative_to(found)
        target.parent.mkdir(exist_ok=True)
        # Labels hold the images; they may be too large for two copies.
        (link_or_copy if file.suffix == ".tfrecord" else copy)(file, target)

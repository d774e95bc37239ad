"""The whole method: teacher, pseudo labels, student, control and report.

The folder of a run holds one folder for each training (`teacher`, `student`, `control`), `data`,
`labels` and `report.html`.
"""

import logging
import os
import pathlib
import time
from typing import Any

from official_selftrain import config as config_lib
from official_selftrain.config import Config
from official_selftrain.data.prepared import WITHOUT_LABELS
from official_selftrain.engine import checkpoints
from official_selftrain.pipeline import report
from official_selftrain.pipeline.folder import METRICS, check_settings
from official_selftrain.pipeline.labeling import label_stage
from official_selftrain.pipeline.plan import Forecast, stages_of_run
from official_selftrain.pipeline.reuse import Reuse
from official_selftrain.pipeline.start import check_startable
from official_selftrain.pipeline.thresholds import LABEL_STATISTICS, with_thresholds
from official_selftrain.pipeline.training import Metrics, train_stage
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, write_json
from official_selftrain.utils.types import StrPath

SECONDS = "seconds.json"


def run(config: Config, folder: StrPath, reuse: StrPath | None = None) -> dict[str, Metrics]:
    """Trains a teacher, labels with it, trains the student and the control, and writes the report.

    Stages that are finished are not run again, so the same call resumes a run that was stopped.

    Args:
        config: with human, unlabeled, pseudo and evaluation sources.
        folder: the run folder.
        reuse: folder of a finished run, whose teacher is taken over, and every other stage that
            would come out the same. A run that is resumed knows it.

    Returns:
        `{stage: metrics}` of the trainings.

    Raises:
        UserError: for bad data or settings, if a stage fails, or if the teacher of `reuse` is
            another one.
    """
    config_lib.check_stages(config)
    finished = (pathlib.Path(folder) / "teacher" / checkpoints.WEIGHTS).exists()
    check_startable(config_lib.teacher_config(config), finished)
    reused = Reuse(folder, reuse)
    with Workspace.open(config, folder) as workspace:
        workspace.claim()
        chief = workspace.distribution.chief
        clock = StageTimer(workspace.folder / SECONDS if chief else None)
        with clock("data"):
            workspace.prepare(WITHOUT_LABELS)
        results = _Stages(workspace, clock, reused).run()
        with clock("report"), workspace.reading():
            if chief:
                report.write(workspace, results, clock.seconds)
    return results


class _Stages:
    """Runs the stages of an entered workspace one after the other."""

    def __init__(self, workspace, clock, reuse):
        self.workspace, self.clock, self.reuse = workspace, clock, reuse
        self.forecast = Forecast(stages_of_run(workspace), workspace)
        self.results = {}

    def run(self):
        """`{stage: metrics}` of teacher, students and control."""
        config, place = self.workspace.config, self.workspace.stage
        self.forecast.log_plan()
        teacher = best = place("teacher", config_lib.teacher_config(self.workspace.given))
        self._train(teacher)
        for suffix in config_lib.rounds(config):
            labels = place(f"labels{suffix}", config)
            labeled = with_thresholds(config, self._label(labels, best.folder))
            files, start = os.path.abspath(labels.folder), os.path.abspath(best.folder)
            best = place(f"student{suffix}", config_lib.student_config(labeled, files, start))
            self._train(best, with_labels=True)
        if config.self_training.control:
            control = config_lib.control_config(config, os.path.abspath(teacher.folder))
            self._train(place("control", control))
        return self.results

    def _train(self, stage, with_labels=False):
        name = stage.folder.name
        with self.clock(name):
            if with_labels:
                stage.prepare(place=self.workspace.data.folder)
            self.reuse.training(stage)
            self.results[name] = train_stage(stage, forecast=self.forecast)
        self.forecast.ended(name)

    def _label(self, stage, weights):
        with self.clock(stage.folder.name):
            self.reuse.labels(stage, weights)
            _, statistics = label_stage(stage, weights)
        self.forecast.ended(stage.folder.name)
        return statistics


def write_report(config: Config, folder: StrPath) -> None:
    """Writes the report of a finished run again.

    Raises:
        UserError: if the folder holds no finished run.
    """
    folder = pathlib.Path(folder)
    last = config_lib.rounds(config)[-1]
    for file in (f"labels{last}/{LABEL_STATISTICS}", f"student{last}/{METRICS}"):
        if not (folder / file).exists():
            raise UserError(f"{folder} does not hold a finished `run`: {file} is missing")
    with Workspace.open(config, folder) as workspace:
        check_settings(config, folder)
        workspace.prepare(WITHOUT_LABELS)
        found = {
            stage: read_json_or_none(folder / stage / METRICS)
            for stage in config_lib.stages(workspace.given)
        }
        results = {stage: metrics for stage, metrics in found.items() if metrics}
        with workspace.reading():
            seconds = read_json_or_none(folder / SECONDS) or {}
            report.write(workspace, results, seconds, again=True)


class StageTimer:
    """Seconds per stage, added up over interruptions, and kept in `file` unless that is None."""

    def __init__(self, file: pathlib.Path | None) -> None:
        self.file = file
        self.seconds = (file and read_json_or_none(file)) or {}

    def __call__(self, stage: str) -> "StageTimer":
        """A context manager that measures `stage`."""
        self.stage = stage
        logging.info("stage %s", stage)
        return self

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, kind: type | None, *_: Any) -> None:
        passed = time.perf_counter() - self.began
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + passed, 2)
        if self.file:
            write_json(self.file, self.seconds)
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted in the stage {self.stage}; the same command resumes it"
            ) from None

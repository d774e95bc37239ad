"""The whole method: teacher, pseudo labels, student, control and report.

The folder of a run holds one folder for each training (`teacher`, `student`, `control`), `data`,
`labels` and `report.html`.
"""

import logging
import os
import pathlib
import time

from official_selftrain import config as config_lib
from official_selftrain.data.prepared import WITHOUT_LABELS
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.pipeline import report
from official_selftrain.pipeline.folder import METRICS, check_settings, init_run_folder, working_in
from official_selftrain.pipeline.labeling import LABEL_STATISTICS, pseudo_label
from official_selftrain.pipeline.training import train
from official_selftrain.pipeline.workspace import prepare, reading
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, write_json

SECONDS = "seconds.json"


def run(config, folder):
    """Teacher, pseudo labels, student, control and report; finished stages are not run again.

    Args:
        config: `Config` with human, unlabeled, pseudo and evaluation sources.
        folder: the run folder.

    Returns:
        `{stage: metrics}` of the trainings.

    Raises:
        UserError: for bad data or options, or if a stage fails.
    """
    folder = pathlib.Path(folder)
    missing = [name for name in ("unlabeled", "pseudo") if getattr(config, name) is None]
    if missing:
        raise UserError(f"`run` needs the section {missing[0]!r}; this experiment has none")
    if config.pseudo.given:
        raise UserError(
            "`run` labels the images of `unlabeled` itself, so pseudo.records, images, tfds and "
            "builtin must not be set; to learn from labels that exist, use "
            "`python -m official_selftrain.train`"
        )
    distribution = distribution_lib.make_distribution(config.runtime)
    with working_in(folder, distribution):
        distribution.on_chief_first(lambda: init_run_folder(config, folder))
        clock = StageTimer(folder / SECONDS if distribution.chief else None)
        with clock("data"):
            data = prepare(config, folder / "data", distribution, WITHOUT_LABELS)
            config = data.with_num_classes(config)
        results = {}
        with clock("teacher"):
            results["teacher"] = train(config_lib.teacher_config(config), folder / "teacher", data)
        best = folder / "teacher"
        for suffix in config_lib.rounds(config):
            with clock(f"labels{suffix}"):
                labels = folder / f"labels{suffix}"
                pseudo_label(config, labels, best, data)
            with clock(f"student{suffix}"):
                student = config_lib.student_config(
                    config, os.path.abspath(labels), os.path.abspath(best)
                )
                best = folder / f"student{suffix}"
                pseudo_data = prepare(student, folder / "data", distribution)
                results[best.name] = train(student, best, pseudo_data)
        if config.self_training.control:
            with clock("control"):
                control = config_lib.control_config(config, os.path.abspath(folder / "teacher"))
                results["control"] = train(control, folder / "control", data)
        with clock("report"), reading(data, distribution):
            if distribution.chief:
                report.write(config, folder, data, results, clock.seconds)
    return results


def write_report(config, folder):
    """Writes the report of a finished run again.

    Raises:
        UserError: if the folder holds no finished run.
    """
    folder = pathlib.Path(folder)
    if not (folder / "labels" / LABEL_STATISTICS).exists():
        raise UserError(
            f"{folder} is no finished folder of `run`: it has no labels/statistics.json"
        )
    distribution = distribution_lib.make_distribution(config.runtime)
    with working_in(folder, distribution):
        check_settings(config, folder)
        data = prepare(config, folder / "data", distribution, WITHOUT_LABELS)
        config = data.with_num_classes(config)
        found = {
            stage: read_json_or_none(folder / stage / METRICS)
            for stage in config_lib.stages(config)
        }
        results = {stage: metrics for stage, metrics in found.items() if metrics}
        with reading(data, distribution):
            seconds = read_json_or_none(folder / SECONDS) or {}
            report.write(config, folder, data, results, seconds, again=True)


class StageTimer:
    """Seconds per stage, added up over interruptions; in `file` unless that is None."""

    def __init__(self, file):
        self.file = file
        self.seconds = (file and read_json_or_none(file)) or {}

    def __call__(self, stage):
        self.stage = stage
        logging.info("stage %s", stage)
        return self

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, kind, *_):
        passed = time.perf_counter() - self.began
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + passed, 2)
        if self.file:
            write_json(self.file, self.seconds)
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted in the stage {self.stage}; the same command goes on there"
            ) from None

"""A study in its folder: what it needs, how long that takes, and the files of its results."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

from official_selftrain.config import Config, StudyConfig
from official_selftrain.config.studies import Cell
from official_selftrain.studies import page
from official_selftrain.studies.graph import Stage, stages_of
from official_selftrain.studies.results import Results, collect
from official_selftrain.studies.schedule import (
    DONE,
    FAILED,
    HAS_DIVERGED,
    LOG,
    Schedule,
    durations,
    reason,
    state_of,
    time_left,
)
from official_selftrain.utils.errors import UserError, duration
from official_selftrain.utils.files import locked, write_json, write_text

STAGES, STUDIES = "stages", "studies"


class Study:
    """A study in a folder, which it may share with other studies.

    Args:
        settings: what is run.
        configs: `{(variant, seed): Config}`, see `variant_configs`.
        folder: holds `stages/`, and in `studies/NAME/` the results.

    Raises:
        UserError: if the folder holds something else, or stages of other settings or data.
    """

    def __init__(
        self, settings: StudyConfig, configs: Mapping[Cell, Config], folder: pathlib.Path
    ) -> None:
        _check_folder(folder)
        self.settings, self.configs, self.folder = settings, configs, folder
        self.place = folder / STUDIES / settings.study
        self.plan = {cell: stages_of(c, folder / STAGES) for cell, c in configs.items()}
        self.stages: dict[str, Stage] = {}
        self.users: dict[str, list[str]] = {}  # {stage: the runs that it belongs to}
        for (variant, seed), stages in self.plan.items():
            for stage in stages.values():
                self.stages.setdefault(stage.name, stage)
                self.users.setdefault(stage.name, []).append(f"{variant}, seed {seed}")
        for stage in self.stages.values():
            stage.check_unchanged()

    def forecast(self, jobs: int) -> list[tuple[str, str]]:
        """What `run` would do, as (name, text).

        Args:
            jobs: number of processes at the same time.
        """
        counts = {"trainings": 0, "label sets": 0}
        for stage in self.stages.values():
            counts["label sets" if stage.kind == "labels" else "trainings"] += 1
        final = (DONE, HAS_DIVERGED) if self.settings.may_diverge else (DONE,)
        waiting = [stage for stage in self.stages.values() if state_of(stage)[0] not in final]
        left, unknown = time_left(waiting, durations(self.folder / STAGES), jobs)
        told = f"unknown before the first of each kind has run ({', '.join(sorted(unknown))})"
        shared = sum(len(users) - 1 for users in self.users.values())
        runs = f"{len(self.settings.variants)} variants x {len(self.settings.seeds)} seeds"
        return [
            ("runs", runs),
            *((name, str(count)) for name, count in counts.items()),
            ("shared", f"{shared} stages that separate runs would repeat"),
            ("finished", str(len(self.stages) - len(waiting))),
            ("time left", told if left is None else f"{duration(left)} with --jobs={jobs}"),
        ]

    def run(self, jobs: int) -> dict[str, str]:
        """Runs what is missing, and writes the results.

        Args:
            jobs: number of processes at the same time.

        Returns:
            `{stage: reason and log file}` of what has failed.

        Raises:
            UserError: if another process works in the folder.
        """
        with self._locked():
            self.write_results()
            stages = {stage: _first_of(self.users[name]) for name, stage in self.stages.items()}
            schedule = Schedule(stages, jobs, self.settings.may_diverge, self.write_results)
            states = schedule.run()
            self.write_results()
            write_text(self.place / "study.html", page.page(self.results(), dict(self.configs)))
        return {
            name: f"{reason(stage)} ({stage.folder / LOG})"
            for name, stage in self.stages.items()
            if states[name] == FAILED
        }

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.folder):
            for folder in (self.folder / STAGES, self.place):
                folder.mkdir(parents=True, exist_ok=True)
            yield

    def results(self) -> Results:
        """What has been measured so far."""
        return collect(self.settings, self.plan)

    def write_results(self) -> None:
        """Writes `results.csv`, `results.json` and `study.md`."""
        results = self.results()
        write_text(self.place / "results.csv", results.as_csv())
        write_json(self.place / "results.json", results.as_json())
        write_text(self.place / "study.md", results.as_markdown())


def _first_of(users):
    return users[0] + (f", and {len(users) - 1} more" if len(users) > 1 else "")


def _check_folder(folder):
    """Refuses a folder that holds something else than studies."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; --model_dir must be a folder")
    # The output of the command may be kept there.
    names = [path.name for path in folder.iterdir() if path.suffix not in (".log", ".txt")]
    names = sorted(name for name in names if not name.startswith("."))
    if names and STAGES not in names:
        raise UserError(
            f"{folder} holds something else than studies, such as {names[0]}; choose a new or an "
            "empty folder as --model_dir"
        )

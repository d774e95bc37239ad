"""Runs the stages of a study, several at a time, each in a process of its own."""

import logging
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from official_selftrain import config as config_lib
from official_selftrain.engine.guards import DIVERGED
from official_selftrain.studies.graph import SETTINGS, Stage
from official_selftrain.utils.errors import TrainingInterrupted, duration
from official_selftrain.utils.files import read_json_or_none, write_json, write_text

STATE = "stage.json"  # {"state": ..., "seconds": ..., "status": ...}
LOG = "log.txt"
DONE, FAILED, HAS_DIVERGED, BLOCKED, WAITING = "done", "failed", "diverged", "blocked", "waiting"
THREADS = "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"
# What only an unfinished stage needs; with dozens of stages they would fill the disk.
SCRATCH = "data", "checkpoints"
BEGINNING = "--- started\n"  # in the log, of each process
POLL = 0.2  # seconds between two looks at the processes


def state_of(stage: Stage) -> tuple[str, float]:
    """The state that a stage has reached, and the seconds that it has taken so far."""
    found = read_json_or_none(stage.folder / STATE)
    found = found if isinstance(found, dict) else {}
    return found.get("state", WAITING), found.get("seconds", 0.0)


def durations(folder: pathlib.Path) -> dict[str, float]:
    """`{kind: mean seconds}` of the finished stages in a folder."""
    seconds: dict[str, list[float]] = {}
    for file in sorted(folder.glob(f"*/{STATE}")):
        found = read_json_or_none(file)
        if isinstance(found, dict) and found.get("state") == DONE:
            kind = file.parent.name.rpartition("-")[0]
            seconds.setdefault(kind, []).append(found["seconds"])
    return {kind: sum(values) / len(values) for kind, values in seconds.items()}


def time_left(
    stages: Iterable[Stage], known: Mapping[str, float], jobs: int
) -> tuple[float | None, set[str]]:
    """Seconds that stages take with N jobs, or None; and the kinds whose duration is unknown."""
    kinds = [stage.kind for stage in stages]
    unknown = set(kinds) - known.keys()
    return (None if unknown else sum(known[kind] for kind in kinds) / jobs), unknown


class Schedule:
    """Runs stages in the order of their dependencies.

    Args:
        stages: `{stage: what it is for}`, each after its parents; they are begun in this order as
            far as the parents permit.
        jobs: number of processes at the same time.
        may_diverge: a training whose loss is not finite is a result; otherwise it has failed.
        on_end: called whenever a stage has ended.
    """

    def __init__(
        self,
        stages: Mapping[Stage, str],
        jobs: int,
        may_diverge: bool,
        on_end: Callable[[], Any] = lambda: None,
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.purposes = {stage.name: purpose for stage, purpose in stages.items()}
        self.jobs = jobs
        self.on_end = on_end
        self.final = {DONE, HAS_DIVERGED} if may_diverge else {DONE}
        self.states: dict[str, str] = {}
        for name, stage in self.stages.items():
            state, _ = state_of(stage)
            self.states[name] = state if state in self.final else WAITING
        self.running: dict[str, tuple[subprocess.Popen, float]] = {}
        self.told: set[str] = set()

    def run(self) -> dict[str, str]:
        """Runs what has not ended yet, and returns `{name: state}`.

        An interruption stops the processes, which save their work first, and is raised again.
        """
        done = sum(state in self.final for state in self.states.values())
        if done:
            logging.info("%d of %d stages have ended already", done, len(self.stages))
        try:
            while True:
                self._block()
                self._start_ready()
                if not self.running and WAITING not in self.states.values():
                    return self.states
                time.sleep(POLL)
                for name in list(self.running):
                    self._look_at(name)
        finally:
            self._stop()

    def _block(self):
        """Gives up stages of which a parent has not ended well."""
        for name, stage in self.stages.items():
            parents = {self.states[parent.name] for parent in stage.parents}
            if self.states[name] == WAITING and parents & {FAILED, HAS_DIVERGED, BLOCKED}:
                self.states[name] = BLOCKED

    def _start_ready(self):
        for name, stage in self.stages.items():
            if len(self.running) >= self.jobs:
                return
            ready = all(self.states[parent.name] == DONE for parent in stage.parents)
            if self.states[name] == WAITING and ready and name not in self.running:
                self._start(stage)

    def _start(self, stage):
        stage.folder.mkdir(parents=True, exist_ok=True)
        with open(stage.folder / LOG, "ab") as log:
            if not _is_free(log):
                if stage.name not in self.told:
                    self.told.add(stage.name)
                    logging.warning(
                        "%s waits for its process, which an earlier study has left", stage.name
                    )
                return
            write_text(stage.folder / SETTINGS, config_lib.dump(stage.config))
            log.write(BEGINNING.encode())
            log.flush()
            process = subprocess.Popen(
                stage.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self.jobs),
                # Ctrl-C goes to the study, which passes it on.
                start_new_session=True,
            )
        self.running[stage.name] = process, time.monotonic()
        logging.info("%s started: %s", stage.name, self.purposes[stage.name])

    def _look_at(self, name):
        """Notes the end of a process, if it has ended."""
        process, began = self.running[name]
        if process.poll() is None:
            return
        del self.running[name]
        stage = self.stages[name]
        state = self._state(stage, process.returncode)
        seconds = state_of(stage)[1] + time.monotonic() - began
        found = {"state": state, "seconds": round(seconds, 1), "status": process.returncode}
        write_json(stage.folder / STATE, found)
        self.states[name] = state
        if state in self.final:
            for place in SCRATCH:
                shutil.rmtree(stage.folder / place, ignore_errors=True)
        self._report(stage, state, seconds)
        self.on_end()

    def _state(self, stage, status):
        if status == 0:
            return DONE
        if HAS_DIVERGED in self.final and (stage.folder / DIVERGED).exists():
            return HAS_DIVERGED
        return FAILED

    def _report(self, stage, state, seconds):
        ended = sum(state != WAITING for state in self.states.values())
        waiting = [s for name, s in self.stages.items() if self.states[name] == WAITING]
        left, unknown = time_left(waiting, durations(stage.folder.parent), self.jobs)
        if left is not None:
            passed = sum(time.monotonic() - began for _, began in self.running.values())
            left = max(left - passed / self.jobs, 0)
        told = f"unknown before the first {' and '.join(sorted(unknown))} has ended"
        level = logging.WARNING if state == FAILED else logging.INFO
        logging.log(
            level, "%d/%d %s %s after %s; time left: %s", ended, len(self.stages), stage.name,
            f"failed ({stage.folder / LOG})" if state == FAILED else state, duration(seconds),
            told if left is None else duration(left),
        )  # fmt: skip

    def _stop(self):
        """Ends what still runs after an interruption; a second one does not wait."""
        if not self.running:
            return
        processes = [process for process, _ in self.running.values()]
        logging.warning("stopping %s, which save their work", ", ".join(self.running))
        for process in processes:
            process.terminate()
        try:
            for process in processes:
                process.wait()
        except (KeyboardInterrupt, TrainingInterrupted):
            for process in processes:
                process.kill()
            raise
        finally:
            for name, (_, began) in self.running.items():
                stage = self.stages[name]
                seconds = round(state_of(stage)[1] + time.monotonic() - began, 1)
                write_json(stage.folder / STATE, {"state": WAITING, "seconds": seconds})


def reason(stage: Stage) -> str:
    """Why a stage has failed: the last error that its last process wrote, or its last line."""
    status = (read_json_or_none(stage.folder / STATE) or {}).get("status", 0)
    if status < 0:
        hint = "; was there too little memory?" if -status == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-status).name}{hint}"
    text = (stage.folder / LOG).read_text(encoding="utf-8", errors="replace")
    lines = text.rpartition(BEGINNING)[2].splitlines()
    # Progress bars leave the cursor on their line.
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return ([line.strip() for line in errors or lines if line.strip()] or ["no message"])[-1][-300:]


def _is_free(log):
    """Whether no process writes to a log; from now on the one that inherits it does.

    The process of a stage outlives a study that is killed. The lock is its own from its first
    moment to its last, because it belongs to the open file, not to who has opened it.
    """
    import fcntl  # not on Windows, where the rest of the package works

    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        logging.warning("%s cannot be locked", log.name)
    return True


def _environment(jobs):
    """The environment of a process, which has its share of the cores unless the user set it."""
    share = {} if jobs == 1 else dict.fromkeys(THREADS, str(max((os.cpu_count() or 1) // jobs, 1)))
    return share | os.environ

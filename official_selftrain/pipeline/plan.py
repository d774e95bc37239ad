"""What a run will do: its images, its stages, and how long they take on this machine."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence

from official_selftrain import config as config_lib
from official_selftrain.config import Config
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.utils.errors import duration

FORWARD = 1 / 3  # time of predicting an image, where that of training on it is 1
LONG = 3600.0  # seconds from which on a run comes with advice
SOURCES = {
    "human": "labeled",
    "unlabeled": "unlabeled",
    "pseudo": "pseudo-labeled",
    "selection": "held out for selection",
    "evaluation": "for evaluation",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training, or the labeling for one.

    Attributes:
        name: of its folder.
        config: with its number of steps.
        labels: whether it labels images.
    """

    name: str
    config: Config
    labels: bool = False

    def work(self, counts: dict[str, int], step: int = 0) -> float:
        """What is left to do after `step` updates, in images of a training step.

        Args:
            counts: `{source: images}`.
            step: number of updates made.
        """
        if self.labels:
            task = self.config.task
            views = sum(scale**2 for scale in task.label_scales) * (1 + task.label_flip)
            return FORWARD * views * counts.get("unlabeled", 0)
        settings = self.config.trainer
        steps = self.config.steps
        predicted = counts.get("evaluation", 0)  # by the final weights
        if interval := settings.evaluation_interval:
            left = steps - step
            if "selection" in counts:  # also measured after the last step
                weights = 2 if settings.ema_decay else 1
                predicted += math.ceil(left / interval) * weights * counts["selection"]
            else:
                predicted += max(left - 1, 0) // interval * counts.get("evaluation", 0)
        return (steps - step) * self.config.images_per_step + FORWARD * predicted


def stages_of_run(workspace: Workspace) -> list[Stage]:
    """The stages of `run` in their order, with the settings that the data completes.

    Args:
        workspace: of the run, with prepared data.
    """
    found = []
    for name, config in config_lib.stages(workspace.given, workspace.data.completed).items():
        if name.startswith("student"):
            labels = name.replace("student", "labels")
            found.append(Stage(labels, workspace.config, labels=True))
        found.append(Stage(name, workspace.stage(name, config).config))
    return found


class Forecast:
    """Says what a run will do, and, as soon as the time of a step is known, how long it will take.

    The time of a stage follows from its images: those of another stage take as long each, and
    predictions take a third. What a stage has really taken corrects the others.

    Args:
        stages: in their order.
        workspace: with prepared data; only its chief says anything.
    """

    def __init__(self, stages: Sequence[Stage], workspace: Workspace) -> None:
        self.left = {stage.name: stage for stage in stages}
        self.config, self.chief = workspace.config, workspace.distribution.chief
        summaries = workspace.data.summaries
        self.counts = {name: summary["images"] for name, summary in summaries.items()}
        self.rate = 0.0  # seconds of an image, 0.0 while unknown
        self._times: list[tuple[float, int]] = []  # seconds at which the stage was at a step
        self._warned = False

    def rows(self) -> Iterator[tuple[str, str]]:
        """Images, network, its start and the stages, as (name, text)."""
        counts = (f"{count} {SOURCES.get(name, name)}" for name, count in self.counts.items())
        yield "images", ", ".join(counts)
        yield "network", network(self.config)
        yield "start", self.config.trainer.init or "random weights"
        for stage in self.left.values():
            yield stage.name, self._text(stage)

    def _text(self, stage):
        config, held_out = stage.config, self.counts.get("selection")
        if stage.labels:
            return f"{self.counts['unlabeled']} images, {_threshold(config.pseudo, held_out)}"
        images = f"{config.human.batch_size}"
        images += f" + {config.pseudo.batch_size}" if config.pseudo else ""
        text = f"{config.steps} steps of {images} images"
        text += f", learning rate {config.optimizer.learning_rate:g}"
        if config.trainer.evaluation_interval:
            text += f", measured every {config.trainer.evaluation_interval} steps"
        return f"at most {text}" if held_out and config.selection.patience else text

    def log_plan(self) -> None:
        """Logs the rows."""
        for name, text in self.rows() if self.chief else ():
            logging.info("%s: %s", name, text)

    def pace(self, name: str, step: int, seconds: float) -> None:
        """Logs the time of all stages that are left.

        Args:
            name: of the stage that trains.
            step: number of updates that it has made.
            seconds: of one update.
        """
        self.rate = seconds / self.left[name].config.images_per_step
        self.reached(step)
        self._log(name, step)

    def reached(self, step: int) -> None:
        """Notes when the training has made `step` updates."""
        self._times.append((time.perf_counter(), step))

    def ended(self, name: str) -> None:
        """Corrects the time of the stages that are left by that of this one, and logs it."""
        stage, times, self._times = self.left.pop(name), self._times, []
        if len(times) < 2:
            return
        (began, first), (ended, last) = times[0], times[-1]
        work = stage.work(self.counts, first) - stage.work(self.counts, last)
        if work > 0:
            self.rate = (ended - began) / work
        self._log()

    def _log(self, training="", step=0):
        seconds = {
            name: self.rate * stage.work(self.counts, step if name == training else 0)
            for name, stage in self.left.items()
        }
        if not seconds or not self.chief:
            return
        total = sum(seconds.values())
        each = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        whole = f": about {duration(total)} in all" if len(seconds) > 1 else ""
        logging.info("to go: %s%s", each, whole)
        if total > LONG and not self._warned:
            self._warned = True
            logging.warning(
                "this takes more than an hour: a smaller task.image_size, fewer trainer.steps or a "
                "faster device shorten it; Ctrl-C stops, and the same command resumes"
            )


def _threshold(pseudo, held_out):
    if pseudo.score_threshold != "auto":
        return f"threshold {pseudo.score_threshold}"
    if not held_out:
        return "automatic thresholds, for which no image is held out"
    return f"thresholds with a precision of {pseudo.target_precision:.0%} on {held_out} images"


def network(config: Config) -> str:
    """Task, network and image size in words, as they are, whatever the recipe says."""
    task = config.task
    neck = "" if task.neck == "none" else f" + {task.neck}"
    height, width = task.image_size
    return f"{task.kind}, {task.backbone}{neck}, {height} x {width} pixels"

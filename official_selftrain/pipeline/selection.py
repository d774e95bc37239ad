"""Which weights a training ends with: the best ones on labeled images that are held out of it.

After each evaluation on these images the raw weights, or the averaged ones if they are better, are
kept in `best.weights.h5` if they are the best so far; `best.json` says which they are. The training
stops when its evaluations have brought nothing better for a while. At its end `best.json` also says
whether it has converged, and the best weights become those of the training.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

from official_selftrain import teacher
from official_selftrain.engine import checkpoints, memory
from official_selftrain.pipeline import evaluation
from official_selftrain.pipeline.folder import history
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import copy, read_json_or_none, write_json

SOURCE = "selection"  # in the prepared data
LEARNED = 0.01  # below it, a rise or fall of the metric is chance, and says nothing
RISE = 0.02  # relative; a last quarter of evaluations that brings less has converged


class Selection:
    """The evaluations of a training on its selection images, and what follows from them.

    Args:
        training: the `training.Training`; its data has a selection part.

    Attributes:
        values: the best value of each evaluation so far, the same on all workers.
    """

    def __init__(self, training: Any) -> None:
        self.training = training
        self.metric = training.task.headline
        self.patience = training.config.selection.patience
        self.values: list[float] = []

    @property
    def stopped(self) -> bool:
        """Whether the evaluations so far end the training."""
        return bool(self.patience) and stale(self.values) >= self.patience

    def restore(self) -> None:
        """Takes the evaluations up to the restored step from the history of the training."""
        rows = []
        if self.training.distribution.chief:
            rows = history(self.training.folder)
        # The chief's, whose file the others may not see yet as it is now.
        self.values = self.training.distribution.gather(values(rows, self.metric))[0]

    def measure(self, step: int) -> dict[str, float]:
        """Measures the present weights, raw and averaged, and keeps them if they are the best.

        Collective: all workers must call it.

        Returns:
            The values, as the history holds them.
        """
        training = self.training
        found = {f"selection_{self.metric}": self._measure(step, averaged=False)}
        if training.trainer.average is not None:
            training.trainer.average.swap_weights(training.trainer.student)
            found[f"selection_ema_{self.metric}"] = self._measure(step, averaged=True)
            training.trainer.average.swap_weights(training.trainer.student)
        self.values.append(max(found.values()))
        memory.give_back()
        return found

    def _measure(self, step, averaged):
        """The value of the weights in the network."""
        training, folder = self.training, self.training.folder
        self._predictor.refresh()
        metrics = evaluation.measure(self._predictor, training.data, training.distribution, SOURCE)
        if training.distribution.chief:
            name = "selection_ema" if averaged else "selection"
            evaluation.log_metrics(folder, step, metrics, name)
            checkpoints.save_best(
                training.trainer.student, folder, step, self.metric, metrics[self.metric], averaged
            )
        return metrics[self.metric]

    @functools.cached_property
    def _predictor(self):
        """Made once, because each predictor would trace the network again."""
        training = self.training
        batch_size = teacher.batch_size_of(training.config)
        student = training.trainer.student
        return teacher.Predictor(training.task, student, batch_size, training.distribution)

    def finish(self) -> None:
        """Makes the best weights those of the training, and says whether it has converged.

        Raises:
            UserError: if the best weights have been deleted.
        """
        folder = self.training.folder
        best, file = read_json_or_none(folder / checkpoints.BEST_RECORD), folder / checkpoints.BEST
        if not isinstance(best, dict) or not file.exists():
            raise UserError(
                f"{file}, the best weights of this training, or {checkpoints.BEST_RECORD} beside "
                f"them, is missing: restore it, or delete {folder} to train again"
            )
        best |= outcome(self.values, self.stopped)
        if best["after"] < LEARNED:  # chance has chosen; the last weights have learned the most
            last = {"step": self.training.config.steps, "value": self.values[-1]}
            best |= last | {"averaged": False}
            checkpoints.save_weights(self.training.trainer.student, folder, checkpoints.BEST)
        write_json(folder / checkpoints.BEST_RECORD, best)
        level = logging.INFO if best["converged"] else logging.WARNING
        logging.log(level, "%s", sentence(folder.name, best))
        copy(file, folder / checkpoints.WEIGHTS)


def stale(values: Sequence[float]) -> int:
    """The evaluations since the best one; 0 as long as nothing has been learned."""
    if not values or max(values) < LEARNED:
        return 0
    return len(values) - 1 - values.index(max(values))


def last_quarter(values: Sequence[float]) -> tuple[float, float]:
    """The best value before the last quarter of some evaluations, and the best of all."""
    first = len(values) - max(len(values) // 4, 1)
    return max([0.0, *values[:first]]), max([0.0, *values])


def outcome(values: Sequence[float], stopped: bool) -> dict[str, Any]:
    """What `folder.chosen` returns about the evaluations of a training that has ended.

    Args:
        values: of all its evaluations.
        stopped: whether they have ended it before its last step.
    """
    before, after = last_quarter(values)
    return {
        "evaluations": len(values),
        "before": before,
        "after": after,
        "stopped": stopped,
        "converged": stopped or (after >= LEARNED and after < before * (1 + RISE)),
    }


def values(rows: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """The best value of each evaluation on selection images in the rows of a history."""
    names = (f"selection_{metric}", f"selection_ema_{metric}")
    found = [[row[name] for name in names if name in row] for row in rows]
    return [max(value) for value in found if value]


def sentence(stage: str, best: dict[str, Any]) -> str:
    """Says whether a training had converged.

    Args:
        stage: its name.
        best: what `folder.chosen` returns.
    """
    metric = best["metric"]
    before, after = 100 * best["before"], 100 * best["after"]
    if not best["converged"]:
        if best["after"] < LEARNED:
            return (
                f"{stage} had not converged: the selection {metric} was still {after:.1f} at the "
                "last step; more steps, or another start, would help"
            )
        return (
            f"{stage} had not converged: the selection {metric} was still rising at the last step "
            f"({before:.1f} -> {after:.1f}); more steps would help"
        )
    why = (
        "its last evaluations brought nothing better"
        if best["stopped"]
        else (
            f"the last quarter of its evaluations raised the selection {metric} by less than "
            f"{RISE:.0%} ({before:.1f} -> {after:.1f})"
        )
    )
    weights = "averaged" if best["averaged"] else "raw"
    return (
        f"{stage} had converged: {why}; its weights are the {weights} ones of step "
        f"{best['step']}, with a selection {metric} of {100 * best['value']:.1f}"
    )

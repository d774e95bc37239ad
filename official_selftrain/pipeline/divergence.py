"""The batch behind a loss that is not finite: found by repeating steps, saved, and left out."""

import logging
from typing import Any

from official_selftrain.engine import guards
from official_selftrain.engine.loop import save_batch
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, write_json


class Divergence:
    """The batches of one training that are left out because their loss is not finite.

    Args:
        training: the `training.Training`.
    """

    def __init__(self, training: Any) -> None:
        self.training = training
        self.file = training.folder / "skipped.json"
        self.replays = 0

    def skipped(self) -> list[int]:
        """Steps whose batch is left out; a damaged file is made again as its batches are found."""
        steps = read_json_or_none(self.file)
        return [s for s in steps if isinstance(s, int)] if isinstance(steps, list) else []

    def leave_out(self, problem: guards.NonFiniteLossError) -> None:
        """Looks for the batch behind `problem` and leaves it out where the user allows that.

        A problem that does not occur again when its steps are repeated counts as well, or a
        training on unreliable hardware would repeat them forever.

        Raises:
            UserError: if `trainer.skip_nonfinite` allows no further batch.
        """
        self.replays += 1
        allowed = self.training.config.trainer.skip_nonfinite
        start, skipped = self.training.restore(), self.skipped()
        logging.warning("%s; looking for its batch from step %d on", problem, start)
        found = self._replay(start, problem.step, skipped)
        problem, batch_file = found or (problem, "not found when the steps were repeated")
        if found and len(skipped) < allowed:
            logging.warning("%s: its batch, saved in %s, is left out", problem, batch_file)
            self._skip([*skipped, problem.step - 1])
        elif found or self.replays > allowed:
            if self.training.distribution.chief:
                diverged = {"step": problem.step, "scalar": problem.name}
                write_json(self.training.folder / guards.DIVERGED, diverged)
            raise UserError(
                f"{problem}: the training diverged. The last good checkpoint is "
                f"{self.training.saved.path(start)}; the batch is {batch_file}. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_steps or set "
                "optimizer.clip_norm; or, if a single batch is at fault, leave up to N batches out "
                "with trainer.skip_nonfinite=N"
            )

    def _replay(self, start, end, skipped):
        """(problem, file of its batch) of the first step in start..end that goes wrong, or None."""
        loop, distribution = self.training.loop(start), self.training.distribution
        for step in range(start, end):
            batch = loop.batch()
            if step in skipped:
                continue
            try:
                guards.check_finite(loop.step(batch), step + 1)
            except guards.NonFiniteLossError as problem:
                name = f"nonfinite-{step:08d}-{distribution.worker}.npz"
                save_batch(str(self.training.folder / name), batch, distribution)
                return problem, str(self.training.folder / name)
        return None

    def _skip(self, steps):
        # Every worker has read the file before the chief writes it, and reads it again after.
        distribution = self.training.distribution
        distribution.barrier()
        if distribution.chief:
            write_json(self.file, steps)
        distribution.barrier()

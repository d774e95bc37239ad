"""The training loop: several steps of a trainer in one call, then scalars and progress.

Keras' `fit` fails with several workers, and under a mirrored strategy with several steps per call.
One `tf.function` around `strategy.run` gives the same losses and works with all strategies. On JAX
each step is a call of its own, which JAX compiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras
import numpy as np
from tqdm import tqdm

from official_selftrain.engine.distribution import Distribution
from official_selftrain.engine.guards import Watchdog, check_finite
from official_selftrain.engine.step import GradientTrainer
from official_selftrain.engine.summaries import Summaries
from official_selftrain.utils.types import StrPath, Tensor

# Approximate limit of one call to the device. During a call the progress bar stands still, and
# signals wait.
CALL_SECONDS = 5.0

Batch = list[tuple[dict, dict]]  # one (images by source, labels by source) per micro-batch


def make_loop(
    trainer: GradientTrainer,
    dataset: Iterable,
    distribution: Distribution,
    micro_batches: int = 1,
) -> TensorFlowLoop | JaxLoop:
    """The loop of a trainer on its input, for the current Keras backend.

    Args:
        trainer: a compiled `SelfTrainer`, created in the scope of `distribution`.
        dataset: endless and already distributed `tf.data.Dataset` of (images by source, labels by
            source); on JAX also any iterable of such NumPy arrays.
        distribution: the devices.
        micro_batches: number of elements of `dataset` whose gradients make one update; more than 1
            needs TensorFlow.
    """
    if keras.backend.backend() == "tensorflow":
        return TensorFlowLoop(trainer, dataset, distribution, micro_batches)
    return JaxLoop(trainer, dataset)


class TensorFlowLoop:
    """Several steps in one `tf.function`.

    Args:
        trainer, dataset, distribution, micro_batches: see `make_loop`.

    Attributes:
        divisible: whether the updates between two reports may be divided into any number of calls.
        may_pause: whether a checkpoint may be saved between two of these calls.
    """

    def __init__(
        self,
        trainer: GradientTrainer,
        dataset: Iterable,
        distribution: Distribution,
        micro_batches: int,
    ):
        import tensorflow as tf

        self.trainer = trainer
        self.strategy = distribution.strategy
        # Collective operations need the same calls on all workers, whose clocks differ.
        self.divisible = self.may_pause = distribution.workers == 1
        self.micro_batches = micro_batches
        self.iterator = iter(dataset)
        compiled = {"autograph": False, "jit_compile": True}
        step = trainer.train_step if micro_batches == 1 else trainer.accumulate_step
        # XLA compiles the step but not the loop, because it cannot compile the input iterator.
        self._first = tf.function(step, **compiled) if distribution.compile else step

        # Without AutoGraph, which Keras code does not need: it would trace the step twice.
        @tf.function(autograph=False)
        def steps(iterator, count):
            self._repeat(lambda: self._update(iterator), count)

        @tf.function(autograph=False)
        def step_on(batch):
            for micro_batch in batch:
                self.strategy.run(self._first, args=(micro_batch,))
            if len(batch) > 1:
                self.strategy.run(trainer.update_step)

        self._steps, self._step = steps, step_on

    def _update(self, iterator):
        micro_batches = self.micro_batches
        self._repeat(lambda: self.strategy.run(self._first, (next(iterator),)), micro_batches)
        if micro_batches > 1:
            self.strategy.run(self.trainer.update_step)

    @staticmethod
    def _repeat(function: Callable[[], Any], count: Tensor | int) -> None:
        """Calls `function` `count` times in sequence."""
        import tensorflow as tf

        if isinstance(count, int) and count == 1:
            function()
            return

        def body(done):
            function()
            return (done + 1,)

        # Updates depend on each other; parallel iterations would only fetch batches too early.
        tf.while_loop(lambda done: done < count, body, (0,), parallel_iterations=1)

    def steps(self, count: int, report: bool = True) -> dict[str, float]:
        """Makes `count` updates.

        Returns:
            The means of all scalars since the last report; {} if `report` is False.
        """
        import tensorflow as tf

        self._steps(self.iterator, tf.constant(count))
        return self._scalars() if report else {}

    def batch(self) -> Batch:
        """Takes the input of the next update: a list of micro-batches."""
        return [next(self.iterator) for _ in range(self.micro_batches)]

    def step(self, batch: Batch) -> dict[str, float]:
        """Makes one update from a batch and returns its scalars."""
        self._step(batch)
        return self._scalars()

    def _scalars(self) -> dict[str, float]:
        """Means since the last call, without the scalars that no step has updated."""
        trackers = self.trainer.trackers
        scalars = {n: number(t.result()) for n, t in trackers.items() if number(t.count) > 0}
        for tracker in trackers.values():
            tracker.reset_state()
        return scalars


class JaxLoop:
    """One call per step.

    Args:
        trainer, dataset: see `make_loop`.
    """

    divisible = True
    may_pause = False  # the scalars since the last report are not in the checkpoint

    def __init__(self, trainer: GradientTrainer, dataset: Iterable):
        self.trainer = trainer
        self._rows: list[dict[str, float]] = []
        # JAX does not accept TensorFlow's tensors.
        numpy = getattr(dataset, "as_numpy_iterator", None)
        self.iterator = numpy() if numpy else iter(dataset)

    def steps(self, count: int, report: bool = True) -> dict[str, float]:
        """Makes `count` updates; see `TensorFlowLoop.steps`."""
        self._rows += [self.step(self.batch()) for _ in range(count)]
        if not report:
            return {}
        # `step` resets the trackers, so the means have to be taken here.
        rows, self._rows = self._rows, []
        names = dict.fromkeys(name for row in rows for name in row)
        return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}

    def batch(self) -> Batch:
        """Takes the input of the next update: a list of one batch."""
        return [next(self.iterator)]

    def step(self, batch: Batch) -> dict[str, float]:
        """Makes one update from a batch and returns its scalars."""
        images, labels = batch[0]
        scalars = self.trainer.train_on_batch(images, labels, return_dict=True)
        trackers = self.trainer.trackers
        scalars = {n: float(scalars[n]) for n, t in trackers.items() if float(t.count)}
        for tracker in trackers.values():
            tracker.reset_state()
        return scalars


class _Pace:
    """Divides updates into calls to the device; the division changes no result.

    The first two calls make one update each: the first one compiles, the second one shows how long
    an update takes. Later calls take a few seconds.

    Args:
        bar: the progress bar, which moves after each call.
        on_pace: called with (updates made in all, seconds of one update) after the second call.

    Attributes:
        seconds: time of one update, 0.0 while unknown.
        calls: number of calls so far.
    """

    def __init__(self, bar: tqdm, on_pace: Callable[[int, float], None]) -> None:
        self.bar, self.on_pace = bar, on_pace
        self.seconds, self.calls = 0.0, 0

    def call(
        self, loop: TensorFlowLoop | JaxLoop, step: int, end: int
    ) -> tuple[int, dict[str, float]]:
        """Makes one call, from `step` to `end` at most.

        Returns:
            Number of updates made in all; scalars, which are {} before `end`.
        """
        count, began = 1, time.perf_counter()
        if self.calls >= 2:
            most = max(int(CALL_SECONDS / self.seconds), 1) if loop.divisible else end - step
            count = min(end - step, most)
        scalars = loop.steps(count, report=step + count == end)
        number(loop.trainer.optimizer.iterations)  # waits for the device
        self.calls += 1
        if self.calls > 1:
            # Never 0, by which the next call would divide.
            self.seconds = max((time.perf_counter() - began) / count, 1e-9)
        self.bar.update(count)
        if self.calls == 2:
            self.bar.clear()  # what is logged gets a line of its own
            self.on_pace(step + count, self.seconds)
        return step + count, scalars

    def is_long(self, loop: TensorFlowLoop | JaxLoop, updates: int) -> bool:
        """Whether so many updates take several calls, between which the training may be left."""
        return loop.may_pause and self.seconds * updates > CALL_SECONDS


def run_loop(
    loop: TensorFlowLoop | JaxLoop,
    steps: int,
    *,
    start_step: int = 0,
    steps_per_loop: int = 100,
    summary_folder: StrPath | None = None,
    on_loop: Callable[[int, dict[str, float]], bool | None] = lambda *_: None,
    title: str = "train",
    images_per_step: int = 0,
    skipped: Collection[int] = (),
    stall_seconds: float = 0,
    on_pause: Callable[[int], None] = lambda _: None,
    on_pace: Callable[[int, float], None] = lambda *_: None,
) -> None:
    """Trains until `steps` updates have been made, or until `on_loop` ends it.

    Args:
        loop: the result of `make_loop`.
        steps, start_step: numbers of updates in all, and made already.
        steps_per_loop, images_per_step: updates between two reports, and images of each update.
        summary_folder: folder for TensorBoard, or None.
        on_loop: called with (step, means of the scalars) after each loop; true ends the training.
        title: text of the progress bar; "" hides it.
        skipped: steps whose batch is taken from the input without an update.
        stall_seconds: time without progress before a warning; 0 turns warnings off.
        on_pause: called with (step) after each loop and inside long ones; it may save and raise.
        on_pace: called once with (step, seconds of one update), after two updates.

    Raises:
        NonFiniteLossError: if a loss or the gradient norm is not finite.
    """
    step = start_step
    with (
        tqdm(total=steps, initial=start_step, desc=title, unit="step", disable=not title) as bar,
        Watchdog(stall_seconds) as watchdog,
        Summaries(summary_folder) as summaries,
    ):
        pace = _Pace(bar, on_pace)
        while step < steps:
            if step in skipped:
                loop.batch()  # used up, because the position in the data follows from the step
                step += 1
                bar.update(1)
                continue
            first, began = step, time.perf_counter()
            end = _end_of_loop(step, steps, steps_per_loop, skipped)
            while step < end:
                watchdog.alive(step)
                step, scalars = pace.call(loop, step, end)
                if step < end and pace.is_long(loop, end - step):
                    on_pause(step)
            seconds = time.perf_counter() - began
            scalars["images_per_second"] = (end - first) * images_per_step / seconds
            scalars["learning_rate"] = number(loop.trainer.optimizer.learning_rate)
            check_finite(scalars, step)  # before `on_loop`, which would save the broken weights
            summaries.write(step, scalars)
            bar.set_postfix_str(_postfix(scalars))
            steps = step if on_loop(step, {"step": step, **scalars}) else steps
            on_pause(step)


def _end_of_loop(step: int, steps: int, steps_per_loop: int, skipped: Collection[int]) -> int:
    """The step at which the loop that starts at `step` ends.

    Loops end at multiples of `steps_per_loop`, wherever they start, so that a resumed training
    reports at the same steps.
    """
    ends = [s for s in skipped if s > step]
    return min([step + steps_per_loop - step % steps_per_loop, steps, *ends])


def _postfix(scalars: dict[str, float]) -> str:
    """The losses on labels for the progress bar; `loss` includes the weight decay."""
    names = {"human_loss": "human", "pseudo_loss": "pseudo"}
    losses = [f"{text} {scalars[name]:.3f}" for name, text in names.items() if name in scalars]
    return f"loss {', '.join(losses)}, {scalars['images_per_second']:.0f} images/s"


def save_batch(path: StrPath, batch: Batch, distribution: Distribution) -> None:
    """Writes this worker's part of a batch to a NumPy archive.

    Arrays are named `MICRO_BATCH/images/SOURCE` and `MICRO_BATCH/labels/SOURCE/NAME`.

    Args:
        path: the file, which ends in `.npz`.
        batch: the result of `batch()` of a loop.
        distribution: the devices of the loop.
    """
    arrays: dict[str, Tensor] = {}
    for index, (images, labels) in enumerate(batch):
        arrays |= {f"{index}/images/{source}": x for source, x in images.items()}
        for source, values in labels.items():
            arrays |= {f"{index}/labels/{source}/{name}": x for name, x in values.items()}
    local: dict[str, Any] = {name: distribution.local(x) for name, x in arrays.items()}
    np.savez_compressed(path, **local)


def number(value: Tensor) -> float:
    """A scalar, which may be a variable on several replicas, as a Python float."""
    return float(keras.ops.convert_to_numpy(value))

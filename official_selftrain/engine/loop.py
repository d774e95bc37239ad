"""The training loop: k steps of `SelfTrainer.train_step` in one call, then scalars and progress.

Keras' `fit` fails with several workers, and under a mirrored strategy with several steps per call;
one `tf.function` around `strategy.run` gives the same losses and works with all of them. On JAX a
step is a call, which JAX compiles.
"""

import logging
import time

import keras
import numpy as np
from tqdm import tqdm

from official_selftrain.engine.guards import Watchdog, check_finite
from official_selftrain.engine.summaries import Summaries

CALL_SECONDS = 5.0  # about the longest call to the device, so that bar and signals are not stuck


def make_loop(trainer, dataset, distribution, micro_batches=1):
    """Steps of a trainer on its input, on the backend at hand.

    Args:
        trainer: a compiled `SelfTrainer`, made in the scope of `distribution`.
        dataset: endless `tf.data.Dataset` of (images by source, labels by source), distributed
            already; on JAX also any iterable of such NumPy arrays.
        distribution: `distribution.Distribution`.
        micro_batches: elements of `dataset` whose gradients make one update (TensorFlow).

    Returns:
        an object with `steps(count, report=True)`, which makes updates and, unless told otherwise,
        returns the means of all scalars since the last report; `batch()`, the input of the next
        update, a list of micro-batches; `step(batch)`, which makes an update from it and returns
        its scalars; and `divisible`, whether the updates between two reports may be spread over
        any number of calls, and a checkpoint be saved in between.
    """
    if keras.backend.backend() == "tensorflow":
        return TensorFlowLoop(trainer, dataset, distribution, micro_batches)
    return JaxLoop(trainer, dataset)


class TensorFlowLoop:
    """Several steps in one `tf.function`; see `make_loop`."""

    def __init__(self, trainer, dataset, distribution, micro_batches):
        import tensorflow as tf

        self.trainer = trainer
        self.strategy = distribution.strategy
        # The collective operations of several workers need the same calls on all of them.
        self.divisible = distribution.workers == 1
        self.micro_batches = micro_batches
        self.iterator = iter(dataset)
        compiled = {"autograph": False, "jit_compile": True}
        step = trainer.train_step if micro_batches == 1 else trainer.accumulate_step
        self._first = tf.function(step, **compiled) if distribution.compile else step

        # AutoGraph would trace the step twice for a `for` loop; Keras code needs none of it.
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
    def _repeat(function, count):
        """Calls `function` `count` times, one after the other."""
        import tensorflow as tf

        if isinstance(count, int) and count == 1:
            function()
            return

        def body(done):
            function()
            return (done + 1,)

        tf.while_loop(lambda done: done < count, body, (0,), parallel_iterations=1)

    def steps(self, count, report=True):
        import tensorflow as tf

        self._steps(self.iterator, tf.constant(count))
        return self._scalars() if report else {}

    def batch(self):
        return [next(self.iterator) for _ in range(self.micro_batches)]

    def step(self, batch):
        self._step(batch)
        return self._scalars()

    def _scalars(self):
        """Means since the last call, leaving out what no step has updated."""
        trackers = self.trainer.trackers
        scalars = {n: number(t.result()) for n, t in trackers.items() if number(t.count) > 0}
        for tracker in trackers.values():
            tracker.reset_state()
        return scalars


class JaxLoop:
    """A call for each step; see `make_loop`."""

    divisible = False  # what was added up since the last report is in no checkpoint

    def __init__(self, trainer, dataset):
        self.trainer = trainer
        self._rows = []
        numpy = getattr(dataset, "as_numpy_iterator", None)
        self.iterator = numpy() if numpy else iter(dataset)

    def steps(self, count, report=True):
        self._rows += [self.step(self.batch()) for _ in range(count)]
        if not report:
            return {}
        rows, self._rows = self._rows, []
        names = dict.fromkeys(name for row in rows for name in row)
        return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}

    def batch(self):
        return [next(self.iterator)]

    def step(self, batch):
        images, labels = batch[0]
        scalars = self.trainer.train_on_batch(images, labels, return_dict=True)
        trackers = self.trainer.trackers
        scalars = {n: float(scalars[n]) for n, t in trackers.items() if float(t.count)}
        for tracker in trackers.values():
            tracker.reset_state()
        return scalars


class _Pace:
    """Divides updates into calls to the device; no number depends on how.

    The first two calls make one update each: the first compiles, the second shows how long an
    update takes. Later calls take a few seconds.

    Attributes:
        seconds: an update, 0.0 while that is unknown.
        calls: made so far.
    """

    def __init__(self):
        self.seconds, self.calls = 0.0, 0

    def call(self, loop, step, end):
        """Makes updates from `step` on, at most up to `end`; returns (updates made, scalars)."""
        count, began = 1, time.perf_counter()
        if self.calls >= 2:
            few = max(int(CALL_SECONDS / self.seconds), 1)
            count = min(end - step, few) if loop.divisible else end - step
        scalars = loop.steps(count, report=step + count == end)
        number(loop.trainer.optimizer.iterations)  # waits for the device
        self.calls += 1
        if self.calls > 1:
            self.seconds = max((time.perf_counter() - began) / count, 1e-9)
        return step + count, scalars


def run_loop(
    loop,
    steps,
    *,
    start_step=0,
    steps_per_loop=100,
    summary_folder=None,
    on_loop=None,
    title="train",
    images_per_step=0,
    skipped=(),
    stall_seconds=0,
    quiet=False,
    on_pause=None,
):
    """Trains until `steps` updates have been made.

    Args:
        loop: of `make_loop`.
        steps: updates in all, counted from 0.
        start_step: updates made already.
        steps_per_loop: updates between two reports.
        summary_folder: for TensorBoard scalars, or None.
        on_loop: function (step, scalars) called after each loop; scalars are means over its steps.
        title: of the progress bar.
        images_per_step: for images/s.
        skipped: steps whose batch is left out.
        stall_seconds: between warnings while no loop ends; 0 for none.
        quiet: no progress bar.
        on_pause: function (step) called wherever the training may be saved and left: after each
            loop, and inside of a loop whose end is far.

    Raises:
        NonFiniteLossError: if a loss or the gradient is no longer finite.
    """
    step, pace = start_step, _Pace()
    with (
        tqdm(total=steps, initial=start_step, desc=title, unit="step", disable=quiet) as progress,
        Watchdog(stall_seconds) as watchdog,
        Summaries(summary_folder) as summaries,
    ):
        while step < steps:
            if step in skipped:
                loop.batch()
                step += 1
                progress.update(1)
                continue
            first, began = step, time.perf_counter()
            ends = [s for s in skipped if s > step]
            end = min([step + steps_per_loop - step % steps_per_loop, steps, *ends])
            while step < end:
                watchdog.alive(step)
                step, scalars = pace.call(loop, step, end)
                if pace.calls == 2 and not quiet:
                    logging.info(
                        "%s: %d of %d steps to go, about %s",
                        title, steps - step, steps, duration(pace.seconds * (steps - step)),
                    )  # fmt: skip
                if step < end:
                    progress.update(step - progress.n)
                    if on_pause and loop.divisible and pace.seconds * (end - step) > CALL_SECONDS:
                        on_pause(step)
            scalars["learning_rate"] = number(loop.trainer.optimizer.learning_rate)
            seconds = time.perf_counter() - began
            scalars["images_per_second"] = (end - first) * images_per_step / seconds
            check_finite(scalars, step)
            summaries.write(step, scalars)
            progress.set_postfix_str(_postfix(scalars), refresh=False)
            progress.update(step - progress.n)
            if on_loop:
                on_loop(step, {"step": step, **scalars})
            if on_pause:
                on_pause(step)


def _postfix(scalars):
    """The losses on labels for the progress bar; `loss` also holds the weight decay."""
    names = {"human_loss": "human", "pseudo_loss": "pseudo"}
    losses = [f"{text} {scalars[name]:.3f}" for name, text in names.items() if name in scalars]
    return f"loss {', '.join(losses)}, {scalars['images_per_second']:.0f} images/s"


def duration(seconds):
    """Seconds for people: "40 s", "12 min" or "1.6 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def save_batch(path, batch, distribution):
    """Writes what `batch()` of a loop returned, as far as this worker has it, to a NumPy archive.

    Arrays are called `MICRO_BATCH/images/SOURCE` and `MICRO_BATCH/labels/SOURCE/NAME`.
    """
    arrays = {}
    for index, (images, labels) in enumerate(batch):
        arrays |= {f"{index}/images/{source}": x for source, x in images.items()}
        for source, values in labels.items():
            arrays |= {f"{index}/labels/{source}/{name}": x for name, x in values.items()}
    np.savez_compressed(path, **{name: distribution.local(x) for name, x in arrays.items()})


def number(value):
    """A Python float, also of a variable that is spread over replicas."""
    return float(keras.ops.convert_to_numpy(value))

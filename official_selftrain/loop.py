"""The training loop: k steps of `SelfTrainer.train_step` in one call, then scalars and progress.

Keras' `fit` fails with several workers, and under a mirrored strategy with several steps per call;
one `tf.function` around `strategy.run` gives the same losses and works with all of them. On JAX a
step is a call, which JAX compiles.
"""

import contextlib
import logging
import math
import signal
import threading
import time

import keras
import numpy as np
from tqdm import tqdm


class Sigterm:
    """Notes SIGTERM, which schedulers send before they take a machine away, instead of dying.

    Works as a context manager, in the main thread only; elsewhere it notes nothing.

    Attributes:
        received: whether the signal came.
    """

    received = False

    def __enter__(self):
        self.handled = threading.current_thread() is threading.main_thread()
        if self.handled:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self.handled:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_):
        self.received = True
        logging.warning("SIGTERM: saving at the end of this loop of steps")


class Watchdog:
    """Warns, again and again, while nothing happens: a dead input would else stall in silence.

    Args:
        seconds: between two signs of life, or two warnings; 0 never warns.
    """

    def __init__(self, seconds):
        self.seconds = seconds
        self.step = None
        self._life = threading.Event()
        self._ended = False

    def __enter__(self):
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended = True
        self._life.set()

    def alive(self, step):
        self.step = step
        self._life.set()

    def _watch(self):
        waited = 0
        while not self._ended:
            if self._life.wait(self.seconds):
                self._life.clear()
                waited = 0
                continue
            waited += self.seconds
            logging.warning(
                "no loop of steps has ended for %d s, since step %s: the input is stuck, another "
                "worker is gone, or %d s are too few for a loop (runtime.stall_seconds)",
                waited, self.step, self.seconds,
            )  # fmt: skip


class NonFinite(Exception):
    """A loss, or the gradient, is no longer a finite number.

    Attributes:
        name: of the scalar.
        step: updates at the end of the loop in which it was seen.
    """

    def __init__(self, name, step):
        super().__init__(f"{name} is not finite before step {step}")
        self.name, self.step = name, step


def make_loop(trainer, dataset, distribution, micro_batches=1):
    """Steps of a trainer on its input, on the backend at hand.

    Args:
        trainer: a compiled `SelfTrainer`, made in the scope of `distribution`.
        dataset: endless `tf.data.Dataset` of (images by source, labels by source), distributed
            already; on JAX also any iterable of such NumPy arrays.
        distribution: `distribution.Distribution`.
        micro_batches: elements of `dataset` whose gradients make one update (TensorFlow).

    Returns:
        an object with `run(count)`, which makes updates and returns the means of their scalars;
        `batch()`, the input of the next update, a list of micro-batches; and `step(batch)`, which
        makes an update from it and returns its scalars.
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
        self.micro_batches = micro_batches
        self.iterator = iter(dataset)
        compiled = {"autograph": False, "jit_compile": True}
        step = trainer.train_step if micro_batches == 1 else trainer.accumulate_step
        self._first = tf.function(step, **compiled) if distribution.compile else step

        # AutoGraph would trace the step twice for a `for` loop; Keras code needs none of it.
        @tf.function(autograph=False)
        def run(iterator, count):
            self._repeat(lambda: self._update(iterator), count)

        @tf.function(autograph=False)
        def step_on(batch):
            for micro_batch in batch:
                self.strategy.run(self._first, args=(micro_batch,))
            if len(batch) > 1:
                self.strategy.run(trainer.update_step)

        self._run, self._step = run, step_on

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

    def run(self, count):
        import tensorflow as tf

        self._run(self.iterator, tf.constant(count))
        return self._scalars()

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

    def __init__(self, trainer, dataset):
        self.trainer = trainer
        numpy = getattr(dataset, "as_numpy_iterator", None)
        self.iterator = numpy() if numpy else iter(dataset)

    def run(self, count):
        rows = [self.step(self.batch()) for _ in range(count)]
        names = dict.fromkeys(name for row in rows for name in row)
        return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}

    def batch(self):
        return [next(self.iterator)]

    def step(self, batch):
        images, labels = batch[0]
        scalars = self.trainer.train_on_batch(images, labels, return_dict=True)
        return {n: float(scalars[n]) for n, t in self.trainer.trackers.items() if float(t.count)}


def train(
    loop,
    steps,
    start_step=0,
    steps_per_loop=100,
    summary_folder=None,
    on_loop=None,
    title="train",
    images_per_step=0,
    skipped=(),
    stall_seconds=0,
    quiet=False,
):
    """Trains until `steps` updates have been made.

    Args:
        loop: of `make_loop`.
        steps: updates in all, counted from 0.
        start_step: updates made already.
        steps_per_loop: updates in one call to the device.
        summary_folder: for TensorBoard scalars, or None.
        on_loop: function (step, scalars) called after each loop; scalars are means over its steps.
        title: of the progress bar.
        images_per_step: for images/s.
        skipped: steps whose batch is left out.
        stall_seconds: between warnings while no loop ends; 0 for none.
        quiet: no progress bar.

    Raises:
        NonFinite: if a loss or the gradient is no longer finite.
    """
    step = start_step
    with (
        tqdm(total=steps, initial=start_step, desc=title, unit="step", disable=quiet) as progress,
        Watchdog(stall_seconds) as watchdog,
        _summaries(summary_folder) as write,
    ):
        while step < steps:
            watchdog.alive(step)
            if step in skipped:
                loop.batch()
                step += 1
                progress.update(1)
                continue
            ends = [s for s in skipped if s > step]
            count = min(steps_per_loop - step % steps_per_loop, min([steps, *ends]) - step)
            began = time.perf_counter()
            scalars = loop.run(count)
            step += count
            scalars["learning_rate"] = number(loop.trainer.optimizer.learning_rate)
            seconds = time.perf_counter() - began
            scalars["images_per_second"] = count * images_per_step / seconds
            check_finite(scalars, step)
            write(step, scalars)
            progress.set_postfix_str(
                f"loss {scalars['loss']:.3f}, {scalars['images_per_second']:.0f} images/s"
            )
            progress.update(count)
            if on_loop:
                on_loop(step, {"step": step, **scalars})


@contextlib.contextmanager
def _summaries(folder):
    """A function (step, scalars) that writes for TensorBoard."""
    if folder is None:
        yield lambda step, scalars: None
        return
    import tensorflow as tf

    writer = tf.summary.create_file_writer(folder)

    def write(step, scalars):
        with writer.as_default(step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
        writer.flush()

    yield write
    writer.close()


def save_batch(path, batch, strategy):
    """Writes what `batch()` of a loop returned, as far as this worker has it, to a NumPy archive.

    Arrays are called `MICRO_BATCH/images/SOURCE` and `MICRO_BATCH/labels/SOURCE/NAME`.
    """
    arrays = {}
    for index, (images, labels) in enumerate(batch):
        arrays |= {f"{index}/images/{source}": x for source, x in images.items()}
        for source, values in labels.items():
            arrays |= {f"{index}/labels/{source}/{name}": x for name, x in values.items()}
    if strategy is not None:
        local = strategy.experimental_local_results
        arrays = {
            key: np.concatenate([np.asarray(x) for x in local(v)]) for key, v in arrays.items()
        }
    np.savez_compressed(path, **arrays)


def number(value):
    """A Python float, also of a variable that is spread over replicas."""
    return float(keras.ops.convert_to_numpy(value))


def check_finite(scalars, step):
    """Raises `NonFinite` for the first scalar that decides the training and is not finite."""
    for name in ("loss", "human_loss", "pseudo_loss", "gradient_norm"):
        if not math.isfinite(scalars.get(name, 0.0)):
            raise NonFinite(name, step)

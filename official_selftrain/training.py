"""The training loop: k steps of `SelfTrainer.train_step` in one call, then scalars and progress.

Keras' `fit` fails with several workers, and under a mirrored strategy with several steps per call;
one `tf.function` around `strategy.run` gives the same losses and works with all of them.
"""

import logging
import math
import signal
import threading
import time

import tensorflow as tf
from tqdm import tqdm

from official_selftrain.errors import UserError


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


def train(
    trainer,
    dataset,
    steps,
    start_step=0,
    steps_per_loop=100,
    strategy=None,
    summary_folder=None,
    on_loop=None,
    title="train",
    images_per_step=0,
):
    """Trains until `steps` updates have been made.

    Args:
        trainer: a compiled `SelfTrainer`, made in the strategy's scope.
        dataset: endless `tf.data.Dataset` of (images by source, labels by source); batch sizes are
            global.
        steps: updates in all, counted from 0.
        start_step: updates made already.
        steps_per_loop: updates in one call to the device.
        strategy: `tf.distribute.Strategy`, None for the present one.
        summary_folder: for TensorBoard scalars, or None.
        on_loop: function (step, scalars) called after each loop; scalars are means over its steps.
        title: of the progress bar.
        images_per_step: for images/s.

    Raises:
        UserError: if the loss is no longer finite.
    """
    strategy = strategy or tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync > 1:
        dataset = strategy.experimental_distribute_dataset(dataset)
    iterator = iter(dataset)

    # AutoGraph would trace the step twice for a `for` loop; Keras code needs none of it.
    @tf.function(autograph=False)
    def loop(iterator, count):
        def body(done):
            strategy.run(trainer.train_step, args=(next(iterator),))
            return (done + 1,)

        tf.while_loop(lambda done: done < count, body, (0,), parallel_iterations=1)

    writer = tf.summary.create_file_writer(summary_folder) if summary_folder else None
    step = start_step
    with tqdm(total=steps, initial=start_step, desc=title, unit="step") as progress:
        while step < steps:
            count = min(steps_per_loop - step % steps_per_loop, steps - step)
            began = time.perf_counter()
            loop(iterator, tf.constant(count))
            step += count
            scalars = _read(trainer, count * images_per_step / (time.perf_counter() - began))
            _check_finite(scalars, step)
            if writer:
                with writer.as_default(step):
                    for name, value in scalars.items():
                        tf.summary.scalar(name, value)
                writer.flush()
            progress.set_postfix_str(
                f"loss {scalars['loss']:.3f}, {scalars['images_per_second']:.0f} images/s"
            )
            progress.update(count)
            if on_loop:
                on_loop(step, {"step": step, **scalars})


def _read(trainer, images_per_second):
    """Means since the last loop, leaving out what no step has updated."""
    scalars = {
        name: _number(tracker.result())
        for name, tracker in trainer.trackers.items()
        if _number(tracker.count) > 0
    }
    for tracker in trainer.trackers.values():
        tracker.reset_state()
    scalars["learning_rate"] = _number(trainer.optimizer.learning_rate)
    scalars["images_per_second"] = images_per_second
    return scalars


def _number(value):
    """A Python float, also of a variable that is spread over replicas."""
    return float(tf.convert_to_tensor(value))


def _check_finite(scalars, step):
    bad = [
        name
        for name in ("loss", "human_loss", "pseudo_loss")
        if name in scalars and not math.isfinite(scalars[name])
    ]
    if bad:
        raise UserError(
            f"{bad[0]} is not finite before step {step}: the training diverged. Lower "
            "optimizer.learning_rate, lengthen optimizer.warmup_steps or set optimizer.clip_norm; "
            "the last checkpoint is untouched"
        )

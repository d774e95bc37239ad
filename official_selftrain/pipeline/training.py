"""One training: from its newest checkpoint, or its beginning, to its final weights.

It resumes by itself, evaluates on the way, and finds the batch behind a loss that is not finite.
"""

import functools
import json
import logging
import math
import pathlib
from typing import Any

import keras

from official_selftrain import config as config_lib
from official_selftrain import teacher
from official_selftrain.config import Config
from official_selftrain.data import inputs, records
from official_selftrain.data.prepared import PreparedData
from official_selftrain.engine import checkpoints, guards, memory, precision
from official_selftrain.engine import loop as loop_lib
from official_selftrain.engine.distribution import Distribution
from official_selftrain.engine.optimizers import make_optimizer
from official_selftrain.pipeline import evaluation
from official_selftrain.pipeline.divergence import Divergence
from official_selftrain.pipeline.folder import (
    HISTORY,
    check_weights,
    claim_content,
    write_classes,
)
from official_selftrain.pipeline.plan import Forecast, Stage
from official_selftrain.pipeline.selection import Selection
from official_selftrain.pipeline.start import check_start, check_startable, initialize
from official_selftrain.pipeline.thresholds import from_records
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.self_training import SelfTrainer
from official_selftrain.tasks import Task, make_task
from official_selftrain.utils.errors import TrainingInterrupted, UserError
from official_selftrain.utils.files import read_json_or_none, write_text
from official_selftrain.utils.types import StrPath

Metrics = dict[str, float]


def train(config: Config, folder: StrPath, evaluate_after: bool = True) -> Metrics:
    """Trains one model; resumes by itself, and returns at once if the folder is finished.

    The weights come from the newest checkpoint of the folder, or else from `trainer.init`, or else
    they are random.

    Args:
        config: of the training.
        folder: the run folder.
        evaluate_after: also evaluate the final weights.

    Returns:
        `{metric: value}`, empty without an evaluation.

    Raises:
        UserError: for bad data or settings, a folder made of other data, or a diverged training.
    """
    config = from_records(config)
    # Already here, because making the devices may mean waiting for other workers.
    check_startable(config, (pathlib.Path(folder) / checkpoints.WEIGHTS).exists())
    return train_stage(Workspace.open(config, folder), evaluate_after)


def train_stage(
    workspace: Workspace, evaluate_after: bool = True, forecast: Forecast | None = None
) -> Metrics:
    """`train` in a workspace, whose data is prepared unless it has been.

    Args:
        workspace: of the training.
        evaluate_after: also evaluate the final weights.
        forecast: of the run whose stage this is; without one the training is a run of its own.
    """
    check_startable(workspace.config, (workspace.folder / checkpoints.WEIGHTS).exists())
    check_batches(workspace.config, workspace.distribution)
    with workspace:
        workspace.claim()
        if not workspace.prepared:
            workspace.prepare()
        config, folder, data = workspace.config, workspace.folder, workspace.data
        workspace.on_chief_first(lambda: claim_content(config, folder, data))
        if not (folder / checkpoints.WEIGHTS).exists():
            check_start(config, data)
            check_batches(config, workspace.distribution)  # automatic ones are known by now
            if evaluate_after or config.trainer.evaluation_interval:
                evaluation.check_measurable(config, data)
            if forecast is None:
                forecast = Forecast([Stage(folder.name, config)], workspace)
                forecast.log_plan()
            with workspace.reading():
                _run_training(workspace, forecast)
        if workspace.distribution.chief:
            check_weights(folder)
            if read_json_or_none(folder / checkpoints.CLASSES) is None:
                write_classes(config, folder, data)
        if not evaluate_after or config.evaluation is None:
            return {}
        return evaluation.evaluate_stage(workspace)


@memory.given_back()
def _run_training(workspace, forecast):
    # A function of its own, so that the networks are garbage when the memory is given back.
    training = Training(workspace, forecast)
    for text in training.task.warnings(workspace.config, workspace.data):
        logging.warning("%s", text)
    training.run()


class Training:
    """One training in a workspace with prepared data; the folder is the same for all workers.

    Args:
        workspace: of the training.
        forecast: that is told the time of a step, or None.
    """

    def __init__(self, workspace: Workspace, forecast: Forecast | None = None) -> None:
        self.forecast = forecast
        self.config, self.folder, self.data = workspace.config, workspace.folder, workspace.data
        self.distribution = workspace.distribution
        settings = self.config.trainer
        keras.utils.set_random_seed(settings.seed)
        precision.warn_if_slow(self.config.task.precision, self.config.runtime)
        self.task = make_task(self.config.task)
        with self.distribution.scope():
            self.trainer = make_trainer(self.config, self.task)
        self.saved = checkpoints.Checkpoints(
            self.folder / "checkpoints",
            self.trainer,
            settings.keep_checkpoints,
            self.distribution.workers,
        )
        self.history_file = self.folder / HISTORY
        held_out = self.config.selection is not None and "selection" in self.data.summaries
        self.selection = Selection(self) if held_out else None
        self.divergence = Divergence(self)
        self.shutdown = guards.GracefulShutdown()

    def run(self) -> None:
        """Trains to the end, and writes weights and classes."""
        if self.distribution.chief:
            (self.folder / guards.DIVERGED).unlink(missing_ok=True)
        with (
            self.shutdown,
            evaluation.readable_errors(self.data, ("human", "pseudo"), self.task.check_record),
        ):
            while True:
                try:
                    self._train_from(self.restore())
                    break
                except guards.NonFiniteLossError as problem:
                    self.divergence.leave_out(problem)
        if self.selection is not None and not self.selection.values:
            self.selection.measure(self.config.steps)  # the batch of the last step was left out
        if self.distribution.chief:
            self._finish()
        self.distribution.barrier()

    def restore(self) -> int:
        """Puts the newest checkpoint, or the initial weights, in place; returns its step."""
        start = self.saved.restore()
        if start is None:
            self.initialize()
            start = 0
            if self.distribution.chief:
                self.saved.save(0)
        steps = self.distribution.gather(start)
        if len(set(steps)) > 1:
            raise UserError(
                f"the workers find checkpoints of different steps, {steps}: {self.folder} must be "
                "one folder that all of them can see"
            )
        if self.distribution.chief:
            _forget_after(self.history_file, start)
        if self.selection is not None:
            self.selection.restore()
        return start

    def initialize(self) -> None:
        """Loads the weights of `trainer.init`, if it is set."""
        initialize(self.trainer.student, self.config, self.data.class_names)

    def loop(self, start: int) -> Any:
        """The steps from `start` on; see `loop.make_loop`."""
        dataset = self.distribution.dataset(
            lambda context: training_data(self.config, self.task, self.data, start, context)
        )
        micro_batches = self.config.trainer.micro_batches
        return loop_lib.make_loop(self.trainer, dataset, self.distribution, micro_batches)

    def _train_from(self, start):
        settings, chief = self.config.trainer, self.distribution.chief
        if self.selection is not None and self.selection.stopped:
            return
        loop_lib.run_loop(
            self.loop(start),
            self.config.steps,
            start_step=start,
            steps_per_loop=steps_per_loop(settings),
            summary_folder=self.folder / "tensorboard" if chief else None,
            on_loop=self._on_loop,
            title=self.folder.name if chief else "",
            images_per_step=self.config.images_per_step,
            skipped=self.divergence.skipped(),
            stall_seconds=self.config.runtime.stall_seconds,
            on_pause=self._on_pause,
            on_pace=self._on_pace,
        )

    def _on_pace(self, step, seconds):
        if self.forecast is not None:
            self.forecast.pace(self.folder.name, step, seconds)

    def _on_loop(self, step, scalars):
        """Evaluates, reports and saves what is due; returns whether the training has to stop."""
        settings, chief = self.config.trainer, self.distribution.chief
        due = settings.evaluation_interval and step % settings.evaluation_interval == 0
        if self.selection is not None:
            if due or step == self.config.steps:
                scalars = scalars | self.selection.measure(step)
        elif due and step < self.config.steps and self.config.evaluation is not None:
            scalars = scalars | self._evaluate(step)
        if chief:
            with open(self.history_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(scalars) + "\n")
        if step % settings.checkpoint_interval == 0:
            if chief:
                self.saved.save(step)
            self.distribution.barrier()
        if self.forecast is not None:
            self.forecast.reached(step)
        return self.selection is not None and self.selection.stopped

    def _evaluate(self, step):
        """Measures the present weights, and keeps them if they are the best so far."""
        self._predictor.refresh()
        metrics = evaluation.measure(self._predictor, self.data, self.distribution)
        name = self.task.headline
        if self.distribution.chief:
            evaluation.log_metrics(self.folder, step, metrics)
            checkpoints.save_best(self.trainer.student, self.folder, step, name, metrics[name])
        memory.give_back()
        return {name: metrics[name]}

    @functools.cached_property
    def _predictor(self):
        """Made once, because each predictor would trace the network again."""
        student, batch_size = self.trainer.student, teacher.batch_size_of(self.config)
        return teacher.Predictor(self.task, student, batch_size, self.distribution)

    def _on_pause(self, step):
        """Saves a checkpoint and ends the training if any worker has received a signal to stop."""
        signal = max(self.distribution.gather(self.shutdown.received))
        if not signal:
            return
        if self.distribution.chief and step not in self.saved.steps()[-1:]:
            self.saved.save(step)
        self.distribution.barrier()
        raise TrainingInterrupted(
            f"{self.folder.name}: stopped at step {step} of {self.config.steps}, which is "
            "saved; the same command resumes it",
            signal,
        )

    def _finish(self):
        student, average = self.trainer.student, self.trainer.average
        write_classes(self.config, self.folder, self.data)
        if self.selection is not None:
            self.selection.finish()
            return
        if average is not None:
            average.swap_weights(student)
            checkpoints.save_weights(student, self.folder, checkpoints.AVERAGE)
            average.swap_weights(student)
        checkpoints.save_weights(student, self.folder)


def make_trainer(config: Config, task: Task) -> SelfTrainer:
    """A built and compiled `SelfTrainer`; must be called in the scope of the distribution."""
    method = config.self_training
    trainer = SelfTrainer(
        task.build_model(),
        task,
        alpha=method.alpha if config.pseudo is not None else 0.0,
        decay=config.decay,
        normalize=method.normalize,
        separate_batch_norm=method.separate_batch_norm,
        l2=config.optimizer.l2,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=config.trainer.ema_decay,
        accumulate=config.trainer.micro_batches > 1,
    )
    optimizer = make_optimizer(config.optimizer, config.steps, config.task.precision)
    trainer.compile(optimizer=optimizer)
    trainer.optimizer.build(trainer.student.trainable_variables)
    return trainer


def training_data(
    config: Config, task: Task, data: PreparedData, start_step: int, input_context: Any = None
) -> Any:
    """The `tf.data.Dataset` of batches that a training reads from `start_step` on.

    Args:
        config: with a class count.
        task: whose parser makes labels of records.
        data: the prepared sources.
        start_step: number of updates made so far.
        input_context: `tf.distribute.InputContext`; see `inputs.training_dataset`.

    Returns:
        Elements (`{stream: images}`, `{stream: labels}`), each a batch or one of its
        `trainer.micro_batches`.
    """
    micro_batches = config.trainer.micro_batches

    def dataset(name, seed, keep=None):
        source = getattr(config, name)
        return inputs.training_dataset(
            data.files(name),
            task.parser(source),
            source.batch // micro_batches,
            seed,
            start_step * micro_batches,
            shuffle_buffer=source.shuffle_buffer,
            cache=source.cache,
            keep=keep,
            threads=config.runtime.input_threads,
            input_context=input_context,
        )

    # Two seeds per training, so that human and pseudo images are drawn independently.
    seed = 2 * config.trainer.seed
    streams = {"human": dataset("human", seed)}
    if config.pseudo is not None and config.self_training.alpha > 0:
        if config.pseudo.soft:
            task.check_pseudo_record(next(records.read(data.files("pseudo"))), config.pseudo)
        keep = None if config.pseudo.keep_empty else task.make_record_filter(config.pseudo)
        streams["pseudo"] = dataset("pseudo", seed + 1, keep)
    return inputs.zip_streams(**streams)


def check_batches(config: Config, distribution: Distribution) -> None:
    """Checks that every batch divides evenly over replicas and micro-batches.

    A replica without images would write NaN into the weights.

    Raises:
        UserError: if one does not, or if the backend has no micro-batches.
    """
    micro_batches = config.trainer.micro_batches
    if micro_batches > 1 and not distribution.supports_micro_batches:
        raise UserError(
            f"trainer.micro_batches={micro_batches} needs the TensorFlow backend; on JAX use a "
            "smaller batch, or more devices"
        )
    parts = distribution.replicas * micro_batches
    each = f" with {micro_batches} micro-batches each" if micro_batches > 1 else ""
    config.check_batch_sizes(parts, f"{parts} ({distribution.replicas} replicas{each})")


def steps_per_loop(settings: config_lib.TrainerConfig) -> int:
    """Steps between two reports: loops must end where a checkpoint or an evaluation is due."""
    return math.gcd(
        settings.steps_per_loop, settings.checkpoint_interval, settings.evaluation_interval
    )


def _forget_after(history_file, step):
    """Removes history rows of steps after the restored checkpoint, and damaged ones."""
    if not history_file.exists():
        return
    kept, damaged = [], 0
    # A kill, or a full disk, leaves the last row half written.
    for line in history_file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        logging.warning("%s: %d damaged rows are left out", history_file, damaged)
    write_text(history_file, "".join(line + "\n" for line in kept))

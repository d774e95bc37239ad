"""One training: from its newest checkpoint, or its beginning, to its weights.

Resumes by itself, evaluates on the way, and looks for the batch behind a loss that is not finite.
"""

import functools
import json
import logging
import math
import pathlib
import re

from official_selftrain import config as config_lib
from official_selftrain import teacher
from official_selftrain.conversion import checkpoint
from official_selftrain.data import inputs, records
from official_selftrain.data.prepared import check_classes
from official_selftrain.engine import checkpoints, guards, memory
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.engine import loop as loop_lib
from official_selftrain.pipeline import evaluation
from official_selftrain.pipeline.folder import (
    check_weights,
    claim_content,
    init_run_folder,
    working_in,
    write_classes,
)
from official_selftrain.pipeline.workspace import prepare, reading
from official_selftrain.utils.errors import TrainingInterrupted, UserError
from official_selftrain.utils.files import read_json_or_none, write_json, write_text


class Training:
    """One training, from its newest checkpoint or its beginning to its weights.

    Args:
        config: complete `Config`.
        folder: the run folder, the same for all workers.
        data: `PreparedData`.
        distribution: `distribution.Distribution`.
    """

    def __init__(self, config, folder, data, distribution):
        import keras

        from official_selftrain.tasks import make_task

        self.config, self.folder, self.data = config, folder, data
        self.distribution = distribution
        settings = config.trainer
        keras.utils.set_random_seed(settings.seed)
        _warn_of_precision(config)
        # One replica has no one to share statistics with; saying so is faster.
        synchronized = config.task.bn_synchronized and distribution.replicas > 1
        self.task = make_task(config_lib.changed(config.task, bn_synchronized=synchronized))
        with distribution.scope():
            self.trainer = make_trainer(config, self.task)
        self.saved = checkpoints.Checkpoints(
            folder / "checkpoints", self.trainer, settings.keep_checkpoints, distribution.workers
        )
        self.history_file = folder / "history.jsonl"
        self.skipped_file = folder / "skipped.json"
        self.replays = 0
        self.shutdown = guards.GracefulShutdown()

    def run(self):
        """Trains to the end, and writes weights and classes."""
        with (
            self.shutdown,
            evaluation.readable_errors(self.data, ("human", "pseudo"), self.task.check_record),
        ):
            while True:
                try:
                    self._train_from(self.restore())
                    break
                except guards.NonFiniteLossError as problem:
                    self._find_batch(problem)
        if self.distribution.chief:
            self._finish()
        self.distribution.barrier()

    def restore(self):
        """Puts the newest checkpoint in place, or the start; returns its step."""
        start = self.saved.restore()
        if start is None:
            self.initialize()
            start = 0
            if self.distribution.chief:
                self.saved.save(0)
        steps = self.distribution.gather(start)
        if len(set(steps)) > 1:
            raise UserError(
                f"the workers find different checkpoints, of the steps {steps}: {self.folder} must "
                "be one folder that all of them see"
            )
        if self.distribution.chief:
            _forget_after(self.history_file, start)
        return start

    def initialize(self):
        """Puts the weights of `trainer.init` in place, where it is given."""
        if self.config.trainer.init:
            _initialize(self.trainer.student, self.config)

    def loop(self, start):
        """The steps from `start` on; see `loop.make_loop`."""
        dataset = self.distribution.dataset(
            lambda context: training_data(self.config, self.task, self.data, start, context)
        )
        micro_batches = self.config.trainer.micro_batches
        return loop_lib.make_loop(self.trainer, dataset, self.distribution, micro_batches)

    def _skipped(self):
        """Steps whose batch is left out; a damaged file is made again, as its batches are found."""
        steps = read_json_or_none(self.skipped_file)
        return [s for s in steps if isinstance(s, int)] if isinstance(steps, list) else []

    def _train_from(self, start):
        settings, chief = self.config.trainer, self.distribution.chief
        loop_lib.train(
            self.loop(start),
            settings.steps,
            start,
            _steps_per_loop(settings),
            str(self.folder / "tensorboard") if chief else None,
            self._on_loop,
            self.folder.name,
            images_per_step(self.config),
            self._skipped(),
            self.config.runtime.stall_seconds,
            quiet=not chief,
            on_pause=self._on_pause,
        )

    def _on_loop(self, step, scalars):
        settings, chief = self.config.trainer, self.distribution.chief
        due = settings.evaluation_interval and step % settings.evaluation_interval == 0
        if due and step < settings.steps and self.config.evaluation is not None:
            scalars = scalars | self._evaluate(step)
        if chief:
            with open(self.history_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(scalars) + "\n")
        if step % settings.checkpoint_interval == 0:
            if chief:
                self.saved.save(step)
            self.distribution.barrier()

    def _evaluate(self, step):
        """Measures the present weights, and keeps them if they are the best."""
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
        """One for the whole training: each would trace the network again."""
        student, batch_size = self.trainer.student, self.config.evaluation.batch_size
        return teacher.Predictor(self.task, student, batch_size, self.distribution)

    def _on_pause(self, step):
        """Saves and leaves if a worker was asked to."""
        number = max(self.distribution.gather(self.shutdown.received))
        if not number:
            return
        if self.distribution.chief and step not in self.saved.steps()[-1:]:
            self.saved.save(step)
        self.distribution.barrier()
        raise TrainingInterrupted(
            f"{self.folder.name}: stopped at step {step} of {self.config.trainer.steps}, which is "
            "saved; the same command goes on there",
            number,
        )

    def _find_batch(self, problem):
        """Repeats the steps since the last checkpoint one by one, up to the one that goes wrong.

        Its batch is written to a file, and left out from now on where the user allows it.

        Raises:
            UserError: if it is not allowed.
        """
        self.replays += 1
        start, skipped = self.restore(), self._skipped()
        allowed = self.config.trainer.skip_nonfinite
        logging.warning("%s; looking for its batch from step %d on", problem, start)
        loop, batch_file = self.loop(start), "not found when the steps were repeated"
        for step in range(start, problem.step):
            batch = loop.batch()
            if step in skipped:
                continue
            try:
                guards.check_finite(loop.step(batch), step + 1)
            except guards.NonFiniteLossError as found:
                problem = found
                name = f"nonfinite-{step:08d}-{self.distribution.worker}.npz"
                batch_file = str(self.folder / name)
                loop_lib.save_batch(batch_file, batch, self.distribution.strategy)
                if len(skipped) < allowed:
                    logging.warning("%s: its batch, in %s, is left out", problem, batch_file)
                    self.distribution.barrier()
                    if self.distribution.chief:
                        write_json(self.skipped_file, [*skipped, step])
                    self.distribution.barrier()
                    return
                break
        if self.replays <= allowed:
            return
        raise UserError(
            f"{problem}: the training diverged. The last good checkpoint is "
            f"{self.saved.path(start)}; the batch is {batch_file}. Lower optimizer.learning_rate, "
            "lengthen optimizer.warmup_steps or set optimizer.clip_norm; or, if a single batch is "
            "at fault, leave up to N out with trainer.skip_nonfinite=N"
        )

    def _finish(self):
        student, average = self.trainer.student, self.trainer.average
        write_classes(self.config, self.folder, self.data)
        if average is not None:
            average.swap_weights(student)
            checkpoints.save_weights(student, self.folder, checkpoints.AVERAGE)
            average.swap_weights(student)
        checkpoints.save_weights(student, self.folder)


def train(config, folder, data=None, evaluate_after=True):
    """Trains one model; resumes by itself, and returns at once if the folder is finished.

    Weights come from, in this order: the newest checkpoint of the folder, `trainer.init`, random.

    Args:
        config: `Config`.
        folder: the run folder.
        data: `PreparedData`, None prepares it in `folder/data`.
        evaluate_after: also evaluate the final weights.

    Returns:
        The metrics, or {} without evaluation.

    Raises:
        UserError: for bad data or options, a folder made of other data, or a diverged training.
    """
    folder = pathlib.Path(folder)
    check_startable(config, (folder / checkpoints.WEIGHTS).exists())
    distribution = distribution_lib.make_distribution(config.runtime)
    check_batches(config, distribution)
    with working_in(folder, distribution):
        distribution.on_chief_first(lambda: init_run_folder(config, folder))
        data = data or prepare(config, folder / "data", distribution)
        config = data.with_num_classes(config)
        distribution.on_chief_first(lambda: claim_content(config, folder, data))
        if not (folder / checkpoints.WEIGHTS).exists():
            check_start(config, data)
            for text in data.lost_boxes(config):
                logging.warning("%s", text)
            if evaluate_after or config.trainer.evaluation_interval:
                evaluation.check_measurable(config, data)
            with reading(data, distribution), memory.given_back():
                Training(config, folder, data, distribution).run()
        if distribution.chief:
            check_weights(folder)
            if read_json_or_none(folder / checkpoints.CLASSES) is None:
                write_classes(config, folder, data)
        if not evaluate_after or config.evaluation is None:
            return {}
        return evaluation.measured(config, folder, distribution, data)


def check_startable(config, finished=False):
    """Raises a `UserError` if a training lacks what it starts from."""
    if not config.human.given:
        raise UserError("no labeled images: set human.records, or human.images and annotations")
    if config.pseudo is not None and not config.pseudo.given:
        raise UserError(
            "this experiment trains a student, but pseudo.records is not set: use "
            "`python -m official_selftrain.run`, or give the files that pseudo_label wrote"
        )
    if config.trainer.init == "imagenet++":
        raise UserError(
            "this cell starts from ImageNet++, Noisy Student's EfficientNet, whose weights only "
            "its authors publish: fetch them and give trainer.init=CHECKPOINT, their TF1 "
            "checkpoint (prefix, folder or .tar.gz)"
        )
    if config.trainer.init and config.trainer.init != "imagenet" and not finished:
        init = pathlib.Path(config.trainer.init)
        if not (init.exists() or checkpoint.is_checkpoint(init)):
            raise UserError(f"trainer.init: {init} does not exist")


def check_start(config, data):
    """Checks that the weights of `trainer.init` mean the same classes as the data.

    Raises:
        UserError: if they do not.
    """
    init = config.trainer.init
    if not init or init == "imagenet" or checkpoint.is_checkpoint(init):
        return
    classes = checkpoints.classes_of(init)
    if classes is None:
        return
    check_classes({f"trainer.init={init}": classes["names"], "human": data.class_names})
    if classes["num_classes"] != config.task.num_classes:
        raise UserError(
            f"trainer.init={init} knows {classes['num_classes']} classes (with the background), "
            f"the data {config.task.num_classes}; set task.num_classes={classes['num_classes']} if "
            "the data holds a part of them"
        )


def _warn_of_precision(config):
    """Warns of a precision for which this machine's CPU has no instructions."""
    import tensorflow as tf

    precision = config.task.precision
    if precision == "float32" or config.runtime.jit_compile:
        return
    on_cpu = config.runtime.strategy in ("default", "mirrored")
    if on_cpu and not tf.config.list_physical_devices("GPU") and _cpu_lacks(precision):
        logging.warning(
            "task.precision=%s on this CPU, which has no instructions for it, is up to ten times "
            "slower than float32; runtime.jit_compile=true helps", precision,
        )  # fmt: skip


# As /proc/cpuinfo calls the instructions of x86 and ARM that compute in 16 bits.
INSTRUCTIONS = {
    "mixed_bfloat16": {"avx512_bf16", "avx_ne_convert", "amx_bf16", "bf16"},
    "mixed_float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def _cpu_lacks(precision, cpuinfo="/proc/cpuinfo"):
    """Whether the CPU is known to have no instructions for a precision."""
    try:
        text = pathlib.Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return bool(flags) and not INSTRUCTIONS[precision] & set(flags[0].split())


def _initialize(model, config):
    """Loads `trainer.init`."""
    init = config.trainer.init
    if init != "imagenet":
        if checkpoint.is_checkpoint(init):
            checkpoint.load_backbone(model, config.task.backbone, init)
        else:
            checkpoints.load_weights(model, init)
        return
    from official_selftrain.applications import imagenet

    try:
        imagenet.load_efficientnet(model, config.task.backbone.removeprefix("efficientnet-"))
    except ValueError as error:
        raise UserError(str(error)) from None


def _steps_per_loop(settings):
    """Loops end where a checkpoint or an evaluation is due."""
    return math.gcd(
        settings.steps_per_loop, settings.checkpoint_interval, settings.evaluation_interval
    )


def images_per_step(config):
    """Human and pseudo-labeled images of one update."""
    pseudo = config.pseudo.batch_size if config.pseudo is not None else 0
    return config.human.batch_size + pseudo


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


def check_batches(config, distribution):
    """A replica without images would write NaN into the weights.

    Raises:
        UserError: if a batch cannot be shared out evenly, or the backend knows no micro-batches.
    """
    micro_batches = config.trainer.micro_batches
    count = distribution.replicas * micro_batches
    among = f"{distribution.replicas} replicas"
    if micro_batches > 1:
        among += f" with {micro_batches} micro-batches each"
    if micro_batches > 1 and distribution.strategy is None:
        raise UserError(
            f"trainer.micro_batches={micro_batches} needs the TensorFlow backend; on JAX take a "
            "smaller batch, or more devices"
        )
    for name in ("human", "pseudo"):
        source = getattr(config, name)
        if source is not None and source.batch_size % count:
            raise UserError(
                f"{name}.batch_size={source.batch_size} cannot be shared out evenly among {among}; "
                f"take {-(-source.batch_size // count) * count}"
            )


def make_trainer(config, task):
    """A built and compiled `SelfTrainer`; call it in the strategy's scope."""
    from official_selftrain.engine.optimizers import make_optimizer
    from official_selftrain.self_training import SelfTrainer

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
    optimizer = make_optimizer(config.optimizer, config.trainer.steps, config.task.precision)
    trainer.compile(optimizer=optimizer)
    trainer.optimizer.build(trainer.student.trainable_variables)
    return trainer


def training_data(config, task, data, start_step, input_context=None):
    """The zipped training data set of a config, from `start_step` on.

    An element is a batch, or one of its `trainer.micro_batches`; `input_context` as in
    `inputs.training_dataset`.
    """
    micro_batches = config.trainer.micro_batches

    def dataset(name, seed, keep=None):
        source = getattr(config, name)
        return inputs.training_dataset(
            data.files(name),
            task.parser(source, training=True),
            source.batch_size // micro_batches,
            seed,
            start_step * micro_batches,
            shuffle_buffer=source.shuffle_buffer,
            cache=source.cache,
            keep=keep,
            threads=config.runtime.input_threads,
            input_context=input_context,
        )

    seed = 2 * config.trainer.seed
    by_source = {"human": dataset("human", seed)}
    if config.pseudo is not None and config.self_training.alpha > 0:
        keep = None if config.pseudo.keep_empty else task.make_record_filter(config.pseudo)
        if config.pseudo.soft:
            task.check_soft(next(records.read(data.files("pseudo"))))
        by_source["pseudo"] = dataset("pseudo", seed + 1, keep)
    return inputs.zip_streams(**by_source)

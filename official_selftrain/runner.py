"""From a config to a finished run: data, model, loop, evaluation, and the stages of `run`.

A run folder holds `config.yaml`, `checkpoints/`, `tensorboard/`, `history.jsonl`,
`model.weights.h5` and `metrics.json`. The folder of `run` holds one such folder for each training
(`teacher`, `student`, `control`), `data`, `labels` and `report.html`.
"""

import json
import logging
import math
import os
import pathlib
import subprocess
import time

from official_selftrain import checkpoints, released, teacher, visualize
from official_selftrain import config as config_lib
from official_selftrain.data import inputs, records, sources
from official_selftrain.errors import Stopped, UserError
from official_selftrain.files import write_text

CLASSES = "classes.json"  # beside the weights: how many classes, and their names
# Sections that may change between a run and its continuation: they change no result.
FREE_TO_CHANGE = ("runtime", "description", "published")


# --- Folders ---------------------------------------------------------------------------------


def claim_folder(config, folder):
    """Writes `config.yaml` into a new folder, or checks that an old one is of the same run.

    Raises:
        UserError: if the folder holds another run, naming what differs, or cannot be written.
    """
    folder = pathlib.Path(folder)
    file = folder / "config.yaml"
    if file.exists():
        before = config_lib.make(config_lib.load_file(file))
        changed = _differences(before.model_dump(), config.model_dump())
        if changed:
            raise UserError(
                f"{folder} holds a run of {before.experiment!r} that differs in "
                f"{'; '.join(changed[:3])}; choose another --model_dir, or delete the folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    write_text(file, _environment() + config_lib.dump(config))


def _differences(before, after, prefix=""):
    found = []
    for key in after:
        if not prefix and key in FREE_TO_CHANGE:
            continue
        old, new = before.get(key), after[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({_short(old)} there, {_short(new)} now)")
    return found


def _short(value):
    return "nothing" if value is None else "a section" if isinstance(value, dict) else repr(value)


def _environment():
    """Versions and git revision as YAML comments."""
    import importlib.metadata as metadata

    lines = []
    for package in ("official_selftrain", "keras", "tensorflow", "tensorflow-cpu", "numpy"):
        try:
            lines.append(f"# {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "-C", str(config_lib.PACKAGE), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if git.returncode == 0:
        lines.append(f"# git {git.stdout.strip()}")
    return "\n".join(lines) + "\n"


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())


def write_json(path, values):
    write_text(path, json.dumps(values, indent=1))


# --- Data ------------------------------------------------------------------------------------


class Data:
    """The prepared sources of a config; `summaries[name]` as `sources.prepare` returns it."""

    def __init__(self, config, folder):
        self.folder = pathlib.Path(folder)
        self.summaries = {
            name: sources.prepare(source, config.path, self.folder / name)
            for name in ("human", "unlabeled", "pseudo", "evaluation")
            if (source := getattr(config, name)) is not None and source.given
        }
        self._check_leaks()
        self._check_classes()

    def _check_leaks(self):
        """Refuses to label, or to learn from labels of, images that measure the result."""
        if "evaluation" not in self.summaries:
            return
        for name in ("unlabeled", "pseudo"):
            if name in self.summaries:
                sources.check_disjoint(
                    self.folder / "evaluation",
                    self.folder / name,
                    f"what is measured must not be among the images to label; leave them out of "
                    f"{name}, for example by {name}.exclude_lists",
                )
        if "human" in self.summaries:
            shared = sources.shared_images(self.folder / "evaluation", self.folder / "human")
            if shared:
                logging.warning(
                    "%d images are both in human and in evaluation, the first %r: the metrics will "
                    "be too good", len(shared), shared[0],
                )  # fmt: skip

    def _check_classes(self):
        """Warns of classes that no labelled image holds."""
        if "human" not in self.summaries:
            return

        def held(name):
            return {int(c) for c in self.summaries.get(name, {}).get("images_per_class", {})}

        absent = sorted((held("evaluation") | set(self.class_names)) - held("human"))
        if absent:
            logging.warning(
                "no labelled image holds %s: teacher and student cannot learn it",
                ", ".join(repr(self.class_names.get(c, c)) for c in absent[:10]),
            )

    def files(self, name):
        return self.summaries[name]["files"]

    @property
    def class_names(self):
        """`{class id: name}` as far as the sources know."""
        names = self.summaries.get("human", {}).get("classes", {})
        return {int(key): name for key, name in names.items()}

    def complete(self, config):
        """The config with the class count of the data.

        Raises:
            UserError: if a label is outside the configured classes, or images are not labelled.
        """
        human = self.summaries["human"]
        if config.task.kind == "segmentation":
            for name in ("human", "evaluation"):
                summary = self.summaries.get(name)
                if summary and summary["masks"] < summary["images"]:
                    missing = summary["images"] - summary["masks"]
                    raise UserError(
                        f"{missing} images of {name} have no mask; is {name}.masks given?"
                    )
        elif not human["boxes"]:
            raise UserError("the labelled images hold no box; is human.annotations given?")
        labels = [s["largest_class"] for s in self.summaries.values()]
        largest = max([*self.class_names, *labels], default=0)
        if config.task.num_classes is None:
            return config.override({"task.num_classes": largest + 1})
        if largest >= config.task.num_classes:
            raise UserError(
                f"the data has class id {largest}, but task.num_classes={config.task.num_classes} "
                f"allows 1 to {config.task.num_classes - 1} (0 is the background)"
            )
        return config


def training_data(config, task, data, start_step):
    """The zipped training data set of a config, from `start_step` on."""

    def dataset(name, seed, keep=None):
        source = getattr(config, name)
        return inputs.training_dataset(
            data.files(name),
            task.parser(source, training=True),
            source.batch_size,
            seed,
            start_step,
            source.shuffle_buffer,
            source.cache,
            keep,
            config.runtime.input_threads,
        )

    seed = 2 * config.trainer.seed
    by_source = {"human": dataset("human", seed)}
    if config.pseudo is not None and config.self_training.alpha > 0:
        keep = None if config.pseudo.keep_empty else task.keeps_something(config.pseudo)
        if config.pseudo.soft:
            task.check_soft(next(records.read(data.files("pseudo"))))
        by_source["pseudo"] = dataset("pseudo", seed + 1, keep)
    return inputs.zip_sources(**by_source)


# --- One training ----------------------------------------------------------------------------


def make_strategy(config):
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # On the CPU the graph optimiser costs seconds at the start and saves none in a step.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    if config.runtime.strategy == "mirrored":
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def check_batches(config, strategy):
    """A replica without images would write NaN into the weights.

    Raises:
        UserError: if a batch cannot be shared out evenly.
    """
    count = strategy.num_replicas_in_sync
    for name in ("human", "pseudo"):
        source = getattr(config, name)
        if source is not None and source.batch_size % count:
            raise UserError(
                f"{name}.batch_size={source.batch_size} cannot be shared out evenly among {count} "
                f"replicas; take {-(-source.batch_size // count) * count}"
            )


def make_trainer(config, task):
    """A built and compiled `SelfTrainer`; call it in the strategy's scope."""
    from official_selftrain.optimization import make_optimizer
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
    )
    trainer.compile(optimizer=make_optimizer(config.optimizer, config.trainer.steps))
    trainer.optimizer.build(trainer.student.trainable_variables)
    return trainer


def train(config, folder, data=None, evaluate_after=True):
    """Trains one model; resumes by itself, and returns at once if the folder is finished.

    Weights come from, in this order: the newest checkpoint of the folder, `trainer.init`, random.

    Args:
        config: `Config`.
        folder: the run folder.
        data: prepared `Data`, None prepares it in `folder/data`.
        evaluate_after: also evaluate the final weights.

    Returns:
        The metrics, or {} without evaluation.

    Raises:
        UserError: for bad data or options, or a diverged training.
    """
    if not config.human.given:
        raise UserError("no labelled images: set human.records, or human.images and annotations")
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
    if config.trainer.init and config.trainer.init != "imagenet":
        init = pathlib.Path(config.trainer.init)
        if not (init.exists() or released.is_checkpoint(init)):
            raise UserError(f"trainer.init: {init} does not exist")
    folder = pathlib.Path(folder)
    claim_folder(config, folder)
    data = data or Data(config, folder / "data")
    config = data.complete(config)
    if not (folder / checkpoints.WEIGHTS).exists():
        _train(config, folder, data)
    if not evaluate_after or config.evaluation is None:
        return {}
    return evaluate(config, folder, data)


def _train(config, folder, data):
    import keras
    import tensorflow as tf

    from official_selftrain import training
    from official_selftrain.tasks import make_task

    settings = config.trainer
    keras.utils.set_random_seed(settings.seed)
    strategy = make_strategy(config)
    check_batches(config, strategy)
    # One replica has no one to share statistics with; saying so is faster.
    synchronized = config.task.bn_synchronized and strategy.num_replicas_in_sync > 1
    task = make_task(config.task.model_copy(update={"bn_synchronized": synchronized}))
    with strategy.scope():
        trainer = make_trainer(config, task)
    saved = checkpoints.Checkpoints(folder / "checkpoints", trainer, settings.keep_checkpoints)
    start = saved.restore()
    if not start and settings.init:
        _initialize(trainer.student, config)
    history_file = folder / "history.jsonl"
    _forget_after(history_file, start)

    def on_loop(step, scalars):
        due = settings.evaluation_interval and step % settings.evaluation_interval == 0
        if due and step < settings.steps and config.evaluation is not None:
            metrics = _metrics(config, task, trainer.student, data)
            _log_metrics(folder, step, metrics)
            name = next(iter(metrics))  # AP or mIoU
            scalars = scalars | {name: metrics[name]}
        with open(history_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(scalars) + "\n")
        if step % settings.checkpoint_interval == 0 or sigterm.received:
            saved.save(step)
        if sigterm.received:
            raise Stopped(f"stopped at step {step}, which is saved; the same command goes on there")

    sigterm = training.Sigterm()
    try:
        with sigterm:
            training.train(
                trainer,
                training_data(config, task, data, start),
                settings.steps,
                start,
                _steps_per_loop(settings),
                strategy,
                str(folder / "tensorboard"),
                on_loop,
                folder.name,
                _images_per_step(config),
            )
    except tf.errors.InvalidArgumentError as error:
        for name in ("human", "pseudo"):
            if name in data.summaries:
                inputs.find_bad_record(data.files(name))
        raise UserError(f"the input failed: {error.message[:200]}") from None
    classes = {"num_classes": config.task.num_classes, "names": data.class_names}
    write_json(folder / CLASSES, classes)
    checkpoints.save_weights(trainer.student, folder)


def _initialize(model, config):
    """Loads `trainer.init`."""
    init = config.trainer.init
    if init != "imagenet":
        if released.is_checkpoint(init):
            released.load_backbone(model, config.task.backbone, init)
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


def _images_per_step(config):
    pseudo = config.pseudo.batch_size if config.pseudo is not None else 0
    return config.human.batch_size + pseudo


def _forget_after(history_file, step):
    """Drops lines of steps that a kill undid."""
    if history_file.exists():
        lines = history_file.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        history_file.write_text("".join(line + "\n" for line in kept))


# --- Evaluation ------------------------------------------------------------------------------


def evaluate(config, folder, data=None, weights=None):
    """Metrics of trained weights on the evaluation source, written to `folder/metrics.json`.

    Args:
        config: `Config` with an evaluation source.
        folder: the run folder; its `model.weights.h5` is taken unless `weights` is given.
        data: prepared `Data`, None prepares it in `folder/data`.
        weights: a `.weights.h5` file or run folder, or None.
    """
    from official_selftrain.tasks import make_task

    folder = pathlib.Path(folder)
    file = folder / "metrics.json"
    if file.exists() and weights is None:
        return read_json(file)
    if config.evaluation is None or not config.evaluation.given:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    data = data or Data(config, folder / "data")
    config = data.complete(config)
    if not data.summaries["evaluation"]["boxes"] and config.task.kind == "detection":
        raise UserError("the evaluation source has no labels; give evaluation.annotations")
    task = make_task(config.task)
    model = task.build_model()
    checkpoints.load_weights(model, weights or folder)
    metrics = _metrics(config, task, model, data)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, metrics)
    _log_metrics(folder, config.trainer.steps, metrics)
    return metrics


def _metrics(config, task, model, data):
    metric = task.metric(data.class_names)
    summary = data.summaries["evaluation"]
    stream = teacher.predict(
        task, model, summary["files"], config.evaluation.batch_size, "evaluate", summary["images"]
    )
    for record, prediction in stream:
        metric.update(record, prediction)
    return metric.result()


def _log_metrics(folder, step, metrics):
    import tensorflow as tf

    writer = tf.summary.create_file_writer(str(folder / "tensorboard"))
    with writer.as_default(step):
        for name, value in metrics.items():
            tf.summary.scalar(f"evaluation/{name}", value)
    writer.close()


# --- Pseudo labels ---------------------------------------------------------------------------


def pseudo_label(config, folder, weights, data=None, threshold=None):
    """Labels the unlabelled source; returns the written files and the label report.

    Args:
        config: `Config` with an unlabelled source.
        folder: where `pseudo-*.tfrecord` and `report.json` are written.
        weights: of the teacher, a file or a run folder.
        data: prepared `Data`, None prepares it in `folder/data`.
        threshold: for the report; None takes the student's thresholds.
    """
    from official_selftrain.tasks import make_task

    if config.unlabeled is None or not config.unlabeled.given:
        raise UserError("nothing to label: set unlabeled.images (a folder) or unlabeled.records")
    folder = pathlib.Path(folder)
    data = data or Data(config, folder / "data")
    config = data.complete(config)
    files = data.files("unlabeled")
    pseudo = config.pseudo or config_lib.PseudoConfig()
    if threshold is not None:
        pseudo = pseudo.model_copy(update={"score_threshold": threshold, "class_thresholds": {}})
    batch_size = config.evaluation.batch_size if config.evaluation is not None else 8
    folder.mkdir(parents=True, exist_ok=True)
    _claim_labels(folder, weights, data)
    written = [str(folder / f"pseudo-{i:05d}.tfrecord") for i in range(len(files))]
    task = make_task(config.task, labelling=True)
    if not all(os.path.exists(file) for file in written):
        model = task.build_model()
        checkpoints.load_weights(model, weights)
        teacher.label(task, model, files, folder, batch_size, str(weights))
    tally = task.tally(pseudo, data.class_names)
    report = teacher.report(tally, written, files)
    write_json(folder / "report.json", report)
    shown = records.read(written)
    visualize.preview(
        folder / "preview.png", shown, 12, data.class_names, pseudo.score_threshold,
        masks=config.task.kind == "segmentation",
    )  # fmt: skip
    return written, report


def _claim_labels(folder, weights, data):
    """Keeps the labels of two teachers, or of two sets of images, out of one folder."""
    modified = checkpoints.weights_file(weights).stat().st_mtime_ns
    made_by = {"weights_modified": modified, "images": data.summaries["unlabeled"]["source"]}
    record = folder / "made_by.json"
    if not record.exists():
        write_json(record, made_by)
    elif read_json(record) != made_by:
        raise UserError(
            f"{folder} holds labels by another teacher or of other images; choose another "
            "--model_dir, or delete the folder"
        )


# --- The whole method ------------------------------------------------------------------------


def run(config, folder):
    """Teacher, pseudo labels, student, control and report; finished stages are not run again.

    Args:
        config: `Config` with human, unlabelled, pseudo and evaluation sources.
        folder: the run folder.

    Returns:
        `{stage: metrics}` of the trainings.
    """
    from official_selftrain import report

    folder = pathlib.Path(folder)
    missing = [name for name in ("unlabeled", "pseudo") if getattr(config, name) is None]
    if missing:
        raise UserError(f"`run` needs the section {missing[0]!r}; this experiment has none")
    claim_folder(config, folder)
    clock = _Clock(folder / "seconds.json")
    with clock("data"):
        data = Data(config, folder / "data")
        config = data.complete(config)
    results = {}
    with clock("teacher"):
        results["teacher"] = train(config_lib.teacher_config(config), folder / "teacher", data)
    best = folder / "teacher"
    for number in range(1, config.self_training.rounds + 1):
        suffix = "" if number == 1 else f"_{number}"
        with clock(f"labels{suffix}"):
            labels = folder / f"labels{suffix}"
            pseudo_label(config, labels, best, data)
        with clock(f"student{suffix}"):
            student = config_lib.student_config(
                config, os.path.abspath(labels / "pseudo-*.tfrecord"), os.path.abspath(best)
            )
            best = folder / f"student{suffix}"
            results[best.name] = train(student, best, Data(student, folder / "data"))
    if config.self_training.control:
        with clock("control"):
            control = config_lib.control_config(config, os.path.abspath(folder / "teacher"))
            results["control"] = train(control, folder / "control", data)
    with clock("report"):
        report.write(config, folder, data, results, clock.seconds)
    return results


class _Clock:
    """Seconds per stage, added up over interruptions."""

    def __init__(self, file):
        self.file = file
        self.seconds = read_json(file) if file.exists() else {}

    def __call__(self, stage):
        self.stage = stage
        logging.info("stage %s", stage)
        return self

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        passed = time.perf_counter() - self.began
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + passed, 2)
        write_json(self.file, self.seconds)

"""From a config to a finished run: data, model, loop, evaluation, and the stages of `run`.

A run folder holds `config.yaml`, `checkpoints/`, `tensorboard/`, `history.jsonl`,
`model.weights.h5` and `metrics.json`, and where asked for `ema.weights.h5` and `best.weights.h5`.
The folder of `run` holds one such folder for each training (`teacher`, `student`, `control`),
`data`, `labels` and `report.html`.
"""

import logging
import os
import pathlib
import subprocess
import time

from official_selftrain import checkpoints, released, teacher, training, visualize
from official_selftrain import config as config_lib
from official_selftrain import distribution as distribution_lib
from official_selftrain.data import records, sources
from official_selftrain.errors import UserError
from official_selftrain.files import read_json, write_json, write_text

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


# --- One training ----------------------------------------------------------------------------


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
    _check_startable(config)
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make(config.runtime)
    training.check_batches(config, distribution)
    distribution.chief_first(lambda: claim_folder(config, folder))
    data = data or prepare(config, folder / "data", distribution)
    config = data.complete(config)
    if not (folder / checkpoints.WEIGHTS).exists():
        with distribution.one_job():
            training.Training(config, folder, data, distribution).run()
    if not evaluate_after or config.evaluation is None:
        return {}
    return evaluate(config, folder, data)


def _check_startable(config):
    """Raises a `UserError` if a training lacks what it starts from."""
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


def check(config, folder):
    """What a training would meet and need, without training; see `preflight.check`.

    Prepares the data in `folder/data`, and draws `folder/check.png`.
    """
    from official_selftrain import preflight

    _check_startable(config)
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make(config.runtime)
    training.check_batches(config, distribution)
    data = prepare(config, folder / "data", distribution)
    config = data.complete(config)
    picture = folder / "check.png" if distribution.chief else None
    with distribution.one_job():
        return preflight.check(training.Training(config, folder, data, distribution), picture)


def prepare(config, folder, distribution):
    """The `Data` of a config; the chief alone writes it."""
    return distribution.chief_first(lambda: Data(config, folder))


# --- Evaluation ------------------------------------------------------------------------------


def evaluate(config, folder, data=None, weights=None):
    """Metrics of trained weights on the evaluation source, written to `folder/metrics.json`.

    Args:
        config: `Config` with an evaluation source.
        folder: the run folder; its `model.weights.h5` is taken unless `weights` is given.
        data: prepared `Data`, None prepares it in `folder/data`.
        weights: a `.weights.h5` file or run folder, or None.
    """
    folder = pathlib.Path(folder)
    file = folder / "metrics.json"
    if file.exists() and weights is None:
        return read_json(file)
    if config.evaluation is None or not config.evaluation.given:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    distribution = distribution_lib.make(config.runtime)
    data = data or prepare(config, folder / "data", distribution)
    config = data.complete(config)
    if not data.summaries["evaluation"]["boxes"] and config.task.kind == "detection":
        raise UserError("the evaluation source has no labels; give evaluation.annotations")
    with distribution.one_job():
        predictor = teacher.load_predictor(config, weights or folder, distribution, labelling=False)
        metrics = training.measure(predictor, data, distribution)
        average = folder / checkpoints.AVERAGE
        if weights is None and average.exists():
            predictor = teacher.load_predictor(config, average, distribution, labelling=False)
            averaged = training.measure(predictor, data, distribution)
            metrics |= {f"ema/{name}": value for name, value in averaged.items()}
    if distribution.chief:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, metrics)
        training.log_metrics(folder, config.trainer.steps, metrics)
    distribution.wait()
    return metrics


# --- Pseudo labels ---------------------------------------------------------------------------


def pseudo_label(config, folder, weights, data=None, threshold=None, beam_args=None):
    """Labels the unlabelled source; returns the written files and the label report.

    Args:
        config: `Config` with an unlabelled source.
        folder: where `pseudo-*.tfrecord` and `report.json` are written.
        weights: of the teacher, a file or a run folder.
        data: prepared `Data`, None prepares it in `folder/data`.
        threshold: for the report; None takes the student's thresholds.
        beam_args: arguments of an Apache Beam pipeline that labels the shards; None does it here,
            on all devices and workers of `config.runtime`.
    """
    if config.unlabeled is None or not config.unlabeled.given:
        raise UserError("nothing to label: set unlabeled.images (a folder) or unlabeled.records")
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make(config.runtime)
    data = data or prepare(config, folder / "data", distribution)
    config = data.complete(config)
    files = data.files("unlabeled")
    pseudo = config.pseudo or config_lib.PseudoConfig()
    if threshold is not None:
        pseudo = pseudo.model_copy(update={"score_threshold": threshold, "class_thresholds": {}})
    folder.mkdir(parents=True, exist_ok=True)
    distribution.chief_first(lambda: _claim_labels(folder, weights, data))
    written = teacher.outputs(files, folder)
    with distribution.one_job():
        if beam_args is not None:
            teacher.label_on_beam(config, weights, files, written, beam_args)
        elif not all(os.path.exists(file) for file in written):
            predictor = teacher.load_predictor(config, weights, distribution)
            images = data.summaries["unlabeled"]["images"]
            share = distribution.worker, distribution.workers
            teacher.label(predictor, files, written, str(weights), images, *share)
        distribution.wait()
    if distribution.chief:
        _report_labels(config, folder, files, written, pseudo, data)
    distribution.wait()
    return written, read_json(folder / "report.json")


def _report_labels(config, folder, files, written, pseudo, data):
    from official_selftrain.tasks import make_task

    tally = make_task(config.task).tally(pseudo, data.class_names)
    write_json(folder / "report.json", teacher.report(tally, written, files))
    visualize.preview(
        folder / "preview.png", records.read(written), 12, data.class_names, pseudo.score_threshold,
        masks=config.task.kind == "segmentation",
    )  # fmt: skip


def _claim_labels(folder, weights, data):
    """Keeps the labels of two teachers, or of two sets of images, out of one folder, and removes
    what a kill has left half written."""
    for file in folder.glob("*.tmp"):
        file.unlink()
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
    distribution = distribution_lib.make(config.runtime)
    distribution.chief_first(lambda: claim_folder(config, folder))
    clock = _Clock(folder / "seconds.json" if distribution.chief else None)
    with clock("data"):
        data = prepare(config, folder / "data", distribution)
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
            pseudo_data = prepare(student, folder / "data", distribution)
            results[best.name] = train(student, best, pseudo_data)
    if config.self_training.control:
        with clock("control"):
            control = config_lib.control_config(config, os.path.abspath(folder / "teacher"))
            results["control"] = train(control, folder / "control", data)
    with clock("report"):
        if distribution.chief:
            report.write(config, folder, data, results, clock.seconds)
    return results


class _Clock:
    """Seconds per stage, added up over interruptions; in `file` unless that is None."""

    def __init__(self, file):
        self.file = file
        self.seconds = read_json(file) if file and file.exists() else {}

    def __call__(self, stage):
        self.stage = stage
        logging.info("stage %s", stage)
        return self

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        passed = time.perf_counter() - self.began
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + passed, 2)
        if self.file:
            write_json(self.file, self.seconds)

"""From a config to a finished run: data, model, loop, evaluation, and the stages of `run`.

A run folder holds `config.yaml`, `checkpoints/`, `tensorboard/`, `history.jsonl`,
`model.weights.h5`, `classes.json` and `metrics.json`, and where asked for `ema.weights.h5` and
`best.weights.h5`. `made_of.json` binds it to what it was made of, by content, so that a folder can
be moved or copied. The folder of `run` holds one such folder for each training (`teacher`,
`student`, `control`), `data`, `labels` and `report.html`.
"""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import time

from official_selftrain import config as config_lib
from official_selftrain import teacher
from official_selftrain.conversion import checkpoint
from official_selftrain.data import records, sources, visualize
from official_selftrain.data.sources.problems import hints
from official_selftrain.engine import checkpoints, memory
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.pipeline import training
from official_selftrain.utils.errors import Damaged, UserError
from official_selftrain.utils.files import (
    locked,
    read_json,
    read_json_or_none,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)

# Settings that may change between a run and its continuation: they change no result.
FREE_TO_CHANGE = ("runtime", "description", "published")
# Where data and weights lie; they are compared by what is in them, see `MADE_OF`.
PLACES = ("data_dir", "pseudo.records", "trainer.init")

CONFIG = "config.yaml"
METRICS = "metrics.json"
MADE_OF = "made_of.json"  # what a training or labels were made of
MADE_BY = "made_by.json"
LABEL_REPORT = "report.json"
SECONDS = "seconds.json"
EVALUATIONS = "evaluations"  # of other weights or data than the run's own

SOURCES = ("human", "unlabeled", "pseudo", "evaluation")
SHOWN_CLASSES = 30  # in messages
COMPARED = 500  # human-labelled images that the classes of pseudo labels are compared with


# --- Folders ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _working_in(folder, distribution):
    """Keeps other processes out of a folder, and removes what a killed one left half written.

    Raises:
        UserError: if another process works there.
    """
    if not distribution.chief:  # it belongs to the chief, which has the lock
        yield
        return
    with locked(folder) as known:
        for place in (folder, folder / "data", folder / "checkpoints") if known else ():
            remove_leftovers(place)
        yield


def claim_folder(config, folder):
    """Writes `config.yaml` into a new folder, or checks that an old one is of the same run.

    While nothing is trained or labelled in it, a folder takes other settings.

    Raises:
        UserError: if the folder holds another run, naming what differs, or cannot be written.
    """
    folder = pathlib.Path(folder)
    before = _saved_config(folder)
    changed = _check_settings(config, folder)
    if changed:
        logging.warning(
            "nothing is trained in %s yet: it takes the new settings, %s",
            folder,
            "; ".join(changed[:3]),
        )
        _forget_start(folder)
    elif before is not None and not _differences(before, config, FREE_TO_CHANGE):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    write_text(folder / CONFIG, _environment() + config_lib.dump(config))


def _check_settings(config, folder):
    """Which settings differ from those of the run in a folder.

    Raises:
        UserError: if they do, and something is trained or labelled there.
    """
    before = _saved_config(folder)
    changed = [] if before is None else _differences(before, config)
    if changed and _has_results(folder):
        raise UserError(
            f"{folder} holds a run of {before.experiment!r} that differs in "
            f"{'; '.join(changed[:3])}; choose another --model_dir, or delete the folder"
        )
    return changed


def _saved_config(folder):
    """The config of the run in a folder, None if there is none."""
    file = folder / CONFIG
    return config_lib.load(file) if file.exists() else None


def _has_results(folder):
    """Whether a folder of a training, or of a whole run, holds what took time to make."""
    places = [folder, *(place for place in folder.iterdir() if place.is_dir())]
    return any(
        any(checkpoints.saved_steps(place / "checkpoints"))  # more than that of step 0
        or any(place.glob("*.weights.h5"))
        or any(place.glob("pseudo-*.tfrecord"))
        for place in places
    )


def _forget_start(folder):
    """Removes what was written before the first step, for other settings."""
    for step in checkpoints.saved_steps(folder / "checkpoints"):
        (folder / "checkpoints" / f"ckpt-{step:08d}.npz").unlink()
    (folder / MADE_OF).unlink(missing_ok=True)


def _differences(before, after, ignored=(*FREE_TO_CHANGE, *PLACES)):
    """Texts on the settings in which two configs differ."""

    def compare(before, after, prefix):
        for key in after:
            name, old, new = prefix + key, before.get(key), after[key]
            if name in ignored:
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                yield from compare(old, new, f"{name}.")
            elif old != new:
                yield f"{name} ({_short(old)} there, {_short(new)} now)"

    return list(compare(before.model_dump(), after.model_dump(), ""))


def _short(value):
    return "nothing" if value is None else "a section" if isinstance(value, dict) else repr(value)


def _environment():
    """Versions and git revision as YAML comments."""
    import importlib.metadata as metadata

    lines = []
    for package in (
        "official_selftrain", "keras", "tensorflow", "tensorflow-cpu", "jax", "numpy", "pillow"
    ):  # fmt: skip
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines.append(f"# {package} {metadata.version(package)}")
    checkout = config_lib.PACKAGE.parent
    if (checkout / ".git").exists() and shutil.which("git"):
        git = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        if git.returncode == 0:
            lines.append(f"# git {git.stdout.strip()}")
    return "\n".join(lines) + "\n"


# --- What a training is made of --------------------------------------------------------------


def _content(summary):
    """The identity of prepared data: a SHA-256 over its shards."""
    return summary["content"]


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _identity(init):
    """What tells one start of a training from another: a name, or the SHA-256 of the weights."""
    if not init or init in ("imagenet", "imagenet++"):
        return init
    path = pathlib.Path(init)
    if checkpoint.is_checkpoint(path):
        if path.is_dir():
            files = sorted(path.glob("*"))
        else:
            files = sorted(path.parent.glob(glob.escape(path.name.removesuffix(".index")) + "*"))
        return _digest([sha256(file) for file in files if file.is_file()])
    return sha256(checkpoints.weights_file(path))


def _claim_content(config, folder, data):
    """Binds a training to the content of its data and the weights it starts from.

    Metrics of a finished training on other evaluation data are removed, to be measured again.

    Raises:
        UserError: if the folder's training was made of other data or weights, naming what changed.
    """
    finished = (folder / checkpoints.WEIGHTS).exists()
    now = {
        name: _counted(summary)
        for name, summary in data.summaries.items()
        if name != "unlabeled" and getattr(config, name) is not None
    }
    before = _made_of(folder)
    if not finished:
        now["init"] = _identity(config.trainer.init)
    elif "init" in before:
        now["init"] = before["init"]
    changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    if "evaluation" in changed and (finished or not config.trainer.evaluation_interval):
        changed.remove("evaluation")
        logging.warning("the evaluation data of %s has changed: it is measured again", folder)
        (folder / METRICS).unlink(missing_ok=True)
    if changed and _has_results(folder):
        told = [f"{k}: {_told(before[k])} before, {_told(now[k])} now" for k in sorted(changed)]
        raise UserError(
            f"{folder} was trained on other data or from other weights, which do not mix: "
            f"{'; '.join(told)}. Give back what it began with, choose another --model_dir, or "
            "delete the folder"
        )
    if changed:
        logging.warning("nothing is trained in %s yet: it takes the new data", folder)
        _forget_start(folder)
    if now != {key: before.get(key) for key in now}:
        write_json(folder / MADE_OF, before | now)


def _counted(summary):
    counts = {key: summary[key] for key in ("images", "boxes", "masks")}
    return {"content": _content(summary)} | counts


def _made_of(folder):
    found = read_json_or_none(folder / MADE_OF)
    return found if isinstance(found, dict) else {}


def _told(value):
    """A source or weights of `made_of.json`, in words."""
    if not isinstance(value, dict):
        return "random weights" if value is None else str(value)[:12]
    counts = [f"{value[key]} {key}" for key in ("images", "boxes", "masks") if value.get(key)]
    return f"{', '.join(counts)} ({value['content'][:8]})"


def _check_weights(folder):
    """Checks that the weights of a finished training are those that it wrote.

    Raises:
        UserError: if they are damaged.
    """
    file, before = folder / checkpoints.WEIGHTS, _made_of(folder)
    found = sha256(file)
    if before.setdefault("weights", found) != found:
        raise UserError(
            f"{file} is not as the training has written it (its SHA-256 differs): delete it, and "
            "the same command makes it again from the last checkpoint"
        )
    if before != _made_of(folder):
        write_json(folder / MADE_OF, before)


# --- Data ------------------------------------------------------------------------------------


class Data:
    """The prepared sources of a config; `summaries[name]` as `sources.prepare` returns it.

    Args:
        config: `Config`.
        folder: where they are prepared.
        names: sources that are needed.
        classes: `checkpoints.classes_of` the weights that are to be used, or None.

    Raises:
        UserError: for anything wrong with a source, or between two of them.
    """

    def __init__(self, config, folder, names=SOURCES, classes=None):
        self.folder = pathlib.Path(folder)
        self.classes = classes
        self.summaries = {}
        for name in names:
            source = getattr(config, name)
            if source is not None and source.given:
                with hints(f"{name}."):
                    summary = sources.prepare(source, config.path, self.folder / name)
                self.summaries[name] = summary
        self.names = {
            name: {int(key): str(text) for key, text in summary["classes"].items()}
            for name, summary in self.summaries.items()
        }
        if classes is not None:
            self.names = {"the weights": classes["names"]} | self.names
        check_classes(self.names)
        self._check_leaks()
        self._warn_of_absent_classes()

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

    def _warn_of_absent_classes(self):
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
        """`{class id: name}` of the weights, or of the first source that knows names."""
        order = ("the weights", "human", "pseudo", "evaluation", "unlabeled")
        return next((names for name in order if (names := self.names.get(name))), {})

    def complete(self, config):
        """The config with the class count of the weights, or else of the data.

        Raises:
            UserError: if a label is outside the configured classes, or images are not labelled.
        """
        if config.task.kind == "segmentation":
            for name in ("human", "evaluation"):
                summary = self.summaries.get(name)
                if summary and summary["masks"] < summary["images"]:
                    missing = summary["images"] - summary["masks"]
                    raise UserError(
                        f"{missing} images of {name} have no mask; is {name}.masks given?"
                    )
        elif "human" in self.summaries and not self.summaries["human"]["boxes"]:
            raise UserError("the labelled images hold no box; is human.annotations given?")
        labels = [s["largest_class"] for s in self.summaries.values()]
        largest = max([*self.class_names, *labels], default=0)
        count = config.task.num_classes
        if self.classes is not None:
            known = self.classes["num_classes"]
            if count not in (None, known):
                raise UserError(
                    f"the weights know {known} classes (with the background), but "
                    f"task.num_classes={count}"
                )
            count = known
        if count is None:
            return config.override({"task.num_classes": largest + 1})
        if largest >= count:
            raise UserError(
                f"the data has class id {largest}, but task.num_classes={count} "
                f"allows 1 to {count - 1} (0 is the background)"
            )
        return config.override({"task.num_classes": count})

    def lost_boxes(self, config):
        """Texts on the boxes beyond `task.max_instances`, which a training would leave out."""
        limit = getattr(config.task, "max_instances", None)
        for name in ("human", "pseudo") if limit else ():
            if getattr(config, name) is None or name not in self.summaries:
                continue
            counts = self.summaries[name].get("boxes_per_image", {})
            counts = {int(boxes): images for boxes, images in counts.items()}
            if name == "pseudo" and max(counts, default=0) > limit:
                counts = self._kept_boxes(config)
            lost = sum((boxes - limit) * n for boxes, n in counts.items() if boxes > limit)
            if lost:
                images = sum(n for boxes, n in counts.items() if boxes > limit)
                yield (
                    f"{images} images of {name} have more than task.max_instances={limit} boxes: "
                    f"{lost} of its {sum(b * n for b, n in counts.items())} boxes are left out and "
                    f"count as background; task.max_instances={max(counts)} keeps all"
                )

    def _kept_boxes(self, config):
        """{boxes above the thresholds: pseudo-labelled images}."""
        import numpy as np

        limits = np.array(config.pseudo.thresholds(config.task.num_classes), "float32")
        found = records.read(self.files("pseudo"))
        return collections.Counter(int((r.scores > limits[r.classes]).sum()) for r in found)

    def damage(self):
        """A line on the first damaged file of the sources, which are read through, or None.

        A shard that can be made again is removed, so that the same command does so.
        """
        for name in self.summaries:
            for file in self.files(name) if name == "pseudo" else ():
                proof = read_json_or_none(teacher.proof_file(file))
                if proof and proof["sha256"] != sha256(file):
                    return (
                        f"the labels {file} are damaged: the command that wrote them (`run`, "
                        "`pseudo_label`) labels this file again"
                    )
            message = sources.find_damage(self.folder / name)
            if message:
                return message
        return None


def check_classes(names):
    """Refuses sources of which one gives a class id the name that has another id in the other.

    Args:
        names: `{source: {class id: name}}`.

    Raises:
        UserError: with the names and ids of both.
    """
    for (first, a), (second, b) in itertools.combinations(names.items(), 2):
        pairs, known = set(a.items()), set(a.values())
        wrong = [
            key
            for key, name in b.items()
            if (key, name) not in pairs and (key in a or name in known)
        ]
        if wrong:
            raise UserError(
                f"the classes of {first} and of {second} differ: {_listed(a, wrong)} in {first}, "
                f"{_listed(b, wrong)} in {second}; give each class the same id and name in both "
                "(class_list, or the categories of the annotations)"
            )


def _listed(names, first):
    order = sorted(names, key=lambda key: (len(names) > SHOWN_CLASSES and key not in first, key))
    shown = [f"{key} {names[key]!r}" for key in order[:SHOWN_CLASSES]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def _reading(data, distribution):
    """Explains what a stage meets if another worker is gone, or a file of its data damaged.

    Raises:
        UserError: in place of what TensorFlow raises then.
    """
    try:
        with distribution.one_job():
            yield
    except Exception as error:
        damage = data.damage() if _may_be_of_damage(error) else None
        if damage:
            raise UserError(damage) from None
        raise


def _may_be_of_damage(error):
    """Whether an error is one of TensorFlow's or of damage, or was raised on account of one."""
    import tensorflow as tf

    while error is not None and not isinstance(error, (tf.errors.OpError, Damaged)):
        error = error.__context__
    return error is not None


def prepare(config, folder, distribution, names=SOURCES, classes=None):
    """The `Data` of a config; the chief alone writes it."""
    return distribution.chief_first(lambda: Data(config, folder, names, classes))


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
        UserError: for bad data or options, a folder made of other data, or a diverged training.
    """
    folder = pathlib.Path(folder)
    _check_startable(config, (folder / checkpoints.WEIGHTS).exists())
    distribution = distribution_lib.make(config.runtime)
    training.check_batches(config, distribution)
    with _working_in(folder, distribution):
        distribution.chief_first(lambda: claim_folder(config, folder))
        data = data or prepare(config, folder / "data", distribution)
        config = data.complete(config)
        distribution.chief_first(lambda: _claim_content(config, folder, data))
        if not (folder / checkpoints.WEIGHTS).exists():
            _check_start(config, data)
            for text in data.lost_boxes(config):
                logging.warning("%s", text)
            if evaluate_after or config.trainer.evaluation_interval:
                _check_measurable(config, data)
            with _reading(data, distribution), memory.given_back():
                training.Training(config, folder, data, distribution).run()
        if distribution.chief:
            _check_weights(folder)
            if read_json_or_none(folder / checkpoints.CLASSES) is None:
                _write_classes(config, folder, data)
        if not evaluate_after or config.evaluation is None:
            return {}
        return _evaluate(config, folder, distribution, data)


def _write_classes(config, folder, data):
    classes = {"num_classes": config.task.num_classes, "names": data.class_names}
    write_json(folder / checkpoints.CLASSES, classes)


def _check_startable(config, finished=False):
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
    if config.trainer.init and config.trainer.init != "imagenet" and not finished:
        init = pathlib.Path(config.trainer.init)
        if not (init.exists() or checkpoint.is_checkpoint(init)):
            raise UserError(f"trainer.init: {init} does not exist")


def _check_start(config, data):
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


def check(config, folder, whole=False):
    """What a training would meet and need, without training; see `preflight.check`.

    Prepares the data in `folder/data`, and draws `folder/check.png`. Of a recipe for `run`, whose
    student has no labels yet, the teacher is looked at; the time is that of all stages.

    Args:
        config: `Config`.
        folder: the run folder.
        whole: look at the stages of `run`, even if `pseudo.records` is given.
    """
    from official_selftrain.pipeline import preflight

    whole = whole or (config.pseudo is not None and not config.pseudo.given)
    first = config_lib.teacher_config(config) if whole else config
    _check_startable(first)
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make(config.runtime)
    training.check_batches(first, distribution)
    with _working_in(folder, distribution):
        _check_settings(config, folder)
        names = _without("pseudo") if whole else SOURCES
        data = prepare(config, folder / "data", distribution, names)
        first, config = data.complete(first), data.complete(config)
        _check_start(first, data)
        picture = folder / "check.png" if distribution.chief else None
        with _reading(data, distribution), memory.given_back():
            rows = preflight.check(
                training.Training(first, folder, data, distribution),
                picture,
                config_lib.stages(config) if whole else {},
            )
    return [*(("boxes", f"WARNING: {text}") for text in data.lost_boxes(first)), *rows]


# --- Evaluation ------------------------------------------------------------------------------


def evaluate(config, folder, data=None, weights=None, refresh=False):
    """Metrics of trained weights on the evaluation source, which alone is read.

    Those of the folder's own weights on its own data are written to `folder/metrics.json`. In the
    folder of a run, those of other weights, data or settings go to `folder/evaluations/NAME.json`.

    Args:
        config: `Config` with an evaluation source.
        folder: the run folder; its `model.weights.h5` is taken unless `weights` is given.
        data: prepared `Data`, None prepares it in `folder`.
        weights: a `.weights.h5` file or run folder, or None.
        refresh: measure again what is measured already.

    Raises:
        UserError: for bad data or weights, or without an evaluation source.
    """
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make(config.runtime)
    own = folder / checkpoints.WEIGHTS
    if weights is not None and checkpoints.weights_file(weights).resolve() == own.resolve():
        weights = None
    with _working_in(folder, distribution):
        return _evaluate(config, folder, distribution, data, weights, refresh)


def evaluate_stages(configs, folder):
    """Measures the trainings of a run again, on data that is prepared once.

    Args:
        configs: `{stage: Config}`.
        folder: the folder of `run`.

    Returns:
        `{stage: metrics}`, as `evaluate`.
    """
    folder = pathlib.Path(folder)
    stage, config = next(iter(configs.items()))
    distribution = distribution_lib.make(config.runtime)
    with _working_in(folder, distribution):
        data = _evaluation_data(config, folder / stage, None, folder, distribution)
        return {
            stage: evaluate(config, folder / stage, data, refresh=True)
            for stage, config in configs.items()
        }


def _evaluate(config, folder, distribution, data=None, weights=None, refresh=False):
    """`evaluate` in a locked folder; `weights` are not those of the folder, or None."""
    if config.evaluation is None or not config.evaluation.given:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    file = folder / METRICS
    own = weights is None and _measures_alike(config, folder)
    if own and not refresh and _same_place(config, folder):
        metrics = read_json_or_none(file)
        if metrics:
            return metrics
    data = data or _evaluation_data(config, folder, weights, folder, distribution)
    config = data.complete(config)
    _check_measurable(config, data)
    summary = data.summaries["evaluation"]
    before = _made_of(folder).get("evaluation", {}).get("content", _content(summary))
    own = own and (_same_place(config, folder) or _content(summary) == before)
    with _reading(data, distribution):
        best = folder if own and config.trainer.evaluation_interval else None
        metrics = _measure(config, weights or folder, data, distribution, best)
        average = folder / checkpoints.AVERAGE
        if weights is None and average.exists():
            averaged = _measure(config, average, data, distribution)
            metrics |= {f"ema/{name}": value for name, value in averaged.items()}
    no_run = _saved_config(folder) is None  # whose metrics could be meant
    if distribution.chief and (own or no_run):
        _write_metrics(config, folder, summary, metrics)
    elif distribution.chief:
        _write_foreign_metrics(config, folder, summary, metrics, weights)
    distribution.wait()
    return metrics


@memory.given_back()
def _measure(config, weights, data, distribution, best=None):
    """The metrics of weights, which are kept in the folder `best` if they are the best so far."""
    predictor = teacher.load_predictor(config, weights, distribution, labelling=False)
    metrics = training.measure(predictor, data, distribution)
    if best is not None and distribution.chief:
        name = predictor.task.headline
        checkpoints.save_best(predictor.model, best, config.trainer.steps, name, metrics[name])
    return metrics


def _check_measurable(config, data):
    """Raises a `UserError` if the evaluation source, where there is one, has no labels."""
    summary = data.summaries.get("evaluation")
    if config.evaluation is not None and summary is None:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    if summary is not None and config.task.kind == "detection" and not summary["boxes"]:
        raise UserError("the evaluation source has no labels; give evaluation.annotations")


def _measures_alike(config, folder):
    """Whether a config measures as the one of the run in a folder does, or there is no run."""
    before = _saved_config(folder)

    def measure(config):
        return config.task.model_dump(exclude={"num_classes"}), config.evaluation

    return before is None or measure(before) == measure(config)


def _same_place(config, folder):
    before = _saved_config(folder)
    return before is None or before.data_dir == config.data_dir


def _evaluation_data(config, folder, weights, root, distribution):
    """The evaluation source, prepared in `root`, for weights, or those of `folder`."""
    classes = checkpoints.classes_of(weights or folder)
    own = weights is None and _measures_alike(config, folder) and _same_place(config, folder)
    place = root / "data" if own or not (root / CONFIG).exists() else root / EVALUATIONS / "data"
    names = ("evaluation",) if classes or config.task.num_classes else ("human", "evaluation")
    return prepare(config, place, distribution, names, classes)


def _write_metrics(config, folder, summary, metrics):
    write_json(folder / METRICS, metrics)
    logging.info("the metrics are in %s", folder / METRICS)
    training.log_metrics(folder, config.trainer.steps, metrics)
    before = _made_of(folder)
    now = before | {"evaluation": _counted(summary)}
    if before and before != now:
        logging.warning("the evaluation data of %s has changed since it was trained", folder)
        write_json(folder / MADE_OF, now)


def _write_foreign_metrics(config, folder, summary, metrics, weights):
    """Metrics that are not those of the run in the folder, beside what they were measured on."""
    file, source = checkpoints.weights_file(weights or folder), config.evaluation
    place = pathlib.Path(source.images or source.records or source.tfds or source.embedded)
    identity = [sha256(file), _content(summary), config.task.model_dump(mode="json")]
    name = re.sub(r"[^\w.-]+", "_", f"{file.parent.name}-{place.name}")
    file_name = folder / EVALUATIONS / f"{name}-{_digest(identity)[:8]}.json"
    file_name.parent.mkdir(parents=True, exist_ok=True)
    measured = {"weights": str(file), "data_dir": config.data_dir}
    measured |= {"evaluation": source.model_dump(mode="json"), "images": summary["images"]}
    write_json(file_name, measured | {"metrics": metrics})
    logging.warning(
        "these are not the metrics of the run in %s, which stay as they are: written to %s",
        folder,
        file_name,
    )


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

    Raises:
        UserError: for bad data or weights, or a folder with labels of others.
    """
    if config.unlabeled is None or not config.unlabeled.given:
        raise UserError("nothing to label: set unlabeled.images (a folder) or unlabeled.records")
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make(config.runtime)
    pseudo = config.pseudo or config_lib.PseudoConfig()
    if threshold is not None:
        pseudo = config_lib.changed(pseudo, score_threshold=threshold, class_thresholds={})
    with _working_in(folder, distribution):
        if data is None:
            classes = checkpoints.classes_of(weights)
            names = ("unlabeled", "evaluation", *(() if classes else ("human",)))
            data = prepare(config, folder / "data", distribution, names, classes)
        config = data.complete(config)
        files = data.files("unlabeled")
        written = teacher.outputs(files, folder)
        name = distribution.chief_first(lambda: _claim_labels(config, folder, weights, data))
        shards = list(zip(files, written, strict=True))
        with _reading(data, distribution):
            if beam_args is not None:
                teacher.label_on_beam(config, weights, shards, name, beam_args)
            else:
                _label(config, weights, shards, name, data, distribution)
            distribution.wait()
            if distribution.chief:
                _report_labels(config, folder, files, written, pseudo, data)
            distribution.wait()
    return written, read_json(folder / LABEL_REPORT)


@memory.given_back()
def _label(config, weights, shards, name, data, distribution):
    """Labels this worker's share of the shards."""
    own = shards[distribution.worker :: distribution.workers]
    waiting = teacher.unfinished(own)
    if not any(distribution.gather(len(waiting))):
        return
    if len(waiting) < len(own):
        logging.info("%d of %d shards are labelled already", len(own) - len(waiting), len(own))
    predictor = teacher.load_predictor(config, weights, distribution)
    images = round(data.summaries["unlabeled"]["images"] * len(waiting) / len(shards))
    teacher.label(predictor, waiting, name, images)


def _report_labels(config, folder, files, written, pseudo, data):
    """Writes the report of the labels and their picture, unless they are there."""
    from official_selftrain.tasks import make_task

    names = {str(key): name for key, name in data.class_names.items()}
    made_of = _digest(
        [
            [sha256(file) for file in written],
            _content(data.summaries["unlabeled"]),
            pseudo.thresholds(config.task.num_classes),
            names,
        ]
    )
    before, picture = read_json_or_none(folder / LABEL_REPORT), folder / "preview.png"
    if isinstance(before, dict) and before.get("made_of") == made_of and picture.exists():
        return
    human = records.read(data.files("human")) if "human" in data.summaries else ()
    human = itertools.islice(human, COMPARED)
    tally = make_task(config.task).tally(pseudo, data.class_names, human)
    visualize.preview(
        picture, records.read(written), 12, data.class_names, pseudo.score_threshold,
        masks=config.task.kind == "segmentation",
    )  # fmt: skip
    result = teacher.report(tally, written, files)
    write_json(folder / LABEL_REPORT, result | {"made_of": made_of})


def _claim_labels(config, folder, weights, data):
    """Keeps labels of two teachers, sets of images or settings out of one folder.

    Returns:
        The name of the teacher.

    Raises:
        UserError: if the folder holds other labels, naming what differs.
    """
    unlabeled = data.summaries["unlabeled"]
    made_by = {
        "teacher": teacher.name_of(weights),
        "weights": sha256(checkpoints.weights_file(weights)),
        "unlabeled": {"content": _content(unlabeled), "images": unlabeled["images"]},
        "task": config.task.model_dump(mode="json"),
    }
    before = read_json_or_none(folder / MADE_BY)
    if isinstance(before, dict) and "weights" in before and any(folder.glob("pseudo-*.tfrecord")):
        other = [
            text
            for key, text in (
                ("weights", f"by another teacher ({before['teacher']}, not {made_by['teacher']})"),
                ("unlabeled", f"of other images ({before['unlabeled']['images']} in all)"),
                ("task", "with other settings of the task"),
            )
            if before[key] != made_by[key]
        ]
        if other:
            raise UserError(
                f"{folder} holds labels {' and '.join(other)}; choose another --model_dir, or "
                "delete the folder"
            )
        return before["teacher"]  # a teacher may be moved to a folder of another name
    write_json(folder / MADE_BY, made_by)
    _write_classes(config, folder, data)
    return made_by["teacher"]


# --- The whole method ------------------------------------------------------------------------


def run(config, folder):
    """Teacher, pseudo labels, student, control and report; finished stages are not run again.

    Args:
        config: `Config` with human, unlabelled, pseudo and evaluation sources.
        folder: the run folder.

    Returns:
        `{stage: metrics}` of the trainings.

    Raises:
        UserError: for bad data or options, or if a stage fails.
    """
    from official_selftrain.pipeline import report

    folder = pathlib.Path(folder)
    missing = [name for name in ("unlabeled", "pseudo") if getattr(config, name) is None]
    if missing:
        raise UserError(f"`run` needs the section {missing[0]!r}; this experiment has none")
    if config.pseudo.given:
        raise UserError(
            "`run` labels the images of `unlabeled` itself, so pseudo.records, images, tfds and "
            "embedded must not be set; to learn from labels that exist, use "
            "`python -m official_selftrain.train`"
        )
    distribution = distribution_lib.make(config.runtime)
    with _working_in(folder, distribution):
        distribution.chief_first(lambda: claim_folder(config, folder))
        clock = _Clock(folder / SECONDS if distribution.chief else None)
        with clock("data"):
            data = prepare(config, folder / "data", distribution, _without("pseudo"))
            config = data.complete(config)
        results = {}
        with clock("teacher"):
            results["teacher"] = train(config_lib.teacher_config(config), folder / "teacher", data)
        best = folder / "teacher"
        for suffix in config_lib.rounds(config):
            with clock(f"labels{suffix}"):
                labels = folder / f"labels{suffix}"
                pseudo_label(config, labels, best, data)
            with clock(f"student{suffix}"):
                student = config_lib.student_config(
                    config, os.path.abspath(labels), os.path.abspath(best)
                )
                best = folder / f"student{suffix}"
                pseudo_data = prepare(student, folder / "data", distribution)
                results[best.name] = train(student, best, pseudo_data)
        if config.self_training.control:
            with clock("control"):
                control = config_lib.control_config(config, os.path.abspath(folder / "teacher"))
                results["control"] = train(control, folder / "control", data)
        with clock("report"), _reading(data, distribution):
            if distribution.chief:
                report.write(config, folder, data, results, clock.seconds)
    return results


def write_report(config, folder):
    """Writes the report of a finished run again.

    Raises:
        UserError: if the folder holds no finished run.
    """
    from official_selftrain.pipeline import report

    folder = pathlib.Path(folder)
    if not (folder / "labels" / LABEL_REPORT).exists():
        raise UserError(f"{folder} is no finished folder of `run`: it has no labels/report.json")
    distribution = distribution_lib.make(config.runtime)
    with _working_in(folder, distribution):
        _check_settings(config, folder)
        data = prepare(config, folder / "data", distribution, _without("pseudo"))
        config = data.complete(config)
        found = {
            stage: read_json_or_none(folder / stage / METRICS)
            for stage in config_lib.stages(config)
        }
        results = {stage: metrics for stage, metrics in found.items() if metrics}
        with _reading(data, distribution):
            seconds = read_json_or_none(folder / SECONDS) or {}
            report.write(config, folder, data, results, seconds, again=True)


def _without(name):
    return tuple(other for other in SOURCES if other != name)


class _Clock:
    """Seconds per stage, added up over interruptions; in `file` unless that is None."""

    def __init__(self, file):
        self.file = file
        self.seconds = (file and read_json_or_none(file)) or {}

    def __call__(self, stage):
        self.stage = stage
        logging.info("stage %s", stage)
        return self

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, kind, *_):
        passed = time.perf_counter() - self.began
        self.seconds[self.stage] = round(self.seconds.get(self.stage, 0.0) + passed, 2)
        if self.file:
            write_json(self.file, self.seconds)
        if kind is KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted in the stage {self.stage}; the same command goes on there"
            ) from None

"""Metrics of trained weights, and of their average; those of a run are its own."""

import contextlib
import logging
import pathlib
import re

from tqdm import tqdm

from official_selftrain import teacher
from official_selftrain.data import inputs
from official_selftrain.engine import checkpoints, memory
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.engine import loop as loop_lib
from official_selftrain.pipeline.folder import (
    CONFIG,
    MADE_OF,
    METRICS,
    content_of,
    counted,
    digest,
    made_of,
    saved_config,
    working_in,
)
from official_selftrain.pipeline.workspace import prepare, reading
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, sha256, write_json

EVALUATIONS = "evaluations"  # of other weights or data than the run's own


def evaluate(config, folder, data=None, weights=None, refresh=False):
    """Metrics of trained weights on the evaluation source, which alone is read.

    Those of the folder's own weights on its own data are written to `folder/metrics.json`. In the
    folder of a run, those of other weights, data or settings go to `folder/evaluations/NAME.json`.

    Args:
        config: `Config` with an evaluation source.
        folder: the run folder; its `model.weights.h5` is taken unless `weights` is given.
        data: `PreparedData`, None prepares it in `folder`.
        weights: a `.weights.h5` file or run folder, or None.
        refresh: measure again what is measured already.

    Raises:
        UserError: for bad data or weights, or without an evaluation source.
    """
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make_distribution(config.runtime)
    own = folder / checkpoints.WEIGHTS
    if weights is not None and checkpoints.weights_file(weights).resolve() == own.resolve():
        weights = None
    with working_in(folder, distribution):
        return measured(config, folder, distribution, data, weights, refresh)


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
    distribution = distribution_lib.make_distribution(config.runtime)
    with working_in(folder, distribution):
        data = _evaluation_data(config, folder / stage, None, folder, distribution)
        return {
            stage: evaluate(config, folder / stage, data, refresh=True)
            for stage, config in configs.items()
        }


def measured(config, folder, distribution, data=None, weights=None, refresh=False):
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
    config = data.with_num_classes(config)
    check_measurable(config, data)
    summary = data.summaries["evaluation"]
    before = made_of(folder).get("evaluation", {}).get("content", content_of(summary))
    own = own and (_same_place(config, folder) or content_of(summary) == before)
    with reading(data, distribution):
        best = folder if own and config.trainer.evaluation_interval else None
        metrics = _measure(config, weights or folder, data, distribution, best)
        average = folder / checkpoints.AVERAGE
        if weights is None and average.exists():
            averaged = _measure(config, average, data, distribution)
            metrics |= {f"ema/{name}": value for name, value in averaged.items()}
    no_run = saved_config(folder) is None  # whose metrics could be meant
    if distribution.chief and (own or no_run):
        _write_metrics(config, folder, summary, metrics)
    elif distribution.chief:
        _write_foreign_metrics(config, folder, summary, metrics, weights)
    distribution.barrier()
    return metrics


@memory.given_back()
def _measure(config, weights, data, distribution, best=None):
    """The metrics of weights, which are kept in the folder `best` if they are the best so far."""
    predictor = teacher.load_predictor(config, weights, distribution, labeling=False)
    metrics = measure(predictor, data, distribution)
    if best is not None and distribution.chief:
        name = predictor.task.headline
        checkpoints.save_best(predictor.model, best, config.trainer.steps, name, metrics[name])
    return metrics


def check_measurable(config, data):
    """Raises a `UserError` if the evaluation source, where there is one, has no labels."""
    summary = data.summaries.get("evaluation")
    if config.evaluation is not None and summary is None:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    if summary is not None and config.task.kind == "detection" and not summary["boxes"]:
        raise UserError("the evaluation source has no labels; give evaluation.annotations")


def _measures_alike(config, folder):
    """Whether a config measures as the one of the run in a folder does, or there is no run."""
    before = saved_config(folder)

    def way(config):
        return config.task.model_dump(exclude={"num_classes"}), config.evaluation

    return before is None or way(before) == way(config)


def _same_place(config, folder):
    before = saved_config(folder)
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
    log_metrics(folder, config.trainer.steps, metrics)
    before = made_of(folder)
    now = before | {"evaluation": counted(summary)}
    if before and before != now:
        logging.warning("the evaluation data of %s has changed since it was trained", folder)
        write_json(folder / MADE_OF, now)


def _write_foreign_metrics(config, folder, summary, metrics, weights):
    """Metrics that are not those of the run in the folder, beside what they were measured on."""
    file, source = checkpoints.weights_file(weights or folder), config.evaluation
    place = pathlib.Path(source.images or source.records or source.tfds or source.builtin)
    identity = [sha256(file), content_of(summary), config.task.model_dump(mode="json")]
    name = re.sub(r"[^\w.-]+", "_", f"{file.parent.name}-{place.name}")
    file_name = folder / EVALUATIONS / f"{name}-{digest(identity)[:8]}.json"
    file_name.parent.mkdir(parents=True, exist_ok=True)
    content = {"weights": str(file), "data_dir": config.data_dir}
    content |= {"evaluation": source.model_dump(mode="json"), "images": summary["images"]}
    write_json(file_name, content | {"metrics": metrics})
    logging.warning(
        "these are not the metrics of the run in %s, which stay as they are: written to %s",
        folder,
        file_name,
    )


def measure(predictor, data, distribution):
    """The metrics of a `teacher.Predictor` on the evaluation source.

    Every worker sees a share of the images, and returns the metrics of all.

    Raises:
        UserError: if a shard is damaged.
    """
    metric = predictor.task.metric(data.class_names)
    summary, workers = data.summaries["evaluation"], distribution.workers
    stream = predictor(summary["files"], distribution.worker, workers)
    total = -(-summary["images"] // workers)
    with readable_errors(data, ["evaluation"]):
        for record, prediction in tqdm(stream, "evaluate", total, unit="image"):
            metric.update(record, prediction)
    first, *others = distribution.gather(metric)
    for other in others:
        first.merge(other)
    return first.result()


def log_metrics(folder, step, metrics):
    """Writes metrics for TensorBoard."""
    with loop_lib.summaries(folder / "tensorboard") as write:
        write(step, {f"evaluation/{name}": value for name, value in metrics.items()})


@contextlib.contextmanager
def readable_errors(data, sources, check=None):
    """Turns what TensorFlow raises for a damaged shard into one line that names file and record.

    Args:
        data: `PreparedData`.
        sources: names of the sources that are read inside.
        check: function record, which raises a `UserError` for labels that the task cannot use.

    Raises:
        UserError: in place of an error of TensorFlow that data can cause, or of lacking memory.
    """
    from tensorflow import errors

    of_input = (
        errors.DataLossError, errors.FailedPreconditionError, errors.InvalidArgumentError,
        errors.NotFoundError, errors.OutOfRangeError, errors.PermissionDeniedError,
        errors.UnknownError,
    )  # fmt: skip
    try:
        yield
    except errors.ResourceExhaustedError as error:
        raise UserError(
            f"out of memory ({_first_line(error)}): take smaller batches (human.batch_size, "
            "pseudo.batch_size), trainer.micro_batches=N, or a smaller task.image_size"
        ) from None
    except of_input as error:
        for name in sources:
            if name in data.summaries:
                inputs.find_bad_record(data.files(name), check)
        raise UserError(f"the input failed: {_first_line(error)}") from None


def _first_line(error):
    return error.message.strip().split("\n")[0][:200]

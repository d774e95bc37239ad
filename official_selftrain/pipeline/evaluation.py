"""Metrics of trained weights, and of their average.

The `metrics.json` of a run always describes its own weights on its own data; what other weights or
other data give is written to a file of its own.
"""

import contextlib
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from official_selftrain import teacher
from official_selftrain.config import Config
from official_selftrain.data import inputs
from official_selftrain.data.prepared import PreparedData
from official_selftrain.engine import checkpoints, memory
from official_selftrain.engine.distribution import Distribution
from official_selftrain.engine.summaries import Summaries
from official_selftrain.pipeline.folder import (
    CONFIG,
    MADE_OF,
    METRICS,
    chosen,
    content_of,
    counted,
    digest,
    made_of,
    saved_config,
    trained_steps,
)
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.tasks import task_type
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, sha256, write_json
from official_selftrain.utils.types import StrPath

EVALUATIONS = "evaluations"  # folder for the metrics of weights or data that are not the run's own
Metrics = dict[str, float]


def evaluate(
    config: Config, folder: StrPath, weights: StrPath | None = None, refresh: bool = False
) -> Metrics:
    """Metrics of trained weights on the evaluation source; no other source is read.

    Those of the folder's own weights on its own data are written to `folder/metrics.json`. In the
    folder of a run, those of other weights, data or settings go to `folder/evaluations/NAME.json`.

    Args:
        config: with an evaluation source.
        folder: the run folder, whose `model.weights.h5` is measured unless `weights` is given.
        weights: a `.weights.h5` file or a run folder.
        refresh: measure again what has been measured already.

    Returns:
        `{metric: value}` in [0, 1], -1 where a class has no label.

    Raises:
        UserError: for bad data or weights, or without an evaluation source.
    """
    workspace = Workspace.open(config, folder)
    own = workspace.folder / checkpoints.WEIGHTS
    if weights is not None and checkpoints.weights_file(weights).resolve() == own.resolve():
        weights = None
    with workspace:
        return evaluate_stage(workspace, weights, refresh)


def evaluate_stages(configs: Mapping[str, Config], folder: StrPath) -> dict[str, Metrics]:
    """Measures the trainings of a run again, on data that is prepared once.

    Args:
        configs: `{stage: Config}`.
        folder: the folder of `run`.

    Returns:
        `{stage: metrics}`, as `evaluate` returns them.
    """
    stage, config = next(iter(configs.items()))
    workspace = Workspace.open(config, folder)
    with workspace:
        _prepare(workspace, workspace.folder / stage, None)
        results = {}
        for stage, config in configs.items():
            with workspace.stage(stage, config) as place:
                results[stage] = evaluate_stage(place, refresh=True)
    return results


def evaluate_stage(
    workspace: Workspace, weights: StrPath | None = None, refresh: bool = False
) -> Metrics:
    """`evaluate` in an entered workspace; `weights` are not those of its folder."""
    config, folder, distribution = workspace.config, workspace.folder, workspace.distribution
    if config.evaluation is None or not config.evaluation.given:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    own = weights is None and _measures_alike(config, folder)
    if own and not refresh and _same_place(config, folder):
        metrics = read_json_or_none(folder / METRICS)
        if metrics:
            return metrics
    if not workspace.prepared:
        _prepare(workspace, folder, weights)
    config, data = workspace.config, workspace.data  # now with a class count
    check_measurable(config, data)
    summary = data.summaries["evaluation"]
    before = made_of(folder).get("evaluation", {}).get("content", content_of(summary))
    own = own and (_same_place(config, folder) or content_of(summary) == before)
    with workspace.reading():
        # Weights that selection images have chosen are the best already.
        competes = config.trainer.evaluation_interval and chosen(folder) is None
        best = folder if own and competes else None
        metrics = _measure(config, weights or folder, data, distribution, best)
        average = folder / checkpoints.AVERAGE
        if weights is None and average.exists():
            averaged = _measure(config, average, data, distribution)
            metrics |= {f"ema/{name}": value for name, value in averaged.items()}
    no_run = saved_config(folder) is None  # then metrics.json can belong to no other weights
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
        step = trained_steps(config, best)
        checkpoints.save_best(predictor.model, best, step, name, metrics[name])
    return metrics


def check_measurable(config: Config, data: PreparedData) -> None:
    """Raises a `UserError` if the evaluation source, where there is one, has no labels."""
    summary = data.summaries.get("evaluation")
    if config.evaluation is not None and summary is None:
        raise UserError("nothing to evaluate on: set evaluation.records, or images and annotations")
    if summary is not None and not task_type(config.task).has_truth(summary):
        raise UserError("the evaluation source has no labels; set evaluation.annotations")


def _measures_alike(config, folder):
    """Whether a config measures as the one of the run in a folder does, or there is no run."""
    before = saved_config(folder)

    def settings(config):
        return config.task.model_dump(exclude={"num_classes"}), config.evaluation

    return before is None or settings(before) == settings(config)


def _same_place(config, folder):
    before = saved_config(folder)
    return before is None or before.data_dir == config.data_dir


def _prepare(workspace, folder, weights):
    """Prepares the evaluation source for `weights`, or for those of `folder`."""
    config, root = workspace.config, workspace.folder
    classes = checkpoints.classes_of(weights or folder)
    own = weights is None and _measures_alike(config, folder) and _same_place(config, folder)
    place = root / "data" if own or not (root / CONFIG).exists() else root / EVALUATIONS / "data"
    # Without a class count of the weights, that of the labeled images tells how many there are.
    names = ("evaluation",) if classes or config.task.num_classes else ("human", "evaluation")
    workspace.prepare(names, classes, place)


def _write_metrics(config, folder, summary, metrics):
    write_json(folder / METRICS, metrics)
    logging.info("the metrics are in %s", folder / METRICS)
    log_metrics(folder, trained_steps(config, folder), metrics)
    before = made_of(folder)
    now = before | {"evaluation": counted(summary)}
    if before and before != now:
        logging.warning("the evaluation data of %s has changed since it was trained", folder)
        write_json(folder / MADE_OF, now)


def _write_foreign_metrics(config, folder, summary, metrics, weights):
    """Writes metrics of other weights, data or settings, with what they were measured on."""
    file, source = checkpoints.weights_file(weights or folder), config.evaluation
    place = pathlib.Path(
        source.images or source.records or source.tfds or source.builtin or "labeled"
    )
    identity = [sha256(file), content_of(summary), config.task.model_dump(mode="json")]
    name = re.sub(r"[^\w.-]+", "_", f"{file.parent.name}-{place.name}")
    file_name = folder / EVALUATIONS / f"{name}-{digest(identity)[:8]}.json"
    file_name.parent.mkdir(parents=True, exist_ok=True)
    content = {"weights": str(file), "data_dir": config.data_dir}
    content |= {"evaluation": source.model_dump(mode="json"), "images": summary["images"]}
    write_json(file_name, content | {"metrics": metrics})
    logging.warning(
        "these metrics are not those of the run in %s, whose metrics.json stays as it is: written "
        "to %s",
        folder,
        file_name,
    )


def measure(
    predictor: teacher.Predictor,
    data: PreparedData,
    distribution: Distribution,
    source: str = "evaluation",
) -> Metrics:
    """The metrics of a predictor on a labeled source.

    Every worker predicts a part of the images, and returns the metrics of all.

    Raises:
        UserError: if a shard is damaged.
    """
    metric = predictor.task.metric(data.class_names)
    return collect(metric, predictor, data, distribution, source).result()


def collect(
    counter: Any,
    predictor: teacher.Predictor,
    data: PreparedData,
    distribution: Distribution,
    name: str,
) -> Any:
    """What a metric, or another counter with `update` and `merge`, has counted on a source.

    Every worker predicts a part of the images, and returns the counter of all.

    Raises:
        UserError: if a shard is damaged.
    """
    summary, workers = data.summaries[name], distribution.workers
    stream = predictor(summary["files"], distribution.worker, workers)
    total = math.ceil(summary["images"] / workers)
    with readable_errors(data, [name]):
        for record, prediction in tqdm(stream, "evaluate", total, unit="image"):
            counter.update(record, prediction)
    first, *others = distribution.gather(counter)
    for other in others:
        first.merge(other)
    return first


def log_metrics(
    folder: pathlib.Path, step: int, metrics: Mapping[str, float], source: str = "evaluation"
) -> None:
    """Writes the metrics of a step on a source for TensorBoard."""
    with Summaries(folder / "tensorboard") as summaries:
        summaries.write(step, {f"{source}/{name}": value for name, value in metrics.items()})


@contextlib.contextmanager
def readable_errors(
    data: PreparedData, sources: Sequence[str], check: Callable | None = None
) -> Iterator[None]:
    """Turns what TensorFlow raises for a damaged shard into one line that names file and record.

    Args:
        data: the prepared sources.
        sources: names of those that are read inside.
        check: function of a record, which raises a `UserError` for labels that a task cannot use.

    Raises:
        UserError: in place of an error of TensorFlow that bad data, or too little memory, causes.
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
            f"out of memory ({_first_line(error)}): use smaller batches (human.batch_size, "
            "pseudo.batch_size), trainer.micro_batches=N, or a smaller task.image_size"
        ) from None
    except of_input as error:
        for name in sources:
            if name in data.summaries:
                inputs.find_bad_record(data.files(name), check)
        raise UserError(f"the input failed: {_first_line(error)}") from None


def _first_line(error):
    return error.message.strip().split("\n")[0][:200]

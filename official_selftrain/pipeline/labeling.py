"""Pseudo labels of the unlabeled source, on all devices or by Beam, and what they are worth."""

import dataclasses
import itertools
import logging
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from official_selftrain import config as config_lib
from official_selftrain import teacher
from official_selftrain.config import Config, PseudoConfig, changed
from official_selftrain.data import beam, records, visualize
from official_selftrain.engine import checkpoints, memory
from official_selftrain.pipeline import thresholds
from official_selftrain.pipeline.folder import chosen, content_of, digest, write_classes
from official_selftrain.pipeline.thresholds import LABEL_STATISTICS
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.tasks import make_task
from official_selftrain.tasks.base import LabelStatistics
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json, read_json_or_none, sha256, write_json
from official_selftrain.utils.types import StrPath

MADE_BY = "made_by.json"
COMPARED = 500  # human-labeled images whose classes are compared with those of the pseudo labels


def pseudo_label(
    config: Config,
    folder: StrPath,
    weights: StrPath,
    threshold: float | None = None,
    beam_args: Sequence[str] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Labels the unlabeled source with a trained teacher.

    Args:
        config: with an unlabeled source.
        folder: where `pseudo-*.tfrecord` and `statistics.json` are written.
        weights: of the teacher, a `.weights.h5` file or a run folder.
        threshold: at which the statistics are made, in [0, 1]; by default the student's thresholds.
        beam_args: arguments of an Apache Beam pipeline that labels the shards; without them this
            process does, on all devices and workers of `config.runtime`.

    Returns:
        The files of pseudo labels, and their statistics; see `Task.label_statistics`.

    Raises:
        UserError: for bad data or weights, or a folder that holds other labels.
    """
    if config.unlabeled is None or not config.unlabeled.given:
        raise UserError("nothing to label: set unlabeled.images (a folder) or unlabeled.records")
    return label_stage(Workspace.open(config, folder), weights, threshold, beam_args)


def label_stage(
    workspace: Workspace,
    weights: StrPath,
    threshold: float | None = None,
    beam_args: Sequence[str] | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """`pseudo_label` in a workspace, whose data is prepared unless it has been."""
    with workspace:
        if not workspace.prepared:
            classes = checkpoints.classes_of(weights)
            source = _student_source(workspace.config, threshold)
            human = workspace.config.selection is not None or thresholds.is_auto(source)
            names = ("unlabeled", "evaluation", *(("human",) if human or not classes else ()))
            workspace.prepare(names, classes)
        files = workspace.data.files("unlabeled")
        written = teacher.outputs(files, workspace.folder)
        name = workspace.on_chief_first(lambda: _check_label_folder(workspace, weights))
        shards = list(zip(files, written, strict=True))
        with workspace.reading():
            if beam_args is not None:
                label_on_beam(workspace.config, weights, shards, name, beam_args)
            else:
                _label(workspace, weights, shards, name)
            pseudo = _student_source(workspace.config, threshold)
            selection = thresholds.measured(workspace, weights, pseudo)
            workspace.distribution.barrier()
            if workspace.distribution.chief:
                best = chosen(checkpoints.weights_file(weights).parent) or {}
                converged = best.get("converged")
                _write_statistics(workspace, files, written, pseudo, selection, converged)
            workspace.distribution.barrier()
    return written, read_json(workspace.folder / LABEL_STATISTICS)


def _student_source(config, threshold):
    """The pseudo source, whose thresholds the statistics describe."""
    pseudo = config.pseudo or PseudoConfig()
    if threshold is None:
        return pseudo
    return changed(pseudo, score_threshold=threshold, class_thresholds={})


@memory.given_back()
def _label(workspace, weights, shards, name):
    """Labels this worker's part of the shards."""
    config, distribution = workspace.config, workspace.distribution
    own = shards[distribution.worker :: distribution.workers]
    waiting = teacher.unfinished(own)
    if not any(distribution.gather(len(waiting))):
        return
    if len(waiting) < len(own):
        logging.info("%d of %d shards are labeled already", len(own) - len(waiting), len(own))
    predictor = teacher.load_predictor(config, weights, distribution)
    images = round(workspace.data.summaries["unlabeled"]["images"] * len(waiting) / len(shards))
    teacher.label(predictor, waiting, name, images)


def _write_statistics(workspace, files, written, source, selection, converged):
    """Writes the statistics of the labels and a picture of some, unless they are up to date."""
    config, folder, data = workspace.config, workspace.folder, workspace.data
    task = make_task(config.task)
    further = thresholds.entries(selection, source)
    if thresholds.is_auto(source) and not selection:
        labeled, unlabeled = records.read(data.files("human")), records.read(written)
        further["thresholds"] = task.density_thresholds(unlabeled, labeled, data.class_names)
    pseudo = thresholds.completed(source, further)
    names = {str(key): name for key, name in data.class_names.items()}
    made_of = digest(
        [
            [sha256(file) for file in written],
            content_of(data.summaries["unlabeled"]),
            pseudo.thresholds(config.task.num_classes),
            pseudo.agnostic_nms_iou,
            further,
            converged,
            names,
        ]
    )
    before, picture = read_json_or_none(folder / LABEL_STATISTICS), folder / "preview.png"
    if isinstance(before, dict) and before.get("made_of") == made_of and picture.exists():
        return
    human = records.read(data.files("human")) if "human" in data.summaries else ()
    human = itertools.islice(human, COMPARED)
    kept = (task.kept(record, pseudo) for record in records.read(written))
    visualize.preview(picture, kept, 12, data.class_names, masks=task.draws_masks)
    statistics = task.label_statistics(pseudo, data.class_names, human)
    warnings = thresholds.warnings(selection, source, further)
    if converged is False:
        warnings.append(
            "the teacher had not converged when its training ended, so its labels are worse than "
            "they could be; train it longer (self_training.teacher={trainer.steps: N})"
        )
    result = label_statistics(statistics, written, files, warnings)
    write_json(folder / LABEL_STATISTICS, result | further | {"made_of": made_of})


def label_statistics(
    statistics: LabelStatistics,
    files: Sequence[str],
    truth_files: Sequence[str],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """What the student will see of pseudo labels at its thresholds.

    Args:
        statistics: empty ones of the task.
        files: pseudo-labeled TFRecord files.
        truth_files: the same images with held-back labels, or without any.
        warnings: what else is known to be wrong with the labels.

    Returns:
        What the `result` of `statistics` returns; its warnings are logged.

    Raises:
        UserError: if the thresholds keep nothing at all.
    """
    for record, truth in zip(records.read(files), records.read(truth_files), strict=True):
        statistics.add(record, truth)
    result = statistics.result()
    error_message = statistics.error_message(result)
    if error_message:
        raise UserError(error_message)
    result["warnings"] = [*warnings, *result["warnings"]]
    for warning in result["warnings"]:
        logging.warning("PSEUDO LABELS: %s", warning)
    return result


def _check_label_folder(workspace, weights):
    """Refuses a folder that holds labels of another teacher, for other images or settings.

    Returns:
        The name of the teacher.

    Raises:
        UserError: if the folder holds other labels, naming what differs.
    """
    folder, now = workspace.folder, made_by(workspace, weights)
    before = made_before(folder, workspace.config)
    if before and any(folder.glob("pseudo-*.tfrecord")):
        other = other_labels(before, now)
        if other:
            raise UserError(
                f"{folder} holds labels {' and '.join(other)}; choose another --model_dir, or "
                "delete the folder"
            )
        return before["teacher"]  # a teacher may be moved to a folder of another name
    write_json(folder / MADE_BY, now)
    write_classes(workspace.config, folder, workspace.data)
    return now["teacher"]


def made_by(workspace: Workspace, weights: StrPath) -> dict[str, Any]:
    """What the labels of a workspace depend on, as `MADE_BY` holds it.

    Args:
        workspace: with prepared data.
        weights: of the teacher, a `.weights.h5` file or a run folder.
    """
    unlabeled = workspace.data.summaries["unlabeled"]
    return {
        "teacher": teacher.name_of(weights),
        "weights": sha256(checkpoints.weights_file(weights)),
        "unlabeled": {"content": content_of(unlabeled), "images": unlabeled["images"]},
        "task": workspace.config.task.model_dump(mode="json"),
    }


def made_before(folder: pathlib.Path, config: Config) -> dict[str, Any]:
    """What the labels in a folder depend on, see `made_by`; empty if that is unknown."""
    found = read_json_or_none(folder / MADE_BY)
    if not isinstance(found, dict) or "weights" not in found:
        return {}
    return found | {"task": _in_full(config.task, found["task"])}


def other_labels(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Texts on what differs between two sets of labels; see `made_by`."""
    return [
        text
        for key, text in (
            ("weights", f"by another teacher ({before['teacher']}, not {now['teacher']})"),
            ("unlabeled", f"of other images ({before['unlabeled']['images']} in all)"),
            ("task", "with other settings of the task"),
        )
        if before[key] != now[key]
    ]


def _in_full(task, before):
    """Settings of a task that an earlier version has written, with those that are new since."""
    try:
        return type(task)(**before).model_dump(mode="json")
    except (UserError, TypeError):
        return before


# --- Apache Beam -----------------------------------------------------------------------------


def label_on_beam(
    config: Config,
    weights: StrPath,
    shards: Sequence[tuple[str, str]],
    teacher_name: str,
    arguments: Sequence[str],
) -> None:
    """`teacher.label` by an Apache Beam pipeline; a worker labels one shard at a time.

    Args:
        config: with a class count.
        weights: of the teacher, a file or a run folder that all workers can read.
        shards: (TFRecord file of images, file to write); those already labeled are kept.
        teacher_name: the name that is stored in the records.
        arguments: of the pipeline, such as `["--runner=FlinkRunner", ...]`.

    Raises:
        UserError: without the extra, if the pipeline fails, or with the error that a worker met.
    """
    text = config_lib.dump(config)
    jobs = [_Shard(text, str(weights), file, output, teacher_name) for file, output in shards]
    beam.run(jobs, arguments)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A job for `beam.run`. It holds text only, because it travels to another machine."""

    config: str
    weights: str
    images: str
    file: str
    teacher: str

    def finished(self):
        return True if teacher.is_whole(self.images, self.file) else None

    def write(self):
        with _LOADING:
            predictor = _cached_predictor(self.config, self.weights, self.file)
        teacher.label(predictor, [(self.images, self.file)], self.teacher)


_LOADING = threading.Lock()  # threads of a Beam worker share one model
_predictors: dict[tuple[str, str], teacher.Predictor] = {}


def _cached_predictor(config_text, weights, file):
    """The predictor of this worker, which labels many shards with the same weights."""
    if (config_text, weights) not in _predictors:
        config = config_lib.config_from_dict(config_lib.load_yaml(config_text, "config"))
        workspace = Workspace.open(config, pathlib.Path(file).parent)
        predictor = teacher.load_predictor(config, weights, workspace.distribution)
        _predictors[config_text, weights] = predictor
    return _predictors[config_text, weights]

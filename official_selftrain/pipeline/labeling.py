"""Pseudo labels of the unlabeled source: on all devices or by Beam, bound to their teacher."""

import itertools
import logging
import pathlib

from official_selftrain import config as config_lib
from official_selftrain import teacher
from official_selftrain.data import records, visualize
from official_selftrain.engine import checkpoints, memory
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.pipeline.folder import content_of, digest, working_in, write_classes
from official_selftrain.pipeline.workspace import prepare, reading
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json, read_json_or_none, sha256, write_json

MADE_BY = "made_by.json"
LABEL_STATISTICS = "statistics.json"
COMPARED = 500  # human-labeled images that the classes of pseudo labels are compared with


def pseudo_label(config, folder, weights, data=None, threshold=None, beam_args=None):
    """Labels the unlabeled source; returns the written files and the label report.

    Args:
        config: `Config` with an unlabeled source.
        folder: where `pseudo-*.tfrecord` and `statistics.json` are written.
        weights: of the teacher, a file or a run folder.
        data: `PreparedData`, None prepares it in `folder/data`.
        threshold: for the report; None takes the student's thresholds.
        beam_args: arguments of an Apache Beam pipeline that labels the shards; None does it here,
            on all devices and workers of `config.runtime`.

    Raises:
        UserError: for bad data or weights, or a folder with labels of others.
    """
    if config.unlabeled is None or not config.unlabeled.given:
        raise UserError("nothing to label: set unlabeled.images (a folder) or unlabeled.records")
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make_distribution(config.runtime)
    pseudo = config.pseudo or config_lib.PseudoConfig()
    if threshold is not None:
        pseudo = config_lib.changed(pseudo, score_threshold=threshold, class_thresholds={})
    with working_in(folder, distribution):
        if data is None:
            classes = checkpoints.classes_of(weights)
            names = ("unlabeled", "evaluation", *(() if classes else ("human",)))
            data = prepare(config, folder / "data", distribution, names, classes)
        config = data.with_num_classes(config)
        files = data.files("unlabeled")
        written = teacher.outputs(files, folder)
        name = distribution.on_chief_first(
            lambda: _check_label_folder(config, folder, weights, data)
        )
        shards = list(zip(files, written, strict=True))
        with reading(data, distribution):
            if beam_args is not None:
                teacher.label_on_beam(config, weights, shards, name, beam_args)
            else:
                _label(config, weights, shards, name, data, distribution)
            distribution.barrier()
            if distribution.chief:
                _report_labels(config, folder, files, written, pseudo, data)
            distribution.barrier()
    return written, read_json(folder / LABEL_STATISTICS)


@memory.given_back()
def _label(config, weights, shards, name, data, distribution):
    """Labels this worker's share of the shards."""
    own = shards[distribution.worker :: distribution.workers]
    waiting = teacher.unfinished(own)
    if not any(distribution.gather(len(waiting))):
        return
    if len(waiting) < len(own):
        logging.info("%d of %d shards are labeled already", len(own) - len(waiting), len(own))
    predictor = teacher.load_predictor(config, weights, distribution)
    images = round(data.summaries["unlabeled"]["images"] * len(waiting) / len(shards))
    teacher.label(predictor, waiting, name, images)


def _report_labels(config, folder, files, written, pseudo, data):
    """Writes the report of the labels and their picture, unless they are there."""
    from official_selftrain.tasks import make_task

    names = {str(key): name for key, name in data.class_names.items()}
    made_of = digest(
        [
            [sha256(file) for file in written],
            content_of(data.summaries["unlabeled"]),
            pseudo.thresholds(config.task.num_classes),
            names,
        ]
    )
    before, picture = read_json_or_none(folder / LABEL_STATISTICS), folder / "preview.png"
    if isinstance(before, dict) and before.get("made_of") == made_of and picture.exists():
        return
    human = records.read(data.files("human")) if "human" in data.summaries else ()
    human = itertools.islice(human, COMPARED)
    tally = make_task(config.task).label_statistics(pseudo, data.class_names, human)
    visualize.preview(
        picture, records.read(written), 12, data.class_names, pseudo.score_threshold,
        masks=config.task.kind == "segmentation",
    )  # fmt: skip
    result = teacher.report(tally, written, files)
    write_json(folder / LABEL_STATISTICS, result | {"made_of": made_of})


def _check_label_folder(config, folder, weights, data):
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
        "unlabeled": {"content": content_of(unlabeled), "images": unlabeled["images"]},
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
    write_classes(config, folder, data)
    return made_by["teacher"]

"""What `pseudo.score_threshold=auto` stands for, and what selection images say about labels.

Without selection images the thresholds of boxes follow from how many boxes an image has.

The selection images are labeled images that the teacher has not learned from. A teacher predicts
them as it labels; its thresholds are written to the statistics of its labels, where the student
finds them.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from official_selftrain import teacher
from official_selftrain.config import Config, PseudoConfig, changed
from official_selftrain.data import records
from official_selftrain.engine import checkpoints, memory
from official_selftrain.evaluation.label_statistics import low_precision
from official_selftrain.evaluation.thresholds import FALLBACK
from official_selftrain.pipeline.evaluation import collect
from official_selftrain.pipeline.folder import content_of, digest
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, sha256
from official_selftrain.utils.types import StrPath

LABEL_STATISTICS = "statistics.json"
SELECTION = "selection"  # the prepared source
SHOWN = 10  # classes in a message
# What decides which labels the student reads.
SETTINGS = ("score_threshold", "class_thresholds", "target_precision", "agnostic_nms_iou")


def is_auto(source: PseudoConfig | None) -> bool:
    """Whether the thresholds of a source are to be found."""
    return source is not None and source.score_threshold == "auto"


def measured(workspace: Workspace, weights: StrPath, source: PseudoConfig) -> dict[str, Any]:
    """What a teacher gets right on the selection images, from which thresholds follow.

    It is read from the statistics in the folder if they are of the same teacher and images.

    Args:
        workspace: where labels are written, with prepared data.
        weights: of the teacher, a file or a run folder.
        source: the student's.

    Returns:
        Empty without selection images, else `images`; `classes`, the thresholds as
        `ScoreCounts.result` returns them, empty unless they are `auto`; `precision` at the
        thresholds of the student, or None if nothing reaches them; and `made_of`.
    """
    data, distribution = workspace.data, workspace.distribution
    if SELECTION not in data.summaries:
        return {}
    summary = data.summaries[SELECTION]
    made_of = digest(
        [
            sha256(checkpoints.weights_file(weights)),
            content_of(summary),
            workspace.config.task.model_dump(mode="json"),
            source.model_dump(mode="json", include=set(SETTINGS)),
        ]
    )
    before = read_json_or_none(workspace.folder / LABEL_STATISTICS)
    known = before.get(SELECTION, {}) if isinstance(before, dict) else {}
    # The chief, which writes the file, may be ahead of a worker that has not read it yet.
    if all(distribution.gather(known.get("made_of") == made_of)):
        return known
    with memory.given_back():
        predictor = teacher.load_predictor(workspace.config, weights, distribution)
        search = predictor.task.threshold_search(source)
        search = collect(search, predictor, data, distribution, SELECTION)
    found = search.result(source.target_precision, data.class_names) if is_auto(source) else {}
    limits = _with_classes(source, found).thresholds(workspace.config.task.num_classes)
    precision = search.precision(limits)
    return {
        "images": summary["images"],
        "precision": precision,
        "classes": found,
        "made_of": made_of,
    }


def entries(selection: Mapping[str, Any], source: PseudoConfig) -> dict[str, Any]:
    """What `measured` adds to the statistics of labels."""
    found: dict[str, Any] = {SELECTION: selection} if selection else {}
    if is_auto(source):
        found |= {
            "thresholds": selection.get("classes", {}),
            "target_precision": source.target_precision,
        }
    return found


def warnings(
    selection: Mapping[str, Any], source: PseudoConfig, found: Mapping[str, Any]
) -> list[str]:
    """Sentences about thresholds that could not be found, and about labels known to be bad.

    Args:
        selection: what `measured` returns.
        source: the student's.
        found: what the statistics of the labels will say of their thresholds.
    """
    if not selection:
        return [_WITHOUT_SELECTION] if is_auto(source) and not found["thresholds"] else []
    missed = [
        f"{name} ({entry['precision']:.0%} at {entry['threshold']})"
        for name, entry in selection["classes"].items()
        if entry["reached"] is False
    ]
    texts = low_precision(selection["precision"], "the selection images")
    if missed:
        more = f" and {len(missed) - SHOWN} more" if len(missed) > SHOWN else ""
        texts.append(
            f"no threshold reaches a precision of {source.target_precision:.0%} on the selection "
            f"images for {', '.join(missed[:SHOWN])}{more}: the best one is taken; train the "
            "teacher longer, or lower pseudo.target_precision"
        )
    return texts


_WITHOUT_SELECTION = (
    "pseudo.score_threshold=auto compares the teacher with labeled images that it has not learned "
    f"from, but no selection images are held out: {FALLBACK} is taken for every class; hold some "
    "out, or set a number"
)


def completed(source: PseudoConfig, statistics: Mapping[str, Any]) -> PseudoConfig:
    """The source with the thresholds that the statistics of its labels have, if it is `auto`."""
    return _with_classes(source, statistics.get("thresholds") or {}) if is_auto(source) else source


def _with_classes(source, found):
    """A source whose `auto` is replaced by the thresholds of `ScoreCounts.result`."""
    if not is_auto(source):
        return source
    limits = {entry["class"]: entry["threshold"] for entry in found.values()}
    return changed(source, score_threshold=FALLBACK, class_thresholds=limits)


def with_thresholds(config: Config, statistics: Mapping[str, Any]) -> Config:
    """`completed` for the pseudo source of a config."""
    if config.pseudo is None or not is_auto(config.pseudo):
        return config
    source = completed(config.pseudo, statistics)
    return config.override(
        {
            "pseudo.score_threshold": source.score_threshold,
            "pseudo.class_thresholds": source.class_thresholds,
        }
    )


def from_records(config: Config) -> Config:
    """The config of a student with the thresholds that lie beside its pseudo labels, if `auto`.

    Raises:
        UserError: if there are none, or they were found for another precision.
    """
    source = config.pseudo
    if source is None or not is_auto(source) or not source.given:
        return config
    files = records.matching_files(source.records, config.path) if source.records else []
    folders = {pathlib.Path(file).parent for file in files}
    place = folders.pop() / LABEL_STATISTICS if len(folders) == 1 else None
    found = read_json_or_none(place) if place else None
    statistics = found if isinstance(found, dict) else {}
    target = statistics.get("target_precision")
    if target is None:
        where = f"{place} has none" if place else "its labels are not TFRecords of one folder"
        raise UserError(
            f"pseudo.score_threshold=auto needs the thresholds that pseudo_label or run writes "
            f"with the same setting, but {where}: label again with it, or set a number"
        )
    if target != source.target_precision:
        raise UserError(
            f"pseudo.target_precision={source.target_precision}, but the thresholds in {place} "
            f"were found for {target}: run pseudo_label again, which keeps the labels, or set "
            f"pseudo.target_precision={target}"
        )
    return with_thresholds(config, statistics)

"""One self-contained HTML page about a run: table, curves, label quality and pictures."""

import base64
import functools
import hashlib
import html
import itertools
import json
import logging
import pathlib
import string
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from official_selftrain import teacher
from official_selftrain.config import Config, rounds, stages
from official_selftrain.data import png, records, visualize
from official_selftrain.engine import checkpoints, memory
from official_selftrain.evaluation.label_statistics import threshold_range, threshold_text
from official_selftrain.pipeline import curves
from official_selftrain.pipeline.folder import chosen, history, trained_steps
from official_selftrain.pipeline.plan import network
from official_selftrain.pipeline.reuse import reused_stages
from official_selftrain.pipeline.selection import sentence
from official_selftrain.pipeline.thresholds import LABEL_STATISTICS, completed
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.tasks import make_task, task_type
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, sha256, write_json, write_text

PICTURES, AMONG = 6, 300  # rows of each contact sheet, drawn from so many images
SIDE = 320  # pixels of a picture's longer side
SHOWN_SCORE, ANY_SCORE = 0.3, 0.1  # lower scores clutter the pictures

NO_CURVES = "<p>Curves need matplotlib: pip install 'official_selftrain[report]'</p>"

TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


def write(
    workspace: Workspace,
    results: Mapping[str, Mapping[str, float]],
    seconds: Mapping[str, float],
    again: bool = False,
) -> None:
    """Writes `report.html`, `pictures-*.png` and `comparison.json` into the folder of a `run`.

    The pictures show the labels and the student of the last round.

    Args:
        workspace: of the run, with prepared data.
        results: `{stage: metrics}` in the order of the stages.
        seconds: `{stage: seconds}`.
        again: also write it if nothing has changed since it was written.
    """
    config, folder = workspace.config, workspace.folder
    end = f"<!-- made of {_made_of(config, folder, results)} -->"
    if not again and _ends_with(folder / "report.html", end):
        return
    labels = {place.name: _label_statistics(place) for place in label_folders(config, folder)}
    counts = {name: summary["images"] for name, summary in workspace.data.summaries.items()}
    parts = [
        f"<p>{html.escape(verdict(config, results, counts))}</p>",
        _results_table(config, results),
        _stages_table(workspace, results, threshold_text([*labels.values()][-1])),
        _labels_section(config, labels),
        _training_section(config, folder, results, seconds),
        *_pictures_sections(workspace, results, labels),
        _heading("Configuration"),
        f"<pre>{html.escape((folder / 'config.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    write_json(folder / "comparison.json", results)
    write_text(folder / "report.html", f"{page(title_of(config), parts)}\n{end}\n")
    logging.info("wrote %s", folder / "report.html")


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML parts; the title is a plain text."""
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body="\n".join(parts))


def _labels_section(config, labels):
    parts = [_heading("Pseudo labels")]
    for place, result in labels.items():
        parts += [f"<h3>{place}</h3>"] if len(labels) > 1 else []
        parts += [
            _label_table(config, result),
            curves.histogram(result["score_histogram"], threshold_range(result)) or NO_CURVES,
        ]
    return "\n".join(parts)


def _training_section(config, folder, results, seconds):
    histories = {stage: history(folder / stage) for stage in results}
    drawn = curves.curves(histories, ("human_loss", "pseudo_loss", "ratio"))
    reused = {name: f"reused from {place}" for name, place in reused_stages(folder).items()}
    rows = [
        [stage, reused.get(stage, f"{spent:.0f}")]
        for stage, spent in seconds.items()
        if stage != "report"
    ]
    parts = [_heading("Training"), drawn, table(["stage", "seconds"], rows)]
    if config.selection is not None:
        parts += _convergence(folder, histories)
    return "\n".join(part for part in parts if part)


def _convergence(folder, histories):
    """The selection curves, and in words whether each training had converged."""
    found = {stage: chosen(folder / stage) for stage in histories}
    yield _heading("Convergence")
    names = {name: None for rows in histories.values() for row in rows for name in row}
    drawn = [name for name in names if name.startswith("selection_")]
    yield curves.curves(histories, drawn) if drawn else None
    for stage, best in found.items():
        if best is None:
            text = f"{stage} had a fixed length: no image was held out to choose its weights"
        else:
            text = sentence(stage, best)
        kind = "" if best is None or best["converged"] else " class=warning"
        yield f"<p{kind}>{html.escape(text)}.</p>"


def _pictures_sections(workspace, results, labels):
    """Contact sheets of unlabeled and of validation images; the last round is shown."""
    data, folder = workspace.data, workspace.folder
    last, statistics = list(labels.items())[-1]
    total = data.summaries["unlabeled"]["images"]
    unlabeled = _spread(data.files("unlabeled"), total)
    validation = _spread(data.files("evaluation"), data.summaries["evaluation"]["images"])
    pseudo = _spread(teacher.outputs(data.files("unlabeled"), folder / last), total)
    found = _predictions(workspace, results, unlabeled + validation)
    masks = task_type(workspace.config.task).draws_masks
    draw = functools.partial(visualize.draw_record, side=SIDE, names=data.class_names, masks=masks)
    task, source = make_task(workspace.config.task), completed(workspace.config.pseudo, statistics)
    kept = [task.kept(record, source) for record in pseudo]
    count, limit = len(unlabeled), threshold_text(statistics)
    student = found[f"student{last.removeprefix('labels')}"][:count]
    columns = [validation, *(labeled[count:] for labeled in found.values())]
    for name, title, sheet in (
        ("unlabeled", "Unlabeled", _unlabeled_sheet(draw, limit, unlabeled, pseudo, kept, student)),
        ("val", "Validation", _validation_sheet(draw, ["human labels", *found], columns)),
    ):
        yield _heading(f"{title} images")
        yield _picture(folder / f"pictures-{name}.png", sheet)


def title_of(config: Config) -> str:
    """What ran: the experiment's name, and the network as it was, whatever the recipe says."""
    return f"{config.experiment}: {network(config)}"


def verdict(
    config: Config, results: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]
) -> str:
    """What the results say, in words: the last student against control and teacher, in points.

    Args:
        config: of the run.
        results: `{stage: metrics}`, each in [0, 1].
        counts: `{source: images}`.
    """
    *_, student = (stage for stage in results if stage.startswith("student"))
    name = make_task(config.task).headline
    points = {stage: round(100 * metrics[name], 1) for stage, metrics in results.items()}
    others = [
        f"{_against(points[student] - points[stage])} the {stage} ({points[stage]:.1f})"
        for stage in ("control", "teacher")
        if stage in points
    ]
    text = (
        f"The student reaches {points[student]:.1f} {name}: {' and '.join(others)}. It learned "
        f"from {counts['human']} labeled and {counts['unlabeled']} pseudo-labeled images, and all "
        f"were measured on {counts['evaluation']}. "
    )
    if "control" not in points:
        text += "What the pseudo labels add, only a control can tell (self_training.control=true). "
    return text + (
        "One run is no proof: other seeds (trainer.seed) easily differ by a point or two."
    )


def _against(points):
    if round(points, 1) == 0:
        return "level with"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def label_folders(config: Config, folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of pseudo labels of each round."""
    return [folder / f"labels{suffix}" for suffix in rounds(config)]


def _label_statistics(folder):
    statistics = read_json_or_none(folder / LABEL_STATISTICS)
    if statistics is None:
        raise UserError(
            f"{folder}/{LABEL_STATISTICS} is missing or damaged; `run` with the same --model_dir "
            "writes it again"
        )
    return statistics


def _made_of(config, folder, results):
    """A digest of all that the report is made of, but for the seconds, which rise every time."""
    parts = [
        config.model_dump_json(exclude={"data_dir", "runtime"}),
        json.dumps(results),
        *(json.dumps(_label_statistics(place)) for place in label_folders(config, folder)),
        *(sha256(checkpoints.weights_file(folder / stage)) for stage in results),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _ends_with(file, text):
    return file.exists() and file.read_bytes().rstrip().endswith(text.encode())


def _heading(text):
    return f"<h2>{text}</h2>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table of plain texts."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _results_table(config, results):
    names = {name: None for metrics in results.values() for name in metrics}
    columns = [name for name in names if "/" not in name][:3]
    columns += sorted(name for name in names if "/" in name)
    rows = [
        [stage, *(f"{100 * metrics[name]:.1f}" if name in metrics else "" for name in columns)]
        for stage, metrics in results.items()
    ]
    if config.published is not None:
        rows.append(["published", f"{config.published:.1f}", *[""] * (len(columns) - 1)])
    return table(["", *(name.partition("/")[2] or name for name in columns)], rows)


def _stages_table(workspace, results, threshold):
    """What each stage has learned from."""
    data = workspace.data
    human, unlabeled = (data.summaries[name]["images"] for name in ("human", "unlabeled"))
    rows = []
    for stage, settings in stages(workspace.given, data.completed).items():
        if stage not in results:
            continue
        batches, images = str(settings.human.batch_size), f"{human} labeled"
        if stage.startswith("student"):
            batches += f" + {settings.pseudo.batch_size}"
            images += f" + {unlabeled} pseudo-labeled, threshold {threshold}"
        rows.append([stage, _length(settings, workspace.folder / stage), batches, images])
    return table(["", "steps", "images per step", "images"], rows)


def _length(config, folder):
    """The steps of a training; and which ones, if it has not ended with the last."""
    best, steps = chosen(folder), config.steps
    if best is None:
        return steps
    return f"{trained_steps(config, folder)} of {steps}, weights of step {best['step']}"


def _label_table(config, labels):
    rows = make_task(config.task).label_rows(labels)
    warnings = "".join(f"<p class=warning>{html.escape(w)}</p>" for w in labels["warnings"])
    return warnings + table(["", ""], rows)


def _picture(file, sheet):
    encoded = png.encode(sheet)
    file.write_bytes(encoded)
    shown = f'<img src="data:image/png;base64,{base64.b64encode(encoded).decode()}">'
    # A hidden check box is all that a picture needs to be enlarged without a script.
    return f"<label class=picture><input type=checkbox hidden>{shown}</label>"


def _spread(files, total):
    """Records at equal distances; neighbors are often frames of one film."""
    step = max(min(total, AMONG) // PICTURES, 1)
    return list(itertools.islice(records.read(files), 0, step * PICTURES, step))


def _unlabeled_sheet(draw, limit, images, pseudo, kept, student):
    """Held-back labels if there are any, what the teacher found, what is kept, and the student."""
    columns = {
        f"teacher (> {ANY_SCORE})": [draw(record, threshold=ANY_SCORE) for record in pseudo],
        f"pseudo labels (> {limit})": [draw(record) for record in kept],
        "student": [draw(record, threshold=SHOWN_SCORE) for record in student],
    }
    if any(len(record.boxes) or record.mask for record in images):
        columns = {"held-back labels": [draw(record) for record in images]} | columns
    return visualize.contact_sheet(list(zip(*columns.values(), strict=True)), list(columns))


def _validation_sheet(draw, captions, columns):
    rows = [
        [draw(record, threshold=SHOWN_SCORE) for record in row]
        for row in zip(*columns, strict=True)
    ]
    return visualize.contact_sheet(rows, captions)


@memory.given_back()
def _predictions(workspace, stages, images):
    """`{stage: records}`: the images with the labels that each trained network gives them."""
    task = make_task(workspace.config.task)
    model = task.build_model()
    labeled = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/images.tfrecord"
        records.write(file, images)
        for stage in stages:
            checkpoints.load_weights(model, workspace.folder / stage)
            found = teacher.Predictor(task, model, len(images), workspace.distribution)([file])
            labeled[stage] = [task.to_record(record, p, stage) for record, p in found]
    return labeled

"""One self-contained HTML page about a run: table, curves, label quality and pictures.

python -m official_selftrain.report --model_dir=runs/demo
"""

import base64
import functools
import html
import itertools
import json
import logging
import pathlib

from official_selftrain import cli, visualize
from official_selftrain.data import records
from official_selftrain.errors import UserError
from official_selftrain.files import read_json, write_text

PICTURES, AMONG = 6, 300  # rows of each contact sheet, drawn from so many images
SIDE = 192  # pixels of a picture's longer side
SHOWN_SCORE, ANY_SCORE = 0.3, 0.1  # lower scores clutter the pictures

NO_CURVES = "<p>Curves need matplotlib: pip install 'official_selftrain[report]'</p>"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .3em .8em; }
td { text-align: right; } td:first-child, th { text-align: left; }
img { image-rendering: auto; max-width: 100%; } .warning { color: #a00; font-weight: bold; }
"""


def write(config, folder, data, results, seconds):
    """Writes `report.html` and `pictures-*.png` into a folder of `run`.

    Args:
        config: `Config` of the run, complete.
        folder: the folder of `run`.
        data: `runner.Data`.
        results: `{stage: metrics}`.
        seconds: `{stage: seconds}`.
    """
    folder = pathlib.Path(folder)
    labels = json.loads((folder / "labels" / "report.json").read_text())
    histories = {stage: _history(folder / stage) for stage in results}
    names = ("human_loss", "pseudo_loss", "ratio")
    total = data.summaries["unlabeled"]["images"]
    unlabeled = _spread(data.files("unlabeled"), total)
    validation = _spread(data.files("evaluation"), data.summaries["evaluation"]["images"])
    pseudo = _spread(records.matching_files(str(folder / "labels" / "pseudo-*.tfrecord")), total)
    found = _predictions(config, folder, results, unlabeled + validation)
    count = len(unlabeled)
    draw = functools.partial(
        visualize.draw_record,
        side=SIDE,
        names=data.class_names,
        masks=config.task.kind == "segmentation",
    )
    labelling = _unlabeled_sheet(draw, labels, unlabeled, pseudo, found["student"][:count])
    columns = [validation, *(labelled[count:] for labelled in found.values())]
    comparison = _validation_sheet(draw, ["human labels", *found], columns)
    parts = [
        _results_table(config, results),
        _heading("Pseudo labels"),
        _label_table(config, labels),
        visualize.histogram(labels["score_histogram"], labels["threshold"]) or NO_CURVES,
        _heading("Training"),
        visualize.curves(histories, names),
        _table(["stage", "seconds"], [[s, f"{t:.0f}"] for s, t in seconds.items()]),
        _heading("Unlabelled images"),
        _picture(folder / "pictures-unlabeled.png", labelling),
        _heading("Validation images"),
        _picture(folder / "pictures-val.png", comparison),
        _heading("Configuration"),
        f"<pre>{html.escape((folder / 'config.yaml').read_text())}</pre>",
    ]
    title = html.escape(f"{config.experiment}: {config.description}")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>" + "\n".join(part for part in parts if part)
    )
    write_text(folder / "report.html", page)
    write_text(folder / "comparison.json", json.dumps(results, indent=1))
    logging.info("wrote %s", folder / "report.html")


def _heading(text):
    return f"<h2>{text}</h2>"


def _table(header, rows):
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
    return _table(["", *(name.partition("/")[2] or name for name in columns)], rows)


def _label_table(config, labels):
    from official_selftrain.tasks import make_task

    rows = make_task(config.task).label_rows(labels)
    warnings = "".join(f"<p class=warning>{html.escape(w)}</p>" for w in labels["warnings"])
    return warnings + _table(["", ""], rows)


def _history(folder):
    file = folder / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _picture(file, sheet):
    encoded = visualize.png(sheet)
    file.write_bytes(encoded)
    return f'<img src="data:image/png;base64,{base64.b64encode(encoded).decode()}">'


def _spread(files, total):
    """Records at equal distances; neighbours are often frames of one film."""
    step = max(min(total, AMONG) // PICTURES, 1)
    return list(itertools.islice(records.read(files), 0, step * PICTURES, step))


def _unlabeled_sheet(draw, labels, images, pseudo, student):
    """Held-back labels, what the teacher found, what is kept, and the student."""
    rows = [
        [
            draw(truth),
            draw(labelled, threshold=ANY_SCORE),
            draw(labelled, threshold=labels["threshold"]),
            draw(found, threshold=SHOWN_SCORE),
        ]
        for truth, labelled, found in zip(images, pseudo, student, strict=True)
    ]
    kept = f"pseudo labels (> {labels['threshold']})"
    captions = ["held-back labels", f"teacher (> {ANY_SCORE})", kept, "student"]
    return visualize.contact_sheet(rows, captions)


def _validation_sheet(draw, captions, columns):
    rows = [
        [draw(record, threshold=SHOWN_SCORE) for record in row]
        for row in zip(*columns, strict=True)
    ]
    return visualize.contact_sheet(rows, captions)


def _predictions(config, folder, stages, images):
    """`{stage: records}`: the images with the labels that each trained network gives them."""
    import tempfile

    from official_selftrain import checkpoints, distribution, teacher
    from official_selftrain.tasks import make_task

    task, devices = make_task(config.task), distribution.make(config.runtime)
    model = task.build_model()
    labelled = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/images.tfrecord"
        records.write(file, images)
        for stage in stages:
            checkpoints.load_weights(model, folder / stage)
            found = teacher.Predictor(task, model, len(images), devices)([file])
            labelled[stage] = [task.to_record(record, p, stage) for record, p in found]
    return labelled


def main():
    """Writes the report of a finished run again."""
    from official_selftrain import runner

    config = cli.config_from_flags()
    folder = pathlib.Path(cli.FLAGS.model_dir)
    if not (folder / "labels" / "report.json").exists():
        raise UserError(f"{folder} is no finished folder of `run`: it has no labels/report.json")
    data = runner.Data(config, folder / "data")
    finished = sorted(folder.glob("*/metrics.json"), key=lambda file: file.stat().st_mtime)
    results = {file.parent.name: read_json(file) for file in finished}
    write(data.complete(config), folder, data, results, read_json(folder / "seconds.json"))
    print(f"report: {folder}/report.html")


if __name__ == "__main__":
    cli.define_flags()
    cli.main(main)

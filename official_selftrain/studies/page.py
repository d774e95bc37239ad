"""The page of a study: sentences, tables and figures in one self-contained file."""

import html
from collections.abc import Sequence

from official_selftrain.config import Config
from official_selftrain.config.studies import Cell, number_at
from official_selftrain.studies.results import NOTE, Results, Table


def page(results: Results, configs: dict[Cell, Config]) -> str:
    """HTML of the results of a study; its figures need the extra `[report]`.

    Args:
        results: of the study.
        configs: the config of each run, for the horizontal axis.
    """
    from official_selftrain.pipeline import report  # which imports Keras

    study = results.study
    parts = [f"<p>{html.escape(study.description)}</p>"]
    parts += [_list(results.sentences()), f"<p>{NOTE}</p>", report.table(*results.main_table())]
    drawn = _figures(results, configs)
    parts += drawn if all(drawn) else [report.NO_CURVES]
    if results.rivals and results.class_metrics:
        parts += ["<h2>Classes</h2>", report.table(*results.class_table())]
    parts += ["<h2>Labels and times</h2>", report.table(*_stages_table(results))]
    return report.page(study.study, parts)


def _figures(results, configs):
    """SVG texts; None instead of one without the extra."""
    from official_selftrain.pipeline import curves

    study = results.study
    figures = [
        curves.intervals(
            {name: _drawn(results.difference(name, rival)) for name in study.variants},
            f"student - {rival} ({results.metric})",
        )
        for rival in results.rivals
    ]
    if study.x is not None:
        lines = _lines(results, configs)
        figures.append(
            curves.sweep(lines, study.x, f"{results.student or 'teacher'} {results.metric}")
        )
    return figures


def _drawn(spread):
    return spread.values, spread.interval


def _lines(results, configs):
    """`{label: {x: values}}`: the variants that differ in nothing but `x` are one line."""
    study = results.study
    lines: dict[str, dict[float, list[float]]] = {}
    for name, settings in study.variants.items():
        rest = [f"{k.rpartition('.')[2]}={v}" for k, v in settings.items() if k != study.x]
        x = number_at(configs[name, study.seeds[0]], study.x)
        values = results.spread(name, results.student or "teacher").values
        lines.setdefault(", ".join(dict.fromkeys(rest)), {})[x] = list(values)
    return lines


def _stages_table(results: Results) -> Table:
    """A row per variant and role: how long it took, and how good the labels were."""
    shown = [
        name for name in dict.fromkeys(key for row in results.rows for key in row)
        if name in ("labels/precision", "labels/recall", "labels/boxes_per_image", "labels/mIoU")
    ]  # fmt: skip
    header = ["variant", "stage", "seconds", "steps", *(n.partition("/")[2] for n in shown)]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in results.rows:
        groups.setdefault((row["variant"], row["stage"]), []).append(row)
    table = []
    for (variant, stage), rows in groups.items():
        means = [_mean([row.get(name, "") for row in rows]) for name in ("seconds", "steps")]
        means += [_mean([row.get(name, "") for row in rows], 2) for name in shown]
        table.append([variant, stage, *means])
    return header, table


def _mean(values, digits=0):
    known = [value for value in values if value != ""]
    return f"{sum(known) / len(known):.{digits}f}" if known else ""


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in sentences) + "</ul>"

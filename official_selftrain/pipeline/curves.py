"""Curves and histograms as SVG, by matplotlib where it is installed."""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any


def curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> str | None:
    """SVG text of scalars over steps, one panel per name, or None without the extra `[report]`.

    Args:
        histories: `{label: [{"step": ..., name: value}, ...]}`.
        names: scalars to draw.
    """
    figure, panels = _figure(len(names))
    if figure is None:
        return None
    for panel, name in zip(panels, names, strict=True):
        for label, history in histories.items():
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=label)
        panel.set_title(name.replace("_", " "))
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend()
    return _svg(figure)


def histogram(counts: Sequence[int], thresholds: Sequence[float]) -> str | None:
    """SVG text of a histogram of scores in [0, 1], or None without the extra `[report]`.

    Args:
        counts: of equally wide bins.
        thresholds: where vertical lines are drawn.
    """
    figure, panels = _figure(1)
    if figure is None:
        return None
    width = 1 / max(len(counts), 1)
    panels[0].bar([i * width for i in range(len(counts))], counts, width, align="edge")
    for threshold in thresholds:
        panels[0].axvline(threshold, color="black", linestyle="--")
    panels[0].set_xlabel("score")
    panels[0].set_title("stored pseudo labels")
    return _svg(figure)


def intervals(
    groups: Mapping[str, tuple[Sequence[float], tuple[float, float] | None]], title: str
) -> str | None:
    """SVG text of values and intervals around 0, a row per group, or None without `[report]`.

    Args:
        groups: `{label: (values, interval of their mean or None)}`.
        title: of the figure.
    """
    figure, panels = _figure(1, max(2.0, 0.6 + 0.35 * len(groups)))
    if figure is None:
        return None
    panel, places = panels[0], range(len(groups))
    for place, (values, interval) in zip(places, groups.values(), strict=True):
        panel.plot(values, [place] * len(values), "o", color="gray", alpha=0.6)
        if interval is not None:
            panel.plot(interval, [place, place], color="black")
            panel.plot([sum(interval) / 2], [place], "|", color="black", markersize=12)
    panel.axvline(0, color="black", linestyle="--", linewidth=0.8)
    panel.set_yticks(places, [label.replace("$", "\\$") for label in groups])
    panel.invert_yaxis()
    panel.set_title(title)
    panel.grid(alpha=0.3)
    return _svg(figure)


def sweep(
    lines: Mapping[str, Mapping[float, Sequence[float]]], x_label: str, y_label: str
) -> str | None:
    """SVG text of values over a setting, with their means, or None without `[report]`.

    Args:
        lines: `{label: {x: values}}`.
        x_label: name of the setting.
        y_label: name of the values.
    """
    figure, panels = _figure(1)
    if figure is None:
        return None
    panel = panels[0]
    for label, points in lines.items():
        means = [(x, sum(values) / len(values)) for x, values in sorted(points.items()) if values]
        if not means:
            continue
        (line,) = panel.plot(*zip(*means, strict=True), label=label.replace("$", "\\$"))
        for x, values in points.items():
            panel.plot([x] * len(values), values, "o", color=line.get_color(), alpha=0.5)
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.3)
    if any(lines):
        panel.legend()
    return _svg(figure)


def _figure(panels, height=3.2):
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except Exception as error:  # a broken package raises anything
        if not isinstance(error, ModuleNotFoundError):
            logging.warning("no curves, since matplotlib cannot be imported: %s", error)
        return None, None
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, height), squeeze=False)
    return figure, axes[0]


def _svg(figure):
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "the same names in every file"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]

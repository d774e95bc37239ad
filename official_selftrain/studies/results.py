"""What the stages of a study have measured: rows, tables and sentences."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from official_selftrain.config import StudyConfig
from official_selftrain.config.studies import Cell
from official_selftrain.studies.graph import Stage
from official_selftrain.studies.intervals import Spread, paired
from official_selftrain.studies.schedule import DONE, HAS_DIVERGED, state_of
from official_selftrain.utils.files import read_json_or_none

# What the stages write, as `pipeline` names it, which would have to import Keras.
METRICS, LABEL_STATISTICS, HISTORY = "metrics.json", "statistics.json", "history.jsonl"
FACTS = "variant", "seed", "stage", "state", "seconds", "steps", "folder"  # columns of each row
Plan: TypeAlias = Mapping[Cell, Mapping[str, Stage]]  # {(variant, seed): {role: stage}}
Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]  # header, rows


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows of a study, and what they amount to.

    Attributes:
        study: what was run.
        rows: one dict per variant, seed and stage: the keys of `FACTS`, then what it measured.
    """

    study: StudyConfig
    rows: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """The metric of the task, such as "AP": the first that an evaluation writes."""
        names = (
            name
            for row in self.rows
            if not row["stage"].startswith("labels")
            for name in row
            if name not in FACTS
        )
        return next(names, "")

    @property
    def class_metrics(self) -> list[str]:
        """The metrics of single classes, such as "AP/dog"."""
        names = {name: None for row in self.rows for name in row}
        return [name for name in names if "/" in name and self._of_class(name)]

    def _of_class(self, name):
        kind = name.partition("/")[0]
        return bool(kind) and self.metric.endswith(kind)

    @property
    def student(self) -> str:
        """The role of the last student, as in "student_2"; empty without students."""
        roles = [row["stage"] for row in self.rows if row["stage"].startswith("student")]
        return max(roles, key=lambda role: (len(role), role), default="")

    @property
    def rivals(self) -> list[str]:
        """The roles that students are compared with."""
        roles = {row["stage"] for row in self.rows}
        return [role for role in ("control", "teacher") if role in roles and self.student]

    def values(self, variant: str, role: str, name: str | None = None) -> list[float | None]:
        """A metric of a role in percent, one value per seed; None where it was not measured."""
        name = name or self.metric
        found = {
            row["seed"]: row.get(name)
            for row in self.rows
            if row["variant"] == variant and row["stage"] == role and row["state"] == DONE
        }
        # Evaluators return -1 where there is nothing to measure.
        return [
            100 * value if (value := found.get(seed)) is not None and value >= 0 else None
            for seed in self.study.seeds
        ]

    def spread(self, variant: str, role: str, name: str | None = None) -> Spread:
        """A metric of a role over the seeds, in percent."""
        return Spread(tuple(v for v in self.values(variant, role, name) if v is not None))

    def difference(self, variant: str, rival: str, name: str | None = None) -> Spread:
        """Student - rival over the seeds, in percent."""
        student = self.values(variant, self.student, name)
        return paired(student, self.values(variant, rival, name))

    def diverged(self, variant: str, role: str) -> int:
        """The number of seeds whose training has diverged."""
        return sum(
            row["variant"] == variant and row["stage"] == role and row["state"] == HAS_DIVERGED
            for row in self.rows
        )

    # --- Tables and sentences ----------------------------------------------------------------

    def main_table(self) -> Table:
        """A row per variant: mean and deviation of each role, and the paired differences."""
        roles = [role for role in ("teacher", "control", self.student) if self._has(role)]
        header = ["variant", "seeds", *(f"{role} {self.metric}" for role in roles)]
        header += [f"{self.student} - {rival}" for rival in self.rivals]
        may_diverge = self.study.may_diverge
        header += [f"{role} diverged" for role in roles if may_diverge]
        rows = []
        for variant in self.study.variants:
            count = max(len(self.spread(variant, role).values) for role in roles) if roles else 0
            row = [variant, str(count)]
            row += [mean_and_deviation(self.spread(variant, role)) for role in roles]
            row += [with_interval(self.difference(variant, rival)) for rival in self.rivals]
            row += [str(self.diverged(variant, role)) for role in roles if may_diverge]
            rows.append(row)
        return header, rows

    def class_table(self) -> Table:
        """A row per variant and class: the paired differences."""
        header = ["variant", "class", *(f"{self.student} - {rival}" for rival in self.rivals)]
        rows = [
            [variant, name.partition("/")[2]]
            + [with_interval(self.difference(variant, rival, name)) for rival in self.rivals]
            for variant in self.study.variants
            for name in self.class_metrics
        ]
        return header, rows

    def sentences(self) -> list[str]:
        """What each variant shows, in words."""
        return [
            f"{variant}: {self._told(variant, rival)}."
            for variant in self.study.variants
            for rival in self.rivals
        ]

    def _has(self, role):
        return any(row["stage"] == role for row in self.rows)

    def _told(self, variant, rival):
        spread = self.difference(variant, rival)
        count = len(spread.values)
        lost = self.diverged(variant, self.student)
        end = f"; {lost} of {len(self.study.seeds)} students diverged" if lost else ""
        if not count:
            return f"student and {rival} cannot be compared yet{end}"
        measured = f"{spread.mean:+.1f} {self.metric}"
        if spread.interval is None:
            return (
                f"the student is {measured} from the {rival} with one seed; an interval needs two "
                f"or more{end}"
            )
        measured += f" [{spread.interval[0]:.1f}, {spread.interval[1]:.1f}], {count} seeds"
        if not spread.sign:
            return f"student and {rival} are not separated: {measured}{end}"
        where = "above" if spread.sign > 0 else "below"
        return f"the student is {where} the {rival}: {measured}{end}"

    # --- Files -------------------------------------------------------------------------------

    def as_csv(self) -> str:
        """The rows as CSV."""
        text = io.StringIO()
        columns = list({name: None for row in self.rows for name in row})
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """The study, its rows, and what they amount to."""
        return {
            "study": self.study.model_dump(mode="json"),
            "metric": self.metric,
            "summary": {variant: self._summary(variant) for variant in self.study.variants},
            "sentences": self.sentences(),
            "rows": self.rows,
        }

    def _summary(self, variant):
        roles = dict.fromkeys(row["stage"] for row in self.rows if "labels" not in row["stage"])
        names = [self.metric, *self.class_metrics]
        summary = {}
        for role in roles:
            spread = self.spread(variant, role)
            summary[role] = _numbers(spread) | {"diverged": self.diverged(variant, role)}
        for rival in self.rivals:
            summary[f"{self.student} - {rival}"] = {
                name: _numbers(self.difference(variant, rival, name)) for name in names
            }
        return summary

    def as_markdown(self) -> str:
        """Sentences and tables as Markdown."""
        parts = [f"# {self.study.study}", self.study.description]
        parts += ["\n".join(f"- {sentence}" for sentence in self.sentences())]
        parts += [NOTE, _markdown(*self.main_table())]
        if self.rivals and self.class_metrics:
            parts += ["## Classes", _markdown(*self.class_table())]
        return "\n\n".join(part for part in parts if part) + "\n"


NOTE = (
    "In percent: mean ± standard deviation over the seeds, and the mean of the paired differences "
    "with its 95 % interval (Student's t)."
)


def collect(study: StudyConfig, plan: Plan) -> Results:
    """Reads what the stages of a study have written so far."""
    rows = []
    for (variant, seed), stages in plan.items():
        for role, stage in stages.items():
            state, seconds = state_of(stage)
            row = {
                "variant": variant,
                "seed": seed,
                "stage": role,
                "state": state,
                "seconds": seconds,
                "steps": "" if stage.kind == "labels" else _steps(stage),
                "folder": stage.name,
            }
            name = LABEL_STATISTICS if stage.kind == "labels" else METRICS
            found = read_json_or_none(stage.folder / name) if state == DONE else None
            if isinstance(found, dict):
                prefix = "labels/" if stage.kind == "labels" else ""
                row |= {f"{prefix}{key}": value for key, value in _plain_numbers(found)}
            rows.append(row)
    return Results(study, rows)


def _steps(stage):
    """The steps that a training has made."""
    file = stage.folder / HISTORY
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    try:
        return json.loads(lines[-1])["step"]
    except (IndexError, ValueError, TypeError, KeyError):  # a kill leaves a row half written
        return ""


def _plain_numbers(found: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


def mean_and_deviation(spread: Spread) -> str:
    """Such as "41.3 ± 0.8"."""
    if not spread.values:
        return ""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.1f}"
    return f"{spread.mean:.1f}{deviation}"


def with_interval(spread: Spread) -> str:
    """Such as "+1.3 [0.4, 2.2]"; of one seed there is no interval."""
    if not spread.values:
        return ""
    if spread.interval is None:
        return f"{spread.mean:+.1f} (one seed: no interval)"
    return f"{spread.mean:+.1f} [{spread.interval[0]:.1f}, {spread.interval[1]:.1f}]"


def _numbers(spread):
    low, high = spread.interval or (None, None)
    mean = spread.mean if spread.values else None
    return {
        "n": len(spread.values), "mean": mean, "sd": spread.deviation, "low": low, "high": high
    }  # fmt: skip


def _markdown(header, rows):
    def line(cells):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])

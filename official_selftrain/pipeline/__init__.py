"""What the commands do: the stages of a run, from its data to its report."""

from official_selftrain.pipeline.evaluation import evaluate, evaluate_stages
from official_selftrain.pipeline.labeling import pseudo_label
from official_selftrain.pipeline.preflight import check
from official_selftrain.pipeline.run import run, write_report
from official_selftrain.pipeline.training import train

__all__ = [
    "check",
    "evaluate",
    "evaluate_stages",
    "pseudo_label",
    "run",
    "train",
    "write_report",
]

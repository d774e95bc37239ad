"""What a command does: stages of a run, from data to report."""

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

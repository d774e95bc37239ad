"""Runs a study: an experiment in several variants and seeds, and tells what they show together.

Teachers, labels and trainings that are equal are made once. Repeat the command to resume. The
results are in MODEL_DIR/studies/NAME: study.html, study.md, results.csv and results.json.

Examples:
  python -m official_selftrain.study --study=list
  python -m official_selftrain.study --study=demo_alpha --model_dir=runs/studies --dry_run
  python -m official_selftrain.study --study=demo_alpha --model_dir=runs/studies --jobs=2

Documentation: docs/studies.md
"""

import pathlib
import sys

from absl import flags

from official_selftrain import cli
from official_selftrain import config as config_lib
from official_selftrain.studies import Study
from official_selftrain.utils.errors import UserError


def main() -> None:
    """Runs the command; its flags are parsed."""
    if cli.FLAGS.study == "list":
        print(listing())
        sys.exit(0)
    cli.require("study", "model_dir")
    settings = config_lib.load_study(cli.FLAGS.study)
    configs = config_lib.variant_configs(settings, cli.overrides(), cli.FLAGS.data_dir)
    study = Study(settings, configs, pathlib.Path(cli.FLAGS.model_dir))
    if cli.FLAGS.dry_run:
        cli.print_rows(study.forecast(cli.FLAGS.jobs))
        return
    failures = study.run(cli.FLAGS.jobs)
    for sentence in study.results().sentences():
        print(sentence)
    print(f"results: {study.place}/study.html")
    cli.print_rows(failures.items())
    if failures:
        raise UserError(
            f"{len(failures)} of {len(study.stages)} stages have failed and are listed above; the "
            "same command tries them again"
        )


def listing() -> str:
    """One line per study: name, number of variants and of seeds, description."""
    rows = [
        (name, f"{len(values.get('variants', ()))} x {len(values.get('seeds', (0, 1, 2)))}",
         str(values.get("description", "")))
        for name, values in config_lib.load_studies().items()
    ]  # fmt: skip
    width = max([5, *(len(name) for name, _, _ in rows)])
    lines = [f"{'study':<{width}}  variants x seeds  description"]
    return "\n".join(lines + [f"{name:<{width}}  {size:>16}  {text}" for name, size, text in rows])


if __name__ == "__main__":
    with cli.group("Study"):
        flags.DEFINE_string(
            "study",
            None,
            "Name of a study, or FILE.py:NAME for one of your own; `list` prints all names. A "
            "FILE.py is executed as Python. Example: demo_alpha",
        )
        flags.DEFINE_integer("jobs", 1, "Stages that run at the same time. Example: 2", 1)
        flags.DEFINE_bool(
            "dry_run", False, "Only tells how many trainings there are, and how long they take."
        )
    cli.define_flags(
        "Folder of studies, which share their stages; what it holds is resumed. "
        "Example: runs/studies",
        experiment=False,
    )
    cli.main(main)

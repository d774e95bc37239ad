"""Runs the whole method: teacher, pseudo labels, student, comparison. Repeat it to resume.

With --mode=check nothing is run: data, step time, memory and disk space are checked before a long
run.

Examples:
  python -m official_selftrain.run --experiment=demo --model_dir=runs/demo
  python -m official_selftrain.run --experiment=folder --data_dir=data --model_dir=runs/mine
  python -m official_selftrain.run --reuse=runs/mine --model_dir=runs/longer --config_file=my.yaml

Documentation: docs/method.md
"""

import os

from absl import flags

from official_selftrain import cli

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the command; its flags are parsed."""
    resumed = FLAGS.model_dir and os.path.exists(os.path.join(FLAGS.model_dir, "config.yaml"))
    config = cli.config_from_flags(folder=None if resumed else FLAGS.reuse)

    from official_selftrain import pipeline

    if FLAGS.mode == "check":
        cli.print_rows(pipeline.check(config, FLAGS.model_dir, whole=True))
        return
    for stage, metrics in pipeline.run(config, FLAGS.model_dir, FLAGS.reuse).items():
        cli.print_metrics(stage, metrics)
    print(f"report: {FLAGS.model_dir}/report.html")


if __name__ == "__main__":
    cli.define_flags()
    with cli.group("Run"):
        flags.DEFINE_enum(
            "mode",
            "run",
            ("run", "check"),
            "Whether to run all stages, or only to check that they can start.",
        )
        flags.DEFINE_string(
            "reuse",
            None,
            "Folder of a finished run to take further in another --model_dir. Its teacher is not "
            "trained again, nor is any other stage whose settings and data are the same. Without "
            "--experiment its settings are the start. Example: runs/mine",
        )
    cli.main(main)

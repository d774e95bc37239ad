"""Runs the whole method: teacher, pseudo labels, student, comparison. Repeat it to resume.

With --mode=check nothing is run: data, step time, memory and disk space are checked before a long
run.

Examples:
  python -m official_selftrain.run --experiment=demo --model_dir=runs/demo
  python -m official_selftrain.run --experiment=demo --model_dir=runs/demo --mode=check
  python -m official_selftrain.run --experiment=folder --data_dir=data --model_dir=runs/mine

Documentation: docs/method.md
"""

from absl import flags

from official_selftrain import cli


def main() -> None:
    """Runs the command; its flags are parsed."""
    config = cli.config_from_flags()

    from official_selftrain import pipeline

    if cli.FLAGS.mode == "check":
        cli.print_rows(pipeline.check(config, cli.FLAGS.model_dir, whole=True))
        return
    for stage, metrics in pipeline.run(config, cli.FLAGS.model_dir).items():
        cli.print_metrics(stage, metrics)
    print(f"report: {cli.FLAGS.model_dir}/report.html")


if __name__ == "__main__":
    cli.define_flags()
    with cli.group("Run"):
        flags.DEFINE_enum(
            "mode",
            "run",
            ("run", "check"),
            "Whether to run all stages, or only to check that they can start.",
        )
    cli.main(main)

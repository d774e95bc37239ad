"""Trains one model: a teacher, a student or a supervised baseline.

The training starts from the last checkpoint in --model_dir if there is one. With --mode=check
nothing is trained: data, step time, memory and disk space are checked before a long run.

Examples:
  python -m official_selftrain.train --experiment=list
  python -m official_selftrain.train --experiment=demo --model_dir=runs/teacher
  python -m official_selftrain.train --experiment=demo --model_dir=runs/teacher --mode=check

Documentation: docs/method.md
"""

from absl import flags

from official_selftrain import cli

MODES = ("train", "eval", "train_and_eval", "check")


def main() -> None:
    """Runs the command; its flags are parsed."""
    config = cli.config_from_flags()

    from official_selftrain import pipeline

    if cli.FLAGS.mode == "check":
        cli.print_rows(pipeline.check(config, cli.FLAGS.model_dir))
        return
    if cli.FLAGS.mode == "eval":
        metrics = pipeline.evaluate(config, cli.FLAGS.model_dir, refresh=True)
    else:
        metrics = pipeline.train(
            config, cli.FLAGS.model_dir, evaluate_after=cli.FLAGS.mode == "train_and_eval"
        )
    cli.print_metrics(config.experiment, metrics)


if __name__ == "__main__":
    cli.define_flags()
    with cli.group("Training"):
        flags.DEFINE_enum(
            "mode",
            "train_and_eval",
            MODES,
            "Whether to train, to evaluate the trained weights, both, or to check that a training "
            "can start. Example: check",
        )
    cli.main(main)

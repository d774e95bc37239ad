"""Trains one model, teacher or student.

python -m official_selftrain.train --experiment=NAME --model_dir=DIR [--mode=train_and_eval]

`--mode=check` trains nothing: it looks at data, time, memory and disk before a long run.
"""

from absl import flags

from official_selftrain import cli

MODES = ("train", "eval", "train_and_eval", "check")


def main():
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
    flags.DEFINE_enum("mode", "train_and_eval", MODES, "what to do")
    cli.main(main)

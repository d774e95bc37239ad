"""The whole method: teacher, pseudo labels, student, comparison. Repeat the command to resume.

python -m official_selftrain.run --experiment=demo --model_dir=runs/demo

`--mode=check` runs nothing: it looks at data, time, memory and disk before a long run.
"""

from absl import flags

from official_selftrain import cli


def main():
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
    flags.DEFINE_enum("mode", "run", ("run", "check"), "what to do")
    cli.main(main)

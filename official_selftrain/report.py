"""Writes report.html of a finished run again: results, curves, label statistics and images.

Examples:
  python -m official_selftrain.report --model_dir=runs/demo
  python -m official_selftrain.report --model_dir=runs/mine --data_dir=data

Documentation: docs/method.md
"""

from official_selftrain import cli


def main() -> None:
    """Runs the command; its flags are parsed."""
    config = cli.config_from_flags()

    from official_selftrain import pipeline

    pipeline.write_report(config, cli.FLAGS.model_dir)
    print(f"report: {cli.FLAGS.model_dir}/report.html")


if __name__ == "__main__":
    cli.define_flags("Folder of a finished run. Example: runs/demo")
    cli.main(main)

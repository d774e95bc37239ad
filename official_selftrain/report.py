"""Writes the HTML page about a finished run again: table, curves, label quality and pictures.

python -m official_selftrain.report --model_dir=runs/demo
"""

from official_selftrain import cli


def main():
    """Writes the report of a finished run again."""
    from official_selftrain import pipeline

    pipeline.write_report(cli.config_from_flags(), cli.FLAGS.model_dir)
    print(f"report: {cli.FLAGS.model_dir}/report.html")


if __name__ == "__main__":
    cli.define_flags()
    cli.main(main)

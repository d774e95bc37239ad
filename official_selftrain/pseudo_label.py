r"""Labels images with a trained teacher and prints statistics of the pseudo labels.

Examples:
  python -m official_selftrain.pseudo_label --experiment=demo --model_dir=runs/labels \
      --weights=runs/demo/teacher
  python -m official_selftrain.pseudo_label --experiment=demo --model_dir=runs/labels \
      --weights=runs/demo/teacher --beam=--runner=DirectRunner

Documentation: docs/method.md
"""

from absl import flags

from official_selftrain import cli


def main() -> None:
    """Runs the command; its flags are parsed."""
    config = cli.config_from_flags()
    cli.require("weights")

    from official_selftrain import pipeline
    from official_selftrain.tasks import make_task

    files, report = pipeline.pseudo_label(
        config,
        cli.FLAGS.model_dir,
        cli.FLAGS.weights,
        threshold=cli.FLAGS.score_threshold,
        beam_args=cli.FLAGS.beam or None,
    )
    cli.print_rows(make_task(config.task).label_rows(report))
    print(f"wrote the pseudo labels to {cli.FLAGS.model_dir} (TFRecord files: {len(files)})")


if __name__ == "__main__":
    cli.define_flags("Folder for the pseudo labels and statistics.json. Example: runs/labels")
    with cli.group("Labeling"):
        flags.DEFINE_string(
            "weights",
            None,
            "The teacher: its run folder or a .weights.h5 file. Example: runs/demo/teacher",
        )
        flags.DEFINE_float(
            "score_threshold",
            None,
            "Score from which a label counts in the statistics; the student's threshold if it is "
            "not given. Example: 0.5",
            0.0,
            1.0,
        )
        flags.DEFINE_multi_string(
            "beam",
            [],
            "Labels with Apache Beam; each value is an argument of its pipeline. "
            "Example: --runner=DirectRunner",
        )
    cli.main(main)

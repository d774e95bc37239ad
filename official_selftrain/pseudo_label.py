"""Labels images with a trained teacher and reports on the labels.

python -m official_selftrain.pseudo_label --experiment=NAME --model_dir=OUT --weights=TEACHER \
    [--params_override=unlabeled.images=FOLDER]
"""

from absl import flags

from official_selftrain import cli
from official_selftrain.utils.errors import UserError


def main():
    config = cli.config_from_flags()
    if not cli.FLAGS.weights:
        raise UserError("give --weights, the teacher's run folder or .weights.h5 file")

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
    print(f"{files[0]} and {len(files) - 1} more")


if __name__ == "__main__":
    cli.define_flags("folder for the pseudo labels and statistics.json")
    flags.DEFINE_string("weights", None, "the teacher: a run folder or a .weights.h5 file")
    flags.DEFINE_float(
        "score_threshold", None, "for the report; the student's by default", 0.0, 1.0
    )
    flags.DEFINE_multi_string(
        "beam", [], "label with Apache Beam; an argument of its pipeline, repeatable"
    )
    cli.main(main)

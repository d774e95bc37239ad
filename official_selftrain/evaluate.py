r"""Measures COCO metrics or mIoU of trained weights, overall and per class.

With only --model_dir the weights in that folder are measured with their own config, or those of
every stage in the folder of a `run`. The metrics are written to metrics.json. Metrics of other
weights or other data than those of the run folder are written to its subfolder evaluations/.

Examples:
  python -m official_selftrain.evaluate --model_dir=runs/demo
  python -m official_selftrain.evaluate --experiment=demo --model_dir=runs/other \
      --weights=runs/demo/student

Documentation: docs/method.md
"""

import pathlib

from absl import flags

from official_selftrain import cli


def main() -> None:
    """Runs the command; its flags are parsed."""
    folder, weights = cli.FLAGS.model_dir, cli.FLAGS.weights
    stages = {}
    if folder and not (weights or cli.FLAGS.experiment or cli.FLAGS.config_file):
        trained = sorted(file.parent for file in pathlib.Path(folder).glob("*/model.weights.h5"))
        stages = {stage.name: cli.config_from_flags(folder=stage) for stage in trained}
    config = next(iter(stages.values()), None) or cli.config_from_flags()

    from official_selftrain import pipeline

    if stages:
        results = pipeline.evaluate_stages(stages, folder)
    else:
        results = {"": pipeline.evaluate(config, folder, weights=weights, refresh=True)}
    for stage, metrics in results.items():
        print(f"\n{stage}" if stage else "")
        for name, value in metrics.items():
            # pycocotools returns -1 where there is nothing to measure, such as no small object.
            print(f"{name:<16} {100 * value:6.2f}" if value >= 0 else f"{name:<16}    n/a")


if __name__ == "__main__":
    cli.define_flags("Run folder to evaluate; metrics.json is written to it. Example: runs/demo")
    with cli.group("Evaluation"):
        flags.DEFINE_string(
            "weights",
            None,
            "Run folder or .weights.h5 file to evaluate instead of the weights in --model_dir. "
            "Example: runs/demo/student",
        )
    cli.main(main)

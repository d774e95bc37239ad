"""COCO metrics or mIoU of trained weights, each also per class.

python -m official_selftrain.evaluate --model_dir=RUN     (a training, or all those of `run`)
python -m official_selftrain.evaluate --experiment=NAME --model_dir=OUT --weights=FILE

They are written to metrics.json. The metrics.json of a run is of its own weights and its own data:
what other weights or other data give is written to RUN/evaluations/.
"""

import pathlib

from absl import flags

from official_selftrain import cli


def main():
    folder, weights = cli.FLAGS.model_dir, cli.FLAGS.weights
    stages = {}
    if folder and not (weights or cli.FLAGS.experiment or cli.FLAGS.config_file):
        trained = sorted(file.parent for file in pathlib.Path(folder).glob("*/model.weights.h5"))
        stages = {stage.name: cli.config_from_flags(folder=stage) for stage in trained}
    config = None if stages else cli.config_from_flags()

    from official_selftrain import pipeline

    if stages:
        results = pipeline.evaluate_stages(stages, folder)
    else:
        results = {"": pipeline.evaluate(config, folder, weights=weights, refresh=True)}
    for stage, metrics in results.items():
        print(f"\n{stage}" if stage else "")
        for name, value in metrics.items():
            print(f"{name:<16} {100 * value:6.2f}" if value >= 0 else f"{name:<16}    none")


if __name__ == "__main__":
    cli.define_flags("folder for metrics.json; a run folder is evaluated with its own config")
    flags.DEFINE_string("weights", None, "a run folder or .weights.h5 file, instead of model_dir's")
    cli.main(main)

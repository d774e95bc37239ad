"""COCO metrics or mIoU of trained weights, written to metrics.json, each also per class.

python -m official_selftrain.evaluate --model_dir=RUN     (a training, or all those of `run`)
python -m official_selftrain.evaluate --experiment=NAME --model_dir=OUT --weights=FILE
"""

import pathlib

from absl import flags

from official_selftrain import cli, config


def main():
    folder, weights = cli.FLAGS.model_dir, cli.FLAGS.weights
    if folder and not weights and not cli.FLAGS.experiment:
        stages = sorted(p.parent for p in pathlib.Path(folder).glob("*/model.weights.h5"))
        for stage in stages:
            saved = config.make(config.load_file(stage / "config.yaml"))
            evaluate(saved, stage, stage, stage.name)
        if stages:
            return
    evaluate(cli.config_from_flags(), folder, weights or folder, "")


def evaluate(settings, folder, weights, title):
    from official_selftrain import runner

    metrics = runner.evaluate(settings, folder, weights=weights)
    print(f"\n{title}" if title else "")
    for name, value in metrics.items():
        print(f"{name:<16} {100 * value:6.2f}" if value >= 0 else f"{name:<16}    none")


if __name__ == "__main__":
    cli.define_flags("folder for metrics.json; a run folder is evaluated with its own config")
    flags.DEFINE_string("weights", None, "a run folder or .weights.h5 file, instead of model_dir's")
    cli.main(main)

"""COCO metrics of trained weights, written to metrics.json, with AP per class.

python -m official_selftrain.evaluate --model_dir=RUN
python -m official_selftrain.evaluate --experiment=NAME --model_dir=OUT --weights=FILE
"""

from absl import flags

from official_selftrain import cli


def main():
    config = cli.config_from_flags()

    from official_selftrain import runner

    metrics = runner.evaluate(
        config, cli.FLAGS.model_dir, weights=cli.FLAGS.weights or cli.FLAGS.model_dir
    )
    for name, value in metrics.items():
        print(f"{name:<16} {100 * value:6.2f}" if value >= 0 else f"{name:<16}    none")


if __name__ == "__main__":
    cli.define_flags("folder for metrics.json; a run folder is evaluated with its own config")
    flags.DEFINE_string("weights", None, "a run folder or .weights.h5 file, instead of model_dir's")
    cli.main(main)

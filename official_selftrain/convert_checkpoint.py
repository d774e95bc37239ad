r"""Converts a released TF1 checkpoint to Keras, or a Keras model back to a TF1 checkpoint.

The matching experiment is written next to the model, as model.yaml next to model.keras. If
--checkpoint is a .keras file, --output is the prefix of the TF1 checkpoint to write.

Examples:
  python -m official_selftrain.convert_checkpoint --checkpoint=spinenet49.tar.gz \
      --config_file=spinenet49_retinanet.yaml --output=model.keras
  python -m official_selftrain.convert_checkpoint --checkpoint=model.keras --output=tf1/model.ckpt

Documentation: docs/models.md
"""

import collections
import pathlib

from absl import flags

from official_selftrain import cli
from official_selftrain import config as config_lib
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the command; its flags are parsed."""
    cli.require("checkpoint", "output")
    if FLAGS.checkpoint.endswith(".keras"):
        _back_to_tf1(FLAGS.checkpoint, FLAGS.output)
    else:
        _to_keras(pathlib.Path(FLAGS.output))


def _to_keras(output):
    """Converts a TF1 checkpoint, and writes its experiment next to the model."""
    if not output.name.endswith((".keras", ".weights.h5")):
        raise UserError(f"--output must end in .keras or .weights.h5; given {output}")
    if not FLAGS.config_file:
        raise UserError(
            "--config_file, the released YAML or JSON, is required: a checkpoint does not record "
            "the activation, the batch-norm epsilon or the fusion"
        )
    values = config_lib.load_file(FLAGS.config_file, last_wins=True)
    size = cli.image_size(FLAGS.image_size)

    from official_selftrain.conversion import checkpoint

    result = checkpoint.convert(FLAGS.checkpoint, values, size)
    summary = checkpoint.forward_summary(result.model)
    _save(result.model, output)
    stem = output.name.removesuffix(".keras").removesuffix(".weights.h5")
    recipe = output.with_name(stem + ".yaml")
    files.write_text(recipe, config_lib.dump(result.config))
    print(f"loaded {len(result.mapped)} variables, checksum {result.checksum:08x}")
    for reason, count in collections.Counter(result.skipped.values()).items():
        print(f"skipped {count}: {reason}")
    for name, (mean, deviation) in summary.items():
        print(f"for an image of noise, {name}: mean {mean:.6g}, std {deviation:.6g}")
    print(f"wrote {output} and {recipe}")


def _save(model, output):
    """Writes a model, or only its weights, to a file that appears once it is complete."""
    suffix = ".keras" if output.suffix == ".keras" else ".weights.h5"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(output, suffix) as temporary:
            model.save(temporary) if suffix == ".keras" else model.save_weights(temporary)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None


def _back_to_tf1(file, prefix):
    from official_selftrain.conversion import checkpoint

    checkpoint.write_checkpoint(checkpoint.load_model(file), prefix)
    print(f"wrote the TF1 checkpoint {prefix}")


if __name__ == "__main__":
    with cli.group("Conversion"):
        flags.DEFINE_string(
            "checkpoint",
            None,
            "TF1 checkpoint (its prefix, folder or .tar.gz file), or a .keras file to convert "
            "back. Example: spinenet49.tar.gz",
        )
        flags.DEFINE_string(
            "config_file",
            None,
            "Released config of the checkpoint, YAML or JSON, complete or partial. "
            "Example: spinenet49_retinanet.yaml",
        )
        flags.DEFINE_string(
            "output",
            None,
            "The .keras or .weights.h5 file to write, or the prefix of a TF1 checkpoint. "
            "Example: model.keras",
        )
        flags.DEFINE_string(
            "image_size",
            None,
            "Size of the network's input as SIDE or HEIGHT,WIDTH in pixels; that of the config if "
            "it is not given. Example: 640",
        )
    cli.main(main)

r"""Converts a released TF1 checkpoint to Keras, or a Keras model back to TF1 names.

python -m official_selftrain.convert_checkpoint --checkpoint=PREFIX_OR_DIR_OR_TARGZ \
    --config_file=RELEASED_YAML_OR_JSON --output=MODEL.keras [--image_size=640]

The matching experiment is written next to MODEL.keras (or MODEL.weights.h5) as MODEL.yaml. With
--checkpoint=MODEL.keras, --output is the prefix of a TF1 checkpoint.
"""

from __future__ import annotations

import collections
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from official_selftrain import cli
from official_selftrain import config as config_lib
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

if TYPE_CHECKING:
    import keras

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the command."""
    for name in ("checkpoint", "output"):
        if not getattr(FLAGS, name):
            raise UserError(f"give --{name}; see --help")
    if FLAGS.checkpoint.endswith(".keras"):
        _back_to_tf1(FLAGS.checkpoint, FLAGS.output)
        return
    if not FLAGS.output.endswith((".keras", ".weights.h5")):
        raise UserError(f"--output must end in .keras or .weights.h5; given {FLAGS.output}")
    if not FLAGS.config_file:
        raise UserError(
            "give --config_file, the released YAML or JSON file: a checkpoint alone does not "
            "determine activation, batch-norm epsilon, and fusion"
        )
    # The released files repeat keys, of which the last one counts for the release.
    values = config_lib.load_file(FLAGS.config_file, last_wins=True)
    size = cli.image_size(FLAGS.image_size)

    from official_selftrain.conversion import checkpoint

    result = checkpoint.convert(FLAGS.checkpoint, values, size)
    # Before anything is written, because it refuses a network that returns NaN.
    summary = checkpoint.forward_summary(result.model)
    output = pathlib.Path(FLAGS.output)
    _save(result.model, output)
    stem = output.name.removesuffix(".keras").removesuffix(".weights.h5")
    recipe = output.with_name(stem + ".yaml")
    files.write_text(recipe, config_lib.dump(result.config))
    print(f"loaded {len(result.mapped)} variables, checksum {result.checksum:08x}")
    for reason, count in collections.Counter(result.skipped.values()).items():
        print(f"skipped {count}: {reason}")
    for name, (mean, deviation) in summary.items():
        print(f"one image of noise: {name} mean {mean:.6g}, standard deviation {deviation:.6g}")
    print(f"wrote {output} and {recipe}")


def _save(model: keras.Model, output: pathlib.Path) -> None:
    """Writes a model, or only its weights, to a file that appears only when it is complete."""
    suffix = ".keras" if output.suffix == ".keras" else ".weights.h5"
    temporary = pathlib.Path(files.temporary_name(output) + suffix)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        model.save(temporary) if suffix == ".keras" else model.save_weights(temporary)
        files.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _back_to_tf1(file: StrPath, prefix: StrPath) -> None:
    from official_selftrain.conversion import checkpoint

    checkpoint.write_checkpoint(load_model(file), prefix)
    print(f"wrote the TF1 checkpoint {prefix}")


def load_model(file: StrPath) -> keras.Model:
    """Loads the network of a `.keras` file, without running code that the file may contain.

    Raises:
        UserError: if the file is missing, damaged, or holds something else.
    """
    import keras

    import official_selftrain.applications.layers  # noqa: F401  registers the layers

    if not pathlib.Path(file).is_file():
        raise UserError(f"the model {file} does not exist")
    try:
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:  # Keras and zipfile raise many kinds for damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{file} is not a network that convert_checkpoint has written, or is damaged ({reason})"
        ) from None
    if not (isinstance(model, keras.Model) and model.weights):
        raise UserError(f"{file} holds a {type(model).__name__}, which is not a network")
    return model


if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint", None, "TF1 checkpoint (prefix, folder, or .tar.gz), or MODEL.keras"
    )
    flags.DEFINE_string(
        "config_file", None, "released YAML or JSON file; missing values are released defaults"
    )
    flags.DEFINE_string(
        "output", None, "MODEL.keras, MODEL.weights.h5, or the prefix of a TF1 checkpoint"
    )
    flags.DEFINE_string(
        "image_size",
        None,
        "input size in pixels, SIDE or HEIGHT,WIDTH, such as 640 or 512,1024; default: the "
        "config's",
    )
    cli.main(main)

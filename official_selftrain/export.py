r"""Writes a trained network as a SavedModel, a TFLite or an ONNX file.

A SavedModel takes images and returns detections or class maps; the other formats hold the network
without preprocessing and postprocessing.

Examples:
  python -m official_selftrain.export --model_dir=runs/demo/student --output=exported
  python -m official_selftrain.export --model_dir=runs/demo/student --format=onnx \
      --output=model.onnx
  python -m official_selftrain.export --config_file=model.yaml --weights=model.keras \
      --output=exported --nms=soft

Documentation: docs/models.md
"""

import pathlib

from absl import flags

from official_selftrain import cli
from official_selftrain.config import Config, changed
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the command; its flags are parsed."""
    cli.require("output")
    config = cli.config_from_flags(needs_folder=False)
    weights = FLAGS.weights or FLAGS.model_dir
    if not weights:
        raise UserError("--model_dir (a finished training) or --weights is required")
    size = cli.image_size(FLAGS.image_size) or config.task.image_size
    task = changed(
        config.task,
        num_classes=num_classes(config, weights),
        precision="float32",  # that of the weights, and the only one of the other formats
    )
    # Not `changed`: a network may be exported at a size that training refuses.
    task = task.model_copy(update={"image_size": size})

    from official_selftrain.conversion import serving
    from official_selftrain.engine import checkpoints
    from official_selftrain.tasks import make_task

    serving.check_output(FLAGS.output, FLAGS.format)
    try:
        model = make_task(task).build_model()
    except ValueError as error:
        raise UserError(f"cannot build the network: {error}") from None
    checkpoints.load_weights(model, weights)
    if FLAGS.format == "saved_model":
        difference = serving.save_model(model, task, FLAGS.output, FLAGS.batch_size, FLAGS.nms)
        print(f"largest difference between the model and the written file: {difference:.2g}")
    else:
        serving.save_network(model, FLAGS.output, FLAGS.format, FLAGS.batch_size)
    print(f"wrote {FLAGS.output}")


def num_classes(config: Config, weights: StrPath) -> int:
    """The number of classes in the config, or else of the training that wrote the weights.

    Raises:
        UserError: if neither holds it.
    """
    if config.task.num_classes is not None:
        return config.task.num_classes
    folder = pathlib.Path(weights)
    file = (folder if folder.is_dir() else folder.parent) / "classes.json"
    if not file.is_file():
        raise UserError(
            f"the number of classes is unknown because {file} is missing; give "
            "--params_override=task.num_classes=N"
        )
    values = files.read_json(file, "class list")
    count = values.get("num_classes") if isinstance(values, dict) else None
    if type(count) is not int or count < 2:
        raise UserError(
            f"{file} must hold the number of classes as num_classes, 2 or more; found "
            f"{count!r}; give --params_override=task.num_classes=N"
        )
    return count


if __name__ == "__main__":
    cli.define_flags("Folder of a finished training. Example: runs/demo/student")
    with cli.group("Export"):
        flags.DEFINE_string(
            "weights",
            None,
            "A .weights.h5 or .keras file to export instead of the weights in --model_dir. "
            "Example: model.keras",
        )
        flags.DEFINE_string(
            "output",
            None,
            "Folder of the SavedModel, or the .tflite or .onnx file. Example: exported",
        )
        flags.DEFINE_enum(
            "format", "saved_model", ["saved_model", "tflite", "onnx"], "Format to write."
        )
        flags.DEFINE_integer(
            "batch_size", None, "Images per call; any number if it is not given. Example: 1", 1
        )
        flags.DEFINE_string(
            "image_size",
            None,
            "Size of the network's input as SIDE or HEIGHT,WIDTH in pixels; that of the config if "
            "it is not given. Example: 512,768",
        )
        flags.DEFINE_enum(
            "nms",
            "hard",
            ["hard", "soft", "none"],
            "Non-maximum suppression of duplicate detections in a SavedModel.",
        )
    cli.main(main)

"""Exports a trained network as SavedModel (images to detections or class maps), TFLite, or ONNX.

python -m official_selftrain.export --model_dir=RUN --output=DIR [--nms=soft] [--batch_size=1]
python -m official_selftrain.export --config_file=MODEL.yaml --weights=MODEL.keras --output=DIR
python -m official_selftrain.export --model_dir=RUN --output=MODEL.onnx --format=onnx
"""

import pathlib

from absl import flags

from official_selftrain import cli
from official_selftrain.config import Config, changed
from official_selftrain.engine import checkpoints
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

FLAGS = flags.FLAGS


def main() -> None:
    """Runs the command."""
    if not FLAGS.output:
        raise UserError("give --output, the folder (saved_model) or file (tflite, onnx) to write")
    config = cli.config_from_flags(needs_folder=False)
    weights = FLAGS.weights or FLAGS.model_dir
    if not weights:
        raise UserError("give --weights=FILE, or --model_dir=RUN with a finished training")
    size = cli.image_size(FLAGS.image_size) or config.task.image_size
    task = changed(
        config.task,
        num_classes=num_classes(config, weights),
        precision="float32",  # as the weights; TFLite and ONNX do not support mixed precision
    )
    # Not `changed`: a network can be exported at a size that training refuses.
    task = task.model_copy(update={"image_size": size})

    # Imported late, so that wrong flags are answered without the seconds that TensorFlow takes.
    from official_selftrain.conversion import serving
    from official_selftrain.models import build_model

    # Before the network is built, which takes long for the large ones.
    serving.check_output(FLAGS.output, FLAGS.format)
    try:
        model = build_model(task)
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
    """The number of classes, background included, from the config or next to the weights.

    Args:
        config: the experiment.
        weights: a weights file or a run folder.

    Raises:
        UserError: if neither of them says it.
    """
    if config.task.num_classes is not None:
        return config.task.num_classes
    folder = pathlib.Path(weights)
    file = (folder if folder.is_dir() else folder.parent) / "classes.json"
    if not file.is_file():
        raise UserError(
            f"the number of classes is unknown, because {file} is missing; give "
            "--params_override=task.num_classes=N"
        )
    values = files.read_json(file, "class list")
    count = values.get("num_classes") if isinstance(values, dict) else None
    # Not `isinstance`, for which true is a whole number.
    if type(count) is not int or count < 2:
        raise UserError(
            f"num_classes in {file} must be a whole number of at least 2, but is {count!r}; give "
            "--params_override=task.num_classes=N"
        )
    return count


if __name__ == "__main__":
    cli.define_flags("run folder of a finished training")
    flags.DEFINE_string(
        "weights", None, "weights file, .weights.h5 or .keras; default: those in --model_dir"
    )
    flags.DEFINE_string(
        "output", None, "where to write: a folder for saved_model, a file for tflite and onnx"
    )
    flags.DEFINE_enum("format", "saved_model", ["saved_model", "tflite", "onnx"], "file format")
    flags.DEFINE_integer("batch_size", None, "fixed number of images per call; default: any", 1)
    flags.DEFINE_string(
        "image_size",
        None,
        "input size in pixels, SIDE or HEIGHT,WIDTH, such as 640 or 512,1024; default: the "
        "config's",
    )
    flags.DEFINE_enum(
        "nms", "hard", ["hard", "soft", "none"], "non-maximum suppression of a detector's boxes"
    )
    cli.main(main)

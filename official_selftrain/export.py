"""Writes a trained network as SavedModel (images in, detections or class maps out), TFLite or ONNX.

python -m official_selftrain.export --model_dir=RUN --output=DIR [--nms=soft] [--batch_size=1]
python -m official_selftrain.export --config_file=MODEL.yaml --weights=MODEL.keras --output=DIR
python -m official_selftrain.export --model_dir=RUN --output=MODEL.onnx --format=onnx
"""

import pathlib

from absl import flags

from official_selftrain import cli
from official_selftrain.config import changed
from official_selftrain.engine import checkpoints
from official_selftrain.utils import files
from official_selftrain.utils.errors import UserError

FLAGS = flags.FLAGS


def main():
    if not FLAGS.output:
        raise UserError("give --output, the folder (saved_model) or file to write")
    config = cli.config_from_flags(needs_folder=False)
    weights = FLAGS.weights or FLAGS.model_dir
    if not weights:
        raise UserError("give --weights or --model_dir, a finished training")
    size = cli.image_size(FLAGS.image_size) or config.task.image_size
    task = changed(
        config.task,
        num_classes=num_classes(config, weights),
        precision="float32",  # as the weights are; other formats know no other
    )
    # Not `changed`: a network may be exported at a size that training refuses.
    task = task.model_copy(update={"image_size": size})

    from official_selftrain.conversion import serving
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


def num_classes(config, weights):
    """The class count of the config, or of the training that the weights are from.

    Raises:
        UserError: if neither tells.
    """
    if config.task.num_classes is not None:
        return config.task.num_classes
    folder = pathlib.Path(weights)
    file = (folder if folder.is_dir() else folder.parent) / "classes.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; say --params_override=task.num_classes=N")
    values = files.read_json(file, "class list")
    count = values.get("num_classes") if isinstance(values, dict) else None
    if type(count) is not int or count < 2:
        raise UserError(
            f"{file} does not tell the number of classes (num_classes, 2 or more; found "
            f"{count!r}); say --params_override=task.num_classes=N"
        )
    return count


if __name__ == "__main__":
    cli.define_flags("run folder of a finished training")
    flags.DEFINE_string("weights", None, ".weights.h5 or .keras file, instead of model_dir's")
    flags.DEFINE_string("output", None, "folder of the SavedModel, or the .tflite or .onnx file")
    flags.DEFINE_enum("format", "saved_model", ["saved_model", "tflite", "onnx"], "what to write")
    flags.DEFINE_integer("batch_size", None, "images per call; any number if unset", 1)
    flags.DEFINE_string("image_size", None, "SIDE or HEIGHT,WIDTH in pixels; the config's if unset")
    flags.DEFINE_enum("nms", "hard", ["hard", "soft", "none"], "suppression of double detections")
    cli.main(main)

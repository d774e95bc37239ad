"""What a training starts from: labeled images and the weights of `trainer.init`."""

import pathlib

import keras

from official_selftrain.config import Config
from official_selftrain.conversion import checkpoint
from official_selftrain.data.prepared import PreparedData, check_classes
from official_selftrain.engine import checkpoints
from official_selftrain.utils.errors import UserError


def check_startable(config: Config, finished: bool = False) -> None:
    """Checks that a training has what it starts from.

    Args:
        config: of the training.
        finished: the training has ended, so the file of `trainer.init` may be gone.

    Raises:
        UserError: naming the setting that is missing or wrong.
    """
    if not config.human.given:
        raise UserError("no labeled images: set human.records, or human.images and annotations")
    if config.pseudo is not None and not config.pseudo.given:
        raise UserError(
            "this experiment trains a student, but pseudo.records is not set: use "
            "`python -m official_selftrain.run`, or give the files that pseudo_label wrote"
        )
    if config.trainer.init == "imagenet++":
        raise UserError(
            "this experiment starts from ImageNet++ (EfficientNet trained by Noisy Student), whose "
            "weights only its authors publish: download their TF1 checkpoint and set "
            "trainer.init to its prefix, folder or .tar.gz file"
        )
    if config.trainer.init and config.trainer.init != "imagenet" and not finished:
        init = pathlib.Path(config.trainer.init)
        if not (init.exists() or checkpoint.is_checkpoint(init)):
            raise UserError(f"trainer.init: {init} does not exist")


def check_start(config: Config, data: PreparedData) -> None:
    """Checks that the weights of `trainer.init` mean the same classes as the data.

    Raises:
        UserError: if they do not.
    """
    init = config.trainer.init
    if not init or init == "imagenet" or checkpoint.is_checkpoint(init):
        return
    classes = checkpoints.classes_of(init)
    if classes is None:
        return
    check_classes({f"trainer.init={init}": classes["names"], "human": data.class_names})
    if classes["num_classes"] != config.task.num_classes:
        raise UserError(
            f"trainer.init={init} knows {classes['num_classes']} classes (with the background), "
            f"but the data has {config.task.num_classes}; if the data holds only some of its "
            f"classes, set task.num_classes={classes['num_classes']}"
        )


def initialize(model: keras.Model, config: Config) -> None:
    """Loads the weights of `trainer.init`, if it is set, into a model.

    Raises:
        UserError: if they cannot be read or belong to another network.
    """
    init = config.trainer.init
    if not init:
        return
    if init != "imagenet":
        if checkpoint.is_checkpoint(init):
            checkpoint.load_backbone(model, config.task.backbone, init)
        else:
            checkpoints.load_weights(model, init)
        return
    from official_selftrain.applications import imagenet

    try:
        imagenet.load_efficientnet(model, config.task.backbone.removeprefix("efficientnet-"))
    except ValueError as error:
        raise UserError(str(error)) from None

"""What a training starts from: labeled images and the weights of `trainer.init`."""

import logging
import pathlib
from collections.abc import Mapping

import keras

from official_selftrain.applications import imagenet
from official_selftrain.config import Config
from official_selftrain.config.networks import is_named, is_public
from official_selftrain.conversion import checkpoint
from official_selftrain.data.prepared import PreparedData, check_classes
from official_selftrain.engine import checkpoints
from official_selftrain.tasks import make_task
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
    init = config.trainer.init
    if not init or finished:
        return
    path = pathlib.Path(init)
    if not (is_named(init) or path.exists() or checkpoint.is_checkpoint(path)):
        raise UserError(f"trainer.init: {init} does not exist")
    if is_public(init):
        imagenet.check_available(config.task.backbone, init)


def check_start(config: Config, data: PreparedData) -> None:
    """Checks that the weights of `trainer.init` can start a network for the classes of the data.

    A student starts from its teacher, with which it must share all classes. Any other training may
    have classes of its own, but not the same ones in another order, which is a mistake.

    Raises:
        UserError: if they cannot.
    """
    known = _known_classes(config)
    if known is None:
        return
    init, count = config.trainer.init, config.task.num_classes
    student = config.pseudo is not None and config.self_training.student_init == "teacher"
    if student or set(known["names"].values()) == set(data.class_names.values()):
        check_classes(_named(config, known, data.class_names))
    if student and known["num_classes"] != count:
        raise UserError(
            f"trainer.init={init} knows {known['num_classes']} classes (with the background), but "
            f"the data has {count}; if the data holds only some of its classes, set "
            f"task.num_classes={known['num_classes']}"
        )


def initialize(model: keras.Model, config: Config, class_names: Mapping[int, str]) -> None:
    """Loads the weights of `trainer.init`, if it is set, into a model.

    Public weights and TF1 checkpoints start the backbone. Weights of a whole network start
    everything, except that the last layer for classes is left out, with a warning, if they know
    other classes than the data.

    Args:
        model: the network of `config.task`.
        config: of the training, with the class count.
        class_names: of the data, `{class id: name}`.

    Raises:
        UserError: if they cannot be read or belong to another network.
    """
    init = config.trainer.init
    if not init:
        return
    if is_public(init):
        imagenet.load_backbone(model, config.task.backbone, init)
    elif checkpoint.is_checkpoint(init):
        checkpoint.load_backbone(model, config.task.backbone, init)
    else:
        _load_network(model, config, class_names)


def _load_network(model, config, class_names):
    """Loads the weights of a whole network, but for those of classes that it does not know."""
    init = config.trainer.init
    known = _known_classes(config)
    same = known is None or _same_classes(config, known, class_names)
    if init.endswith(".keras"):
        other = checkpoint.load_model(init)
    elif same:
        checkpoints.load_weights(model, init)
        return
    else:
        task = config.task.model_copy(update={"num_classes": known["num_classes"]})
        other = make_task(task).build_model()
        checkpoints.load_weights(other, init)
    layer = make_task(config.task).class_layer.replace(".", "/")
    bias = checkpoint.variables_by_name(other).get(f"{layer}/bias")
    # A detector has some numbers per class, one for each anchor.
    here = checkpoint.variables_by_name(model)[f"{layer}/bias"].shape[0]
    same = same and (bias is None or bias.shape[0] == here)
    _copy(other, model, init, None if same else f"{layer}/")
    if not same:
        count = bias.shape[0] * config.task.num_classes // here
        logging.warning(
            "trainer.init=%s has a head for %d classes, which are other ones than the %d of the "
            "data: all weights are taken but those of %s, the last layer for classes, which "
            "starts from random ones; if the data holds only some of these classes, give each "
            "the same id and set task.num_classes=%d",
            *(init, count, config.task.num_classes, layer, count),
        )


def _copy(other, model, init, left_out):
    """Copies all weights by their names, but those of the layer `left_out`."""
    source, target = checkpoint.variables_by_name(other), checkpoint.variables_by_name(model)
    chosen = [name for name in target if not (left_out and name.startswith(left_out))]
    for name in chosen:
        there = source[name].shape if name in source else "nothing"
        if there != target[name].shape:
            raise UserError(
                f"trainer.init={init} does not fit the network of this experiment: {name} is "
                f"{there} in the file and {target[name].shape} here"
            )
    for name in chosen:
        target[name].assign(source[name])


def _known_classes(config):
    """`checkpoints.classes_of` the weights of `trainer.init`; None if nothing is known of them."""
    init = config.trainer.init
    if not init or is_public(init) or checkpoint.is_checkpoint(init):
        return None
    return checkpoints.classes_of(init)


def _same_classes(config, known, names):
    try:
        check_classes(_named(config, known, names))
    except UserError:
        return False
    return known["num_classes"] == config.task.num_classes


def _named(config, known, names):
    return {f"trainer.init={config.trainer.init}": known["names"], "human": names}

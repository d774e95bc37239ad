"""Saving a training, resuming it, and starting from the weights of another."""

import logging
import pathlib

from official_selftrain.errors import UserError

WEIGHTS = "model.weights.h5"


class Checkpoints:
    """The checkpoints of one training: everything that decides its future.

    Saves weights, batch statistics, optimizer, step, moving averages and random seeds. Each file
    set appears under its final name only when complete, so a kill at any moment leaves the one
    before.

    Args:
        folder: where checkpoints are kept.
        trainer: a built and compiled `SelfTrainer`.
        keep: newest checkpoints kept.
    """

    def __init__(self, folder, trainer, keep=5):
        import tensorflow as tf

        self.folder = str(folder)
        # Lists instead of the trainer itself: Keras' tracking leaves the moving averages out, and
        # names of layers change with what the process has built before.
        self.checkpoint = tf.train.Checkpoint(
            student=[variable.value for variable in trainer.student.variables],
            averages=[variable.value for variable in trainer.normalizer.variables],
            optimizer=[variable.value for variable in trainer.optimizer.variables],
        )
        self.manager = tf.train.CheckpointManager(self.checkpoint, self.folder, keep)

    def restore(self):
        """Restores the newest readable checkpoint; returns its step, or 0 if there is none.

        Raises:
            UserError: if there are checkpoints, but all are damaged or of another network.
        """
        import tensorflow as tf

        reason = ""
        for path in reversed(self.manager.checkpoints):
            try:
                self.checkpoint.restore(path).assert_consumed()
            except (AssertionError, ValueError, IndexError, tf.errors.OpError) as error:
                reason = str(error).splitlines()[0][:120]
                logging.warning("the checkpoint %s cannot be used: %s", path, reason)
                continue
            step = int(path.rsplit("-", 1)[1])
            logging.info("resumed from step %d of %s", step, self.folder)
            return step
        if reason:
            raise UserError(
                f"no checkpoint in {self.folder} fits the network of this experiment, or they are "
                f"damaged ({reason}); choose another --model_dir, or delete the folder"
            )
        return 0

    def save(self, step):
        """Saves at `step`.

        Raises:
            UserError: if the disk is full or cannot be written.
        """
        import tensorflow as tf

        try:
            self.manager.save(checkpoint_number=step)
        except (OSError, tf.errors.OpError) as error:
            raise UserError(f"cannot save a checkpoint in {self.folder}: {error}") from None


def save_weights(model, folder):
    """Writes the weights of a finished training to `folder/model.weights.h5`."""
    path = pathlib.Path(folder) / WEIGHTS
    temporary = path.with_name("partial.weights.h5")
    try:
        model.save_weights(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return str(path)


def weights_file(path):
    """The weights at `path`, a `.weights.h5` file or the folder of a finished training.

    Raises:
        UserError: if there are none.
    """
    path = pathlib.Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no weights at {file}; give a .weights.h5 file or the folder of a finished training"
        )
    return file


def load_weights(model, path):
    """Loads weights from a `.weights.h5` file or a run folder that holds one.

    Raises:
        UserError: if there are none, or they belong to another network.
    """
    file = weights_file(path)
    try:
        model.load_weights(file)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights {file} do not fit this network: {reason}") from None

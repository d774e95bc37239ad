"""Saving a training, resuming it, and starting from the weights of another."""

import logging
import math
import pathlib
import re

import numpy as np

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.files import read_json_or_none, replacing, write_json

WEIGHTS = "model.weights.h5"
AVERAGE = "ema.weights.h5"  # the moving average of the weights, where `trainer.ema_decay` is set
BEST = "best.weights.h5"  # the best of the evaluations during training
CLASSES = "classes.json"  # beside the weights: how many classes, and their names


class Checkpoints:
    """The checkpoints of one training: everything that decides its future.

    Holds weights, batch statistics, optimizer (with the loss scale of float16), moving averages and
    random seeds; the input position follows from the step. A checkpoint is one NumPy archive, the
    same for every backend and number of devices. It appears under its name only when complete, so
    a kill at any moment leaves the one before.

    Args:
        folder: where checkpoints are kept.
        trainer: a built and compiled `SelfTrainer`.
        keep: newest checkpoints kept.
        workers: of the training.
    """

    def __init__(self, folder, trainer, keep=5, workers=1):
        self.folder = pathlib.Path(folder)
        self.keep = keep
        # Positions, not names: those of layers change with what the process has built before.
        groups = {
            "student": trainer.student.variables,
            "averages": trainer.normalizer.variables,
            "optimizer": trainer.optimizer.variables,
            "ema": trainer.average.variables if trainer.average is not None else [],
        }
        if workers == 1:
            # Not 0 only where a training was left in the middle of a loop of steps, which several
            # workers never do. To read these sums would take all of them; one of them saves.
            groups["trackers"] = [v for tracker in trainer.metrics for v in tracker.variables]
        self.variables = {f"{g}/{i}": v for g, group in groups.items() for i, v in enumerate(group)}

    def path(self, step):
        return self.folder / f"ckpt-{step:08d}.npz"

    def steps(self):
        """Steps of the checkpoints there are, rising."""
        return saved_steps(self.folder)

    def restore(self):
        """Restores the newest readable checkpoint; returns its step, or None if there is none.

        Raises:
            UserError: if there are checkpoints, but all are damaged or of another network.
        """
        reason = ""
        for step in reversed(self.steps()):
            try:
                self._load(self.path(step))
            except Exception as error:  # a damaged archive fails in a dozen ways
                reason = one_line(error, 120)
                logging.warning("the checkpoint %s cannot be used: %s", self.path(step), reason)
                continue
            logging.info("resumed from step %d of %s", step, self.folder)
            return step
        if reason:
            raise UserError(
                f"no checkpoint in {self.folder} fits the network of this experiment, or they are "
                f"damaged ({reason}); choose another --model_dir, or delete the folder"
            )
        return None

    def _load(self, path):
        with np.load(path) as archive:
            values = {key: archive[key] for key in archive}
        # Checkpoints of version 0.1, and of several workers, have no trackers.
        zeros = {k: np.zeros(()) for k in self.variables if k.startswith("trackers/")}
        values = {k: v for k, v in values.items() if k in self.variables or "trackers/" not in k}
        values = zeros | values
        if values.keys() != self.variables.keys():
            raise UserError(f"{len(values)} arrays, where {len(self.variables)} are expected")
        for key, variable in self.variables.items():
            if values[key].shape != tuple(variable.shape):
                raise UserError(
                    f"{variable.path} is {tuple(variable.shape)} here, {values[key].shape} there"
                )
        for key, variable in self.variables.items():
            variable.assign(values[key])

    def save(self, step):
        """Saves at `step`, and removes what is older than the newest `keep`.

        Raises:
            UserError: if the disk is full or cannot be written.
        """
        from keras import ops

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(step)) as partial, open(partial, "wb") as file:
                np.savez(file, **{k: ops.convert_to_numpy(v) for k, v in self.variables.items()})
        except OSError as error:
            raise UserError(
                f"cannot save a checkpoint in {self.folder}: {error.strerror}; those before are "
                "untouched"
            ) from None
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)


def saved_steps(folder):
    """Steps of the checkpoints in a folder, rising; files of other names are none of them."""
    found = (re.fullmatch(r"ckpt-(\d{8,})\.npz", file.name) for file in folder.glob("ckpt-*.npz"))
    return sorted(int(match[1]) for match in found if match)


def save_weights(model, folder, name=WEIGHTS):
    """Writes weights to `folder/name`, which appears only when complete.

    Raises:
        UserError: if the disk is full or cannot be written.
    """
    path = pathlib.Path(folder) / name
    try:
        with replacing(path, ".weights.h5") as partial:  # Keras asks for this ending
            model.save_weights(partial)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return str(path)


def save_best(model, folder, step, metric, value):
    """Keeps `model` in `folder/best.weights.h5` if `value` of `metric` is above all before.

    What is kept stands in `best.json`: step, metric and value.
    """
    file = pathlib.Path(folder) / "best.json"
    try:
        before = float(read_json_or_none(file)["value"])
    except (TypeError, ValueError, KeyError):  # there is none, or it is damaged
        before = -math.inf
    if before >= value and (pathlib.Path(folder) / BEST).exists():
        return
    save_weights(model, folder, BEST)
    write_json(file, {"step": step, "metric": metric, "value": value})


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


def classes_of(path):
    """What `classes.json` beside weights says: `{"num_classes": C, "names": {class id: name}}`.

    Args:
        path: a weights file or a run folder.

    Returns:
        None if there is no such file, or it is damaged.

    Raises:
        UserError: if it holds something else.
    """
    file = weights_file(path).parent / CLASSES
    found = read_json_or_none(file)
    if found is None:
        return None
    try:
        names = {int(key): str(name) for key, name in found["names"].items()}
        return {"num_classes": int(found["num_classes"]), "names": names}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(
            f'{file} must hold {{"num_classes": N, "names": {{"1": NAME, ...}}}}; mend or delete it'
        ) from None


def load_weights(model, path):
    """Loads weights from a `.weights.h5` file or a run folder that holds one.

    Raises:
        UserError: if there are none, they are damaged, or they belong to another network.
    """
    file = weights_file(path)
    try:
        model.load_weights(file)
    except Exception as error:  # Keras, h5py and zipfile fail in a dozen ways
        reason = one_line(error)
        raise UserError(
            f"the weights {file} do not fit this network, or are damaged: {reason}"
        ) from None

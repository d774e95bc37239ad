"""Saves and resumes a training, and starts one from the weights of another."""

from __future__ import annotations

import logging
import math
import pathlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.files import read_json_or_none, replacing, write_json
from official_selftrain.utils.types import StrPath

if TYPE_CHECKING:
    import keras

    from official_selftrain.engine.step import GradientTrainer

WEIGHTS = "model.weights.h5"
AVERAGE = "ema.weights.h5"  # moving average of the weights, written if `trainer.ema_decay` is set
BEST = "best.weights.h5"  # weights of the best evaluation during training
BEST_RECORD = "best.json"  # which weights these are
CLASSES = "classes.json"  # next to the weights: number of classes and their names


class Checkpoints:
    """The checkpoints of one training, which hold all the state that its remaining steps depend on.

    That is weights, batch statistics, the optimizer (with the loss scale of float16), moving
    averages, and random seeds; the position in the input follows from the step. A checkpoint is one
    NumPy archive, the same for every backend and number of devices. It appears under its name only
    when it is complete, so that the previous one survives a kill at any moment.

    Args:
        folder: folder of the checkpoints; `save` creates it.
        trainer: a built and compiled `SelfTrainer`.
        keep: number of checkpoints to keep; `save` deletes older ones.
        workers: number of workers that share the training.
    """

    def __init__(self, folder: StrPath, trainer: GradientTrainer, keep: int = 5, workers: int = 1):
        self.folder = pathlib.Path(folder)
        self.keep = keep
        # Keys are positions, because Keras numbers layer names by what the process has built
        # before. This makes the order of a model's variables part of the file format: a change of
        # the order of layers breaks old checkpoints.
        groups = {
            "student": trainer.student.variables,
            "averages": trainer.normalizer.variables,
            "optimizer": trainer.optimizer.variables,
            "ema": trainer.average.variables if trainer.average is not None else [],
        }
        if workers == 1:
            # Trackers are zero unless a training stops in the middle of a loop of steps, which only
            # a single worker does. Reading them on several workers is a collective operation, but
            # only the chief saves.
            groups["trackers"] = [v for tracker in trainer.metrics for v in tracker.variables]
        self.variables = {f"{g}/{i}": v for g, group in groups.items() for i, v in enumerate(group)}

    def path(self, step: int) -> pathlib.Path:
        """The file of the checkpoint at `step`."""
        return self.folder / f"ckpt-{step:08d}.npz"

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, in ascending order."""
        return saved_steps(self.folder)

    def restore(self) -> int | None:
        """Restores the newest readable checkpoint.

        Returns:
            Its step, or None if the folder has no checkpoints.

        Raises:
            UserError: if every checkpoint is damaged or belongs to another network.
        """
        reason = ""
        for step in reversed(self.steps()):
            try:
                self._load(self.path(step))
            except Exception as error:  # a damaged archive fails in a dozen ways
                reason = one_line(error, 120)
                logging.warning("cannot use the checkpoint %s: %s", self.path(step), reason)
                continue
            logging.info("resumed from step %d of %s", step, self.folder)
            return step
        if reason:
            raise UserError(
                f"no checkpoint in {self.folder} fits the network of this experiment, or all are "
                f"damaged ({reason}); choose another --model_dir or delete the folder"
            )
        return None

    def _load(self, path: pathlib.Path) -> None:
        with np.load(path) as archive:
            values = {key: archive[key] for key in archive}
        # Checkpoints of version 0.1 and of several workers have no trackers.
        zeros = {k: np.zeros(()) for k in self.variables if k.startswith("trackers/")}
        values = {k: v for k, v in values.items() if k in self.variables or "trackers/" not in k}
        values = zeros | values
        if values.keys() != self.variables.keys():
            raise UserError(f"it has {len(values)} arrays instead of {len(self.variables)}")
        for key, variable in self.variables.items():
            if values[key].shape != tuple(variable.shape):
                raise UserError(
                    f"{variable.path} has the shape {values[key].shape} in the checkpoint and "
                    f"{tuple(variable.shape)} in the network"
                )
        for key, variable in self.variables.items():
            variable.assign(values[key])

    def save(self, step: int) -> None:
        """Saves the state after `step` updates, and deletes all but the newest `keep` checkpoints.

        Raises:
            UserError: if the disk is full or not writable.
        """
        from keras import ops

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(step)) as partial, open(partial, "wb") as file:
                np.savez(file, **{k: ops.convert_to_numpy(v) for k, v in self.variables.items()})
        except OSError as error:
            raise UserError(
                f"cannot save a checkpoint in {self.folder}: {error.strerror}; the earlier "
                "checkpoints are untouched"
            ) from None
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in a folder, in ascending order. Other files are ignored."""
    found = (re.fullmatch(r"ckpt-(\d{8,})\.npz", file.name) for file in folder.glob("ckpt-*.npz"))
    return sorted(int(match[1]) for match in found if match)


def save_weights(model: keras.Model, folder: StrPath, name: str = WEIGHTS) -> str:
    """Writes weights to `folder/name`, which appears only when it is complete.

    Returns:
        The path of the file.

    Raises:
        UserError: if the disk is full or not writable.
    """
    path = pathlib.Path(folder) / name
    try:
        with replacing(path, ".weights.h5") as partial:  # Keras asks for this ending
            model.save_weights(partial)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return str(path)


def save_best(
    model: keras.Model,
    folder: StrPath,
    step: int,
    metric: str,
    value: float,
    averaged: bool | None = None,
) -> None:
    """Writes `best.weights.h5` if `value` is higher than that of every evaluation before.

    Step, metric, and value of the kept weights are written to `best.json`.

    Args:
        model: the network with the evaluated weights.
        folder: the run folder.
        step: number of updates made.
        metric: name of the metric, such as "AP".
        value: its value; higher is better.
        averaged: whether these are averages of the weights, where both kinds compete.
    """
    file = pathlib.Path(folder) / BEST_RECORD
    try:
        before = float(read_json_or_none(file)["value"])
    except (TypeError, ValueError, KeyError):  # missing or damaged
        before = -math.inf
    if before >= value and (pathlib.Path(folder) / BEST).exists():
        return
    save_weights(model, folder, BEST)
    kind = {} if averaged is None else {"averaged": averaged}
    write_json(file, {"step": step, "metric": metric, "value": value, **kind})


def weights_file(path: StrPath) -> pathlib.Path:
    """The weights file at `path`, which is the file itself or the folder of a finished training.

    Raises:
        UserError: if it does not exist.
    """
    path = pathlib.Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no weights at {file}: expected a .weights.h5 file or the folder of a finished "
            "training"
        )
    return file


def classes_of(path: StrPath) -> dict[str, Any] | None:
    """Reads the `classes.json` next to a weights file.

    Args:
        path: a weights file or a run folder.

    Returns:
        `{"num_classes": C, "names": {class id: name}}`, where C counts the background; None if the
        file is missing or damaged.

    Raises:
        UserError: if it is valid JSON of another form.
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
            f'{file} must hold {{"num_classes": N, "names": {{"1": NAME, ...}}}}; fix or delete it'
        ) from None


def load_weights(model: keras.Model, path: StrPath) -> None:
    """Loads weights from a `.weights.h5` file or the folder of a finished training.

    Raises:
        UserError: if the file is missing, damaged, or belongs to another network.
    """
    file = weights_file(path)
    try:
        model.load_weights(file)
    except Exception as error:  # Keras, h5py and zipfile fail in a dozen ways
        reason = one_line(error)
        raise UserError(
            f"the weights {file} do not fit this network or are damaged: {reason}"
        ) from None

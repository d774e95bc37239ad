"""The teacher: a trained model turns images into pseudo-labeled records.

Every score above the detector's low floor, and the confidence of every pixel, is stored. Thresholds
are applied where labels are read, so that they can be changed without running the teacher again
(paper, section 3.2).
"""

import functools
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
from tqdm import tqdm

from official_selftrain import config as config_lib
from official_selftrain.config import Config
from official_selftrain.data import inputs, records
from official_selftrain.data.records import ImageRecord
from official_selftrain.engine import checkpoints
from official_selftrain.engine.distribution import Distribution, make_distribution
from official_selftrain.tasks import Task, make_task
from official_selftrain.tasks.base import Prediction
from official_selftrain.utils.files import read_json_or_none, sha256, write_json
from official_selftrain.utils.types import StrPath


class Predictor:
    """A model, compiled to predict on all replicas of this worker.

    Args:
        task: what the outputs of the model mean.
        model: the trained network.
        batch_size: images per call, rounded up to a multiple of the replicas.
        distribution: the devices; None for a single one.
    """

    def __init__(
        self,
        task: Task,
        model: keras.Model,
        batch_size: int,
        distribution: Distribution | None = None,
    ) -> None:
        self.task = task
        distribution = distribution or make_distribution(config_lib.RuntimeConfig())
        replicas = distribution.local_replicas
        self.batch_size = math.ceil(batch_size / replicas) * replicas
        self.model, self._network = model, task.inference_model(model)
        step = functools.partial(task.predict, self._network)
        self._step = distribution.compile_predict(step, self._network)
        # The evaluations of a training read the same files, so one input graph is enough.
        self._dataset = functools.lru_cache(maxsize=1)(self._make_dataset)

    def _make_dataset(self, files, index, count):
        parse = self.task.parser()
        return inputs.prediction_dataset(
            list(files), parse, self.batch_size, index=index, count=count
        )

    def refresh(self) -> None:
        """Takes over the present weights of the model, which has been trained in the meantime."""
        if self._network is not self.model:
            self._network.set_weights(self.model.get_weights())

    def __call__(
        self, files: Iterable[str], index: int = 0, count: int = 1
    ) -> Iterator[tuple[ImageRecord, Prediction]]:
        """Yields (record, prediction) of the images index, index + count, ... of TFRecord files."""
        stream = itertools.islice(records.read(files), index, None, count)
        for images, labels, real in self._dataset(tuple(files), index, count):
            for prediction in self.task.predictions(self._step(images, labels), int(real)):
                yield next(stream), prediction


def load_predictor(
    config: Config, weights: StrPath, distribution: Distribution, labeling: bool = True
) -> Predictor:
    """The `Predictor` of trained weights.

    Args:
        config: with a class count.
        weights: a `.weights.h5` file or a run folder.
        distribution: the devices.
        labeling: predict pseudo labels; otherwise predict for an evaluation.
    """
    task = make_task(config.task, labeling)
    with distribution.scope():
        model = task.build_model()
    checkpoints.load_weights(model, weights)
    return Predictor(task, model, batch_size_of(config), distribution)


def batch_size_of(config: Config) -> int:
    """Images per call of a `Predictor`: those of the evaluation, where there is one."""
    return (config.evaluation or config_lib.EvaluationConfig()).batch_size


def name_of(weights: StrPath) -> str:
    """What records call their teacher: the folder of its weights, and the start of their SHA-256.

    Args:
        weights: a `.weights.h5` file or a run folder.
    """
    file = checkpoints.weights_file(weights).resolve()
    return f"{file.parent.name}-{sha256(file)[:12]}"


def label(
    predictor: Predictor,
    shards: Sequence[tuple[str, str]],
    teacher: str,
    images: int | None = None,
) -> None:
    """Writes a pseudo-labeled shard for each shard of images, and its proof.

    A shard is the unit of work: its file appears only when it is complete, so a kill costs one
    shard at most. Labels that the images may have are not passed on.

    Args:
        predictor: of the teacher.
        shards: (TFRecord file of images, file to write).
        teacher: name that is stored in the records.
        images: number of images in all shards, for the time left; None if it is unknown.
    """
    with tqdm(total=images, desc="label", unit="image") as progress:

        def labeled(file):
            for record, prediction in predictor([file]):
                progress.update(1)
                yield predictor.task.to_record(record, prediction, teacher)

        for number, (file, output) in enumerate(shards, 1):
            progress.set_postfix_str(f"shard {number} of {len(shards)}")
            records.write(output, labeled(file))
            _write_proof(output)


def outputs(files: Sequence[str], folder: StrPath) -> list[str]:
    """The pseudo-labeled shard of each of `files`."""
    return [str(pathlib.Path(folder) / f"pseudo-{i:05d}.tfrecord") for i in range(len(files))]


def unfinished(shards: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the (TFRecord file of images, labeled file) that are not labeled, or are damaged."""
    return [(file, output) for file, output in shards if not is_whole(file, output)]


def is_whole(file: str, output: str) -> bool:
    """Whether `output` holds labels for all images of `file`, as they were written.

    It does if its SHA-256 is that of its proof, `OUTPUT.json`. A kill between the two, or an older
    version, leaves no proof: then the shard is read, and gets a proof if it holds the images.
    """
    if not os.path.exists(output):
        return False
    proof = read_json_or_none(records.proof_file(output))
    if isinstance(proof, dict) and "sha256" in proof:
        if proof["sha256"] == sha256(output):
            return True
    elif _same_images(file, output):
        _write_proof(output)
        return True
    logging.warning("%s is damaged: it is labeled again", output)
    return False


def _same_images(file, output):
    try:
        pairs = zip(records.read([file]), records.read([output]), strict=True)
        return all(image.image_id == labeled.image_id for image, labeled in pairs)
    except ValueError:  # a record cannot be read, or one file is longer
        return False


def _write_proof(output):
    proof: dict[str, Any] = {"bytes": os.path.getsize(output), "sha256": sha256(output)}
    write_json(records.proof_file(output), proof)

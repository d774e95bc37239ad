"""The teacher: a trained model turns images into pseudo-labeled records, and reports on them.

All scores above the detector's low floor, and the confidence of every pixel, are stored; thresholds
are applied where labels are read, so they can be changed without running the teacher again (paper
section 3.2, point 3).
"""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import threading

from tqdm import tqdm

from official_selftrain import config as config_lib
from official_selftrain.data import beam, inputs, records
from official_selftrain.engine import checkpoints
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.tasks import make_task
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import read_json_or_none, sha256, write_json


class Predictor:
    """A model, compiled to predict on all replicas of this worker.

    Args:
        task: see `tasks`.
        model: the trained network.
        batch_size: images per call; rounded up to a multiple of the replicas.
        distribution: `distribution.Distribution`; None for a single device.
    """

    def __init__(self, task, model, batch_size, distribution=None):
        self.task = task
        distribution = distribution or distribution_lib.make_distribution(
            config_lib.RuntimeConfig()
        )
        replicas = distribution.local_replicas
        self.batch_size = -(-batch_size // replicas) * replicas
        self.model, self._network = model, task.inference_model(model)
        step = functools.partial(task.predict, self._network)
        self._step = distribution.compile_predict(step, self._network)
        # The evaluations of a training read the same files, and need one input graph.
        self._dataset = functools.lru_cache(maxsize=1)(self._make_dataset)

    def _make_dataset(self, files, index, count):
        parse = self.task.parser()
        return inputs.prediction_dataset(
            list(files), parse, self.batch_size, index=index, count=count
        )

    def refresh(self):
        """Predicts with the present weights of the model, which has been trained meanwhile."""
        if self._network is not self.model:
            self._network.set_weights(self.model.get_weights())

    def __call__(self, files, index=0, count=1):
        """Yields (record, prediction) of the images index, index + count, ... of TFRecord files."""
        stream = itertools.islice(records.read(files), index, None, count)
        for images, labels, real in self._dataset(tuple(files), index, count):
            for prediction in self.task.predictions(self._step(images, labels), int(real)):
                yield next(stream), prediction


def outputs(files, folder):
    """The pseudo-labeled shard of each of `files`."""
    return [str(pathlib.Path(folder) / f"pseudo-{i:05d}.tfrecord") for i in range(len(files))]


def name_of(weights):
    """What records call their teacher: the folder of its weights, and the start of their SHA-256.

    Args:
        weights: a `.weights.h5` file or a run folder.
    """
    file = checkpoints.weights_file(weights).resolve()
    return f"{file.parent.name}-{sha256(file)[:12]}"


def unfinished(shards):
    """Those of the (TFRecord file of images, labeled file) that are not labeled, or damaged.

    A labeled shard is whole if its SHA-256 is that of its proof, `FILE.json`. One without a proof,
    by a kill between the two or by an earlier version, is read and gets one if it holds the images.
    """
    return [(file, output) for file, output in shards if not _is_whole(file, output)]


def _is_whole(file, output):
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
    write_json(
        records.proof_file(output), {"bytes": os.path.getsize(output), "sha256": sha256(output)}
    )


def label(predictor, shards, teacher, images=None):
    """Writes a pseudo-labeled shard for each shard of images, and its proof.

    A shard is the unit of work: it appears when complete, so that a kill costs one at most. Labels
    that the images may have are not passed on.

    Args:
        predictor: `Predictor`.
        shards: list of (TFRecord file of images, file to write).
        teacher: name stored in the records.
        images: in all shards, for the time left; None if unknown.
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


# --- Apache Beam -----------------------------------------------------------------------------


def label_on_beam(config, weights, shards, teacher, arguments):
    """`label` by an Apache Beam pipeline, a shard at a time on each of its workers.

    Args:
        config: complete `Config`.
        weights: of the teacher, a file or run folder, seen by all workers.
        shards, teacher: as in `label`; those that are labeled already are kept.
        arguments: of the pipeline, such as `["--runner=FlinkRunner", ...]`.

    Raises:
        UserError: without the extra, if the pipeline fails, or with the fault that a worker met.
    """
    text = config_lib.dump(config)
    jobs = [_Shard(text, str(weights), file, output, teacher) for file, output in shards]
    beam.run(jobs, arguments)


@dataclasses.dataclass(frozen=True)
class _Shard:
    config: str
    weights: str
    images: str
    file: str
    teacher: str

    def finished(self):
        return True if _is_whole(self.images, self.file) else None

    def run(self):
        with _LOADING:
            predictor = _cached_predictor(self.config, self.weights)
        label(predictor, [(self.images, self.file)], self.teacher)


_LOADING = threading.Lock()  # threads of a Beam worker share one model


@functools.cache
def _cached_predictor(config_text, weights):
    config = config_lib.config_from_dict(config_lib.load_yaml(config_text, "config"))
    return load_predictor(config, weights, distribution_lib.make_distribution(config.runtime))


def load_predictor(config, weights, distribution, labeling=True):
    """The `Predictor` of trained weights.

    Args:
        config: complete `Config`.
        weights: a `.weights.h5` file or a run folder.
        distribution: `distribution.Distribution`.
        labeling: for pseudo labels, in place of the evaluation.
    """
    task = make_task(config.task, labeling)
    with distribution.scope():
        model = task.build_model()
    checkpoints.load_weights(model, weights)
    batch_size = config.evaluation.batch_size if config.evaluation is not None else 8
    return Predictor(task, model, batch_size, distribution)


# --- Report ----------------------------------------------------------------------------------


def report(tally, files, truth_files):
    """What the student will see of pseudo labels at its thresholds.

    Args:
        tally: an empty one of the task.
        files: pseudo-labeled TFRecords.
        truth_files: the same images with held-back labels, or with none.

    Returns:
        The dict that the tally's `result` returns.

    Raises:
        UserError: if the thresholds keep nothing at all.
    """
    for record, truth in zip(records.read(files), records.read(truth_files), strict=True):
        tally.add(record, truth)
    result = tally.result()
    error_message = tally.error_message(result)
    if error_message:
        raise UserError(error_message)
    for warning in result["warnings"]:
        logging.warning("PSEUDO LABELS: %s", warning)
    return result

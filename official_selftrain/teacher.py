"""The teacher: a trained model turns images into pseudo-labelled records, and reports on them.

All scores above the detector's low floor, and the confidence of every pixel, are stored; thresholds
are applied where labels are read, so they can be changed without running the teacher again (paper
section 3.2, point 3).
"""

import logging
import pathlib

from tqdm import tqdm

from official_selftrain.data import inputs, records
from official_selftrain.errors import UserError


def predict(task, model, files, batch_size, title="predict", total=None):
    """Yields (record, prediction) for every image of TFRecord files, in order.

    Args:
        task: see `tasks`.
        model: the trained network.
        files: TFRecord files.
        batch_size: images per call.
        title, total: of the progress bar; `total` images, None if unknown.
    """
    import tensorflow as tf

    model = task.predictor(model)

    @tf.function(autograph=False)
    def step(images, labels):
        return task.predict(model, images, labels)

    stream = records.read(files)
    dataset = inputs.prediction_dataset(files, task.parser(), batch_size)
    with tqdm(total=total, desc=title, unit="image") as progress:
        for images, labels, count in dataset:
            count = int(count)
            for prediction in task.predictions(step(images, labels), count):
                yield next(stream), prediction
            progress.update(count)


def label(task, model, files, folder, batch_size, teacher):
    """Writes one pseudo-labelled shard for each shard of images; finished shards are kept.

    Labels that the images may have are not passed on.

    Args:
        task, model, files, batch_size: as in `predict`.
        folder: where `pseudo-*.tfrecord` are written.
        teacher: name stored in the records.

    Returns:
        The files written, one for each of `files`.
    """
    written = []
    for index, file in enumerate(files):
        output = str(pathlib.Path(folder) / f"pseudo-{index:05d}.tfrecord")
        written.append(output)
        if pathlib.Path(output).exists():
            logging.info("%s is labelled already", file)
            continue
        title = f"label {index + 1}/{len(files)}"
        labelled = predict(task, model, [file], batch_size, title)
        records.write(output, (task.to_record(r, p, teacher) for r, p in labelled))
    return written


def report(tally, files, truth_files):
    """What the student will see of pseudo labels at its thresholds.

    Args:
        tally: an empty one of the task.
        files: pseudo-labelled TFRecords.
        truth_files: the same images with held-back labels, or with none.

    Returns:
        The dict that the tally's `result` returns.

    Raises:
        UserError: if the thresholds keep nothing at all.
    """
    for record, truth in zip(records.read(files), records.read(truth_files), strict=True):
        tally.add(record, truth)
    result = tally.result()
    complaint = tally.complaint(result)
    if complaint:
        raise UserError(complaint)
    for warning in result["warnings"]:
        logging.warning("PSEUDO LABELS: %s", warning)
    return result

"""From TFRecord files to batches, by `tf.data`.

Every random number is a function of the seed and the position in the stream, so a training that is
resumed at step k sees exactly the images that an uninterrupted one would have seen.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from official_selftrain.config import InputConfig
from official_selftrain.data import records
from official_selftrain.data.augmentation import geometry, simclr
from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.types import Tensor

Parser = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Any]]


def training_dataset(
    files: Sequence[str],
    parse: Parser,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    shuffle_buffer: int = 1024,
    cache: bool = False,
    keep: Callable[[Tensor], Tensor] | None = None,
    threads: int = 0,
    input_context: tf.distribute.InputContext | None = None,
) -> tf.data.Dataset:
    """Endless shuffled batches of one stream.

    The stream depends only on the arguments. To resume after step k, pass `start_step=k`: the
    records before it are skipped without being decoded.

    Args:
        files: TFRecord files with at least one record that `keep` keeps.
        parse: function (decoded example, seed int64 `[2]`) -> (image, labels) with static shapes.
        batch_size: images per step, over all replicas; every batch is complete.
        seed: seed of order and augmentation.
        start_step: batches to skip at the beginning.
        shuffle_buffer: number of images among which the next one is drawn.
        cache: whether to keep the encoded images in memory.
        keep: function serialized example -> bool tensor; records for which it is false are left
            out. None keeps all.
        threads: number of parallel calls of `parse`, 0 for automatic.
        input_context: the context of one of several pipelines, as it is passed by
            `strategy.distribute_datasets_from_function`. The pipeline then yields batches for one
            replica: its part of the same batches that a single pipeline would yield. Every pipeline
            reads all records, but decodes only its own.

    Returns:
        `tf.data.Dataset` of (images, labels).

    Raises:
        UserError: if the batch cannot be divided evenly among the replicas.
    """
    pipeline, pipelines, replicas = _place_among(input_context, batch_size)
    dataset = _serialized(files, seed, cache, keep)
    # Positions are numbered after shuffling and before any part is skipped: they seed the
    # augmentation, so it does not depend on where a training was interrupted.
    dataset = dataset.shuffle(shuffle_buffer, seed).repeat().enumerate()
    dataset = dataset.skip(start_step * batch_size)
    if pipelines > 1:
        part = batch_size // pipelines
        dataset = dataset.filter(lambda position, _: position % batch_size // part == pipeline)

    def load(position, serialized):
        return parse(records.decode(serialized), tf.stack([tf.cast(seed, tf.int64), position]))

    parallel = threads or tf.data.AUTOTUNE
    return dataset.map(load, num_parallel_calls=parallel, deterministic=True).batch(
        batch_size // replicas, drop_remainder=True
    )


def _serialized(
    files: Sequence[str], seed: int, cache: bool, keep: Callable[[Tensor], Tensor] | None
) -> tf.data.Dataset:
    """The serialized examples of the files, once, in an order that depends on the seed."""
    dataset = tf.data.Dataset.from_tensor_slices(files)
    if not cache:  # a cache keeps the order of the first epoch anyway
        dataset = dataset.shuffle(len(files), seed)
    # `deterministic` is what makes a resumed training see the same images.
    dataset = dataset.interleave(
        tf.data.TFRecordDataset, cycle_length=8, num_parallel_calls=8, deterministic=True
    )
    if keep is not None:
        dataset = dataset.filter(keep)
    return dataset.cache() if cache else dataset


def _place_among(
    context: tf.distribute.InputContext | None, batch_size: int
) -> tuple[int, int, int]:
    """Number of this pipeline, of all pipelines and of all replicas."""
    if context is None:
        return 0, 1, 1
    replicas = context.num_replicas_in_sync
    if batch_size % replicas:
        raise UserError(
            f"a batch of {batch_size} images cannot be divided evenly among {replicas} "
            "replicas; choose a multiple of that"
        )
    return context.input_pipeline_id, context.num_input_pipelines, replicas


def classification_parser(source: InputConfig, size: tuple[int, int]) -> Parser:
    """A `parse` for `training_dataset` of images with a class, for joint training of your own.

    Args:
        source: its augmentation is applied.
        size: (height, width) of the network input.

    Returns:
        function (decoded example, seed) -> (image float32 `[h, w, 3]`, `{"label": int32}`); the
        label is -1 if the record has none.
    """
    augmentation = geometry.Augmentation(source, size)

    def parse(example, seed):
        scene = augmentation({"image": example["image"], "boxes": tf.zeros([0, 4])}, seed)
        return tf.ensure_shape(scene["image"], [*size, 3]), {"label": example["label"]}

    return parse


def simclr_parser(size: int, strength: float = 1.0) -> Parser:
    """A `parse` for `training_dataset` of two SimCLR views of each image.

    Args:
        size: side of a view in pixels.
        strength: strength of the color distortion.

    Returns:
        function (decoded example, seed) -> (views float32 `[2, size, size, 3]` in 0 to 1,
        `{"label": int32}`).
    """

    def parse(example, seed):
        views = simclr.two_views(example["image"], size, seed, strength)
        return views, {"label": example["label"]}

    return parse


def zip_streams(**streams: tf.data.Dataset) -> tf.data.Dataset:
    """One data set of batches from several streams, such as "human" and "pseudo".

    Batch sizes may differ: they set the ratio of the streams in a step. Every stream is endless and
    shuffled independently, so none waits for the end of another's epoch. `SelfTrainer` learns from
    "human" and "pseudo"; it refuses other names, such as "classification", because joint training
    is not implemented yet.

    Args:
        **streams: data sets of (images, labels), see `training_dataset`.

    Returns:
        `tf.data.Dataset` of (`{stream: images}`, `{stream: labels}`).
    """
    zipped = tf.data.Dataset.zip(streams)

    def split(batches):
        images = {stream: batch[0] for stream, batch in batches.items()}
        return images, {stream: batch[1] for stream, batch in batches.items()}

    return zipped.map(split).prefetch(tf.data.AUTOTUNE)


def prediction_dataset(
    files: Sequence[str], parse: Parser, batch_size: int, *, index: int = 0, count: int = 1
) -> tf.data.Dataset:
    """Every image once, in order; the last batch is filled up with copies of its last image.

    Args:
        files: TFRecord files.
        parse: function (decoded example, seed int64 `[2]`) -> (images, labels).
        batch_size: images per batch.
        index: number of this worker, from 0.
        count: number of workers; the worker gets the images index, index + count, ...

    Returns:
        `tf.data.Dataset` of (images `[batch_size, S, S, 3]` or a tuple of such, labels, number of
        images that are not copies).
    """
    dataset = tf.data.TFRecordDataset(files).shard(count, index)
    dataset = dataset.map(
        lambda serialized: parse(records.decode(serialized), tf.zeros([2], tf.int64)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )

    def fill(images, labels):  # one static shape, so that the network is compiled once
        real = tf.shape(tf.nest.flatten(images)[0])[0]
        indices = tf.minimum(tf.range(batch_size), real - 1)

        def take(x):
            return tf.ensure_shape(tf.gather(x, indices), [batch_size, *x.shape[1:]])

        return *tf.nest.map_structure(take, (images, labels)), real

    return dataset.batch(batch_size).map(fill).prefetch(tf.data.AUTOTUNE)


def find_bad_record(
    files: Sequence[str], check: Callable[[records.ImageRecord], None] | None = None
) -> None:
    """Looks for the first record that cannot be decoded, after `tf.data` has failed without a name.

    Args:
        files: TFRecord files.
        check: also called with each record, to raise a `UserError` of its own; None skips that.

    Raises:
        UserError: naming the file and the record. Nothing is raised if all images can be decoded.
    """
    for file in files:
        for index, record in enumerate(records.read(file)):
            if check is not None:
                check(record)
            try:
                records.decode(records.to_example(record))
            except tf.errors.OpError as error:
                # The end of TensorFlow's message is the reason, the beginning names operations.
                raise UserError(
                    f"record {index} of {file} ({record.name or record.image_id}) cannot be "
                    f"decoded: {one_line(error.message, None)[-160:]}"
                ) from None
    logging.info("all images of %d files can be decoded", len(files))

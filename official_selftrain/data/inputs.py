"""From TFRecord files to batches, by `tf.data`.

Every random number is a function of the seed and the position in the stream, so a training that
starts again at step k sees the very images that an uninterrupted one would have seen.
"""

import logging

import tensorflow as tf

from official_selftrain.data import records
from official_selftrain.data.augmentation import geometry, simclr
from official_selftrain.utils.errors import UserError, one_line


def training_dataset(
    files,
    parse,
    batch_size,
    seed,
    start_step=0,
    shuffle_buffer=1024,
    cache=False,
    keep=None,
    threads=0,
    input_context=None,
):
    """Endless shuffled batches of one source.

    The stream is a function of the arguments alone. To go on after step k, ask for `start_step=k`:
    records that were used are read over without being decoded.

    Args:
        files: TFRecord files with at least one record that `keep` keeps.
        parse: function (decoded example, seed int64 `[2]`) -> (image, labels), static shapes.
        batch_size: images per step over all replicas; incomplete batches do not occur.
        seed: of order and augmentation.
        start_step: batches to leave out at the beginning, without decoding them.
        shuffle_buffer: images to shuffle among.
        cache: keep encoded images in memory.
        keep: function serialized example -> bool tensor, or None.
        threads: parallel parsing calls, 0 for automatic.
        input_context: `tf.distribute.InputContext` of one of several pipelines, as
            `strategy.distribute_datasets_from_function` hands it over. The pipeline then yields
            batches for one replica: its share of the very batches that a single one would make.
            Every pipeline reads all records, but decodes only its own.

    Returns:
        `tf.data.Dataset` of (images, labels).

    Raises:
        UserError: if the batch cannot be shared out evenly among the replicas.
    """
    pipeline, pipelines, replicas = 0, 1, 1
    if input_context is not None:
        pipeline, pipelines = input_context.input_pipeline_id, input_context.num_input_pipelines
        replicas = input_context.num_replicas_in_sync
        if batch_size % replicas:
            raise UserError(f"a batch of {batch_size} images is not shared by {replicas} replicas")
    dataset = tf.data.Dataset.from_tensor_slices(files)
    if not cache:
        dataset = dataset.shuffle(len(files), seed)
    dataset = dataset.interleave(
        tf.data.TFRecordDataset, cycle_length=8, num_parallel_calls=8, deterministic=True
    )
    if keep is not None:
        dataset = dataset.filter(keep)
    if cache:
        dataset = dataset.cache()
    dataset = dataset.shuffle(shuffle_buffer, seed).repeat().enumerate()
    dataset = dataset.skip(start_step * batch_size)
    if pipelines > 1:
        share = batch_size // pipelines
        dataset = dataset.filter(lambda place, _: place % batch_size // share == pipeline)

    def load(place, serialized):
        return parse(records.decode(serialized), tf.stack([tf.cast(seed, tf.int64), place]))

    parallel = threads or tf.data.AUTOTUNE
    return dataset.map(load, num_parallel_calls=parallel, deterministic=True).batch(
        batch_size // replicas, drop_remainder=True
    )


def classification_parser(source, size):
    """A `parse` for `training_dataset` of images with a class, for a joint training of your own.

    Args:
        source: `config.InputConfig` whose augmentation applies.
        size: (height, width) of the network input.

    Returns:
        function (decoded example, seed) -> (image float32 `[h, w, 3]`, {"label": int32, -1 where
        the record has none}).
    """
    augmentation = geometry.Augmentation(source, size)

    def parse(example, seed):
        scene = augmentation({"image": example["image"], "boxes": tf.zeros([0, 4])}, seed)
        return tf.ensure_shape(scene["image"], [*size, 3]), {"label": example["label"]}

    return parse


def simclr_parser(size, strength=1.0):
    """A `parse` for `training_dataset` of two SimCLR views `[2, size, size, 3]` of each image."""

    def parse(example, seed):
        views = simclr.two_views(example["image"], size, seed, strength)
        return views, {"label": example["label"]}

    return parse


def zip_streams(**sources):
    """One data set of ({source: images}, {source: labels}) from a data set per source.

    Batch sizes may differ: they set the ratio of the sources in a step. Each is endless and
    shuffled by itself, so none waits for another's epoch to end. `SelfTrainer` learns from "human"
    and "pseudo"; it refuses other sources, such as "classification", as joint training does not
    exist yet.
    """
    zipped = tf.data.Dataset.zip(sources)

    def split(batches):
        images = {source: batch[0] for source, batch in batches.items()}
        return images, {source: batch[1] for source, batch in batches.items()}

    return zipped.map(split).prefetch(tf.data.AUTOTUNE)


def prediction_dataset(files, parse, batch_size, index=0, count=1):
    """Every image once, in order; the last batch is filled up with copies of its last image.

    With a `count` above 1, the images index, index + count, ... alone.

    Returns:
        `tf.data.Dataset` of (images `[batch_size, S, S, 3]`, or a tuple of such, labels, number of
        real images).
    """
    dataset = tf.data.TFRecordDataset(files).shard(count, index)
    dataset = dataset.map(
        lambda serialized: parse(records.decode(serialized), tf.zeros([2], tf.int64)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )

    def fill(images, labels):
        real = tf.shape(tf.nest.flatten(images)[0])[0]
        indices = tf.minimum(tf.range(batch_size), real - 1)

        def take(x):
            return tf.ensure_shape(tf.gather(x, indices), [batch_size, *x.shape[1:]])

        return *tf.nest.map_structure(take, (images, labels)), real

    return dataset.batch(batch_size).map(fill).prefetch(tf.data.AUTOTUNE)


def find_bad_record(files, check=None):
    """Raises a `UserError` that names the first record that cannot be decoded.

    Args:
        files: TFRecord files.
        check: also called with each record, to raise a `UserError` of its own; or None.
    """
    for file in files:
        for index, record in enumerate(records.read(file)):
            if check is not None:
                check(record)
            try:
                records.decode(records.to_example(record))
            except tf.errors.OpError as error:
                raise UserError(
                    f"record {index} of {file} ({record.name or record.image_id}) cannot be "
                    f"decoded: {one_line(error.message, None)[-160:]}"
                ) from None
    logging.info("all images of %d files can be decoded", len(files))

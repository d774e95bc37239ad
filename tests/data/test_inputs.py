import numpy as np
import pytest
import tensorflow as tf
from helpers import mask_png, png, record

from official_selftrain.config import InputConfig, PseudoConfig
from official_selftrain.data import inputs, records
from official_selftrain.tasks.detection import DetectionTask
from official_selftrain.utils.errors import UserError

TASK = DetectionTask(num_classes=3, image_size=(128, 128), max_instances=4)


@pytest.fixture
def files(tmp_path):
    """Seven images in two shards, each of one gray value; every third has no box."""
    written = []
    for shard, indices in enumerate([range(4), range(4, 7)]):
        file = str(tmp_path / f"a-{shard}.tfrecord")
        images = []
        for i in indices:
            changes = {"boxes": [], "classes": [], "scores": None} if i % 3 == 0 else {}
            images.append(
                record(image_id=i, encoded=png(value=i * 30), is_crowd=None, mask=b"", **changes)
            )
        records.write(file, images)
        written.append(file)
    return written


def dataset(files, source=None, **settings):
    source = source or InputConfig(batch_size=2)
    parse = TASK.parser(source)
    return inputs.training_dataset(files, parse, 2, settings.pop("seed", 1), **settings)


def take(data, count):
    return [tf.nest.map_structure(np.asarray, batch) for batch in data.take(count)]


def assert_equal(a, b):
    tf.nest.map_structure(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("cache", [False, True])
def test_resumed_stream_equals_the_uninterrupted_one(files, cache):
    whole = take(dataset(files, cache=cache), 9)
    resumed = take(dataset(files, cache=cache, start_step=4), 5)
    assert_equal(whole[4:], resumed)
    other = take(dataset(files, cache=cache, seed=2), 9)
    assert any((a[0] != b[0]).any() for a, b in zip(whole, other, strict=True))


def test_every_image_occurs_once_in_an_epoch(files):
    source = InputConfig(flip=False, jitter=(1.0, 1.0))
    images = np.concatenate([x for x, _ in take(dataset(files, source), 7)])
    top_left = images[:, 0, 0, 0]
    values, counts = np.unique(top_left.round(4), return_counts=True)
    assert len(values) == 7 and (counts == 2).all()


def test_images_without_boxes_are_padding_only(files):
    labels = [y for _, y in take(dataset(files), 7)]
    empty = [i for y in labels for i in range(2) if (y["classes"][i] == -1).all()]
    assert empty
    for y in labels:
        assert y["boxes"].shape == (2, 4, 4)
        padded = y["classes"] == -1
        assert (y["boxes"][padded] == -1).all() and (y["scores"][padded] == -1).all()


def test_student_drops_boxes_under_its_threshold(files):
    # Scores of the record are 0.9 and 0.4; the threshold itself is not above the threshold.
    for threshold, expected in [(0.5, 1), (0.3, 2), (0.9, 0)]:
        source = PseudoConfig(batch_size=2, score_threshold=threshold, jitter=(1.0, 1.0))
        labels = [y for _, y in take(dataset(files, source), 7)]
        largest = max((y["classes"] >= 0).sum(axis=1).max() for y in labels)
        assert largest == expected


def test_crowds_are_dropped_in_training_only(tmp_path):
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [record(scores=None)])
    (image, labels) = take(dataset([file]), 1)[0]
    assert ((labels["classes"] >= 0).sum(axis=1) <= 1).all()
    _, labels, _ = next(iter(inputs.prediction_dataset([file], TASK.parser(), 1)))
    assert (np.asarray(labels["classes"]) >= 0).sum() == 2
    assert image.dtype == np.float32


def test_zipped_sources_keep_their_batch_sizes(files):
    human, pseudo = dataset(files), dataset(files, seed=5).unbatch().batch(6, drop_remainder=True)
    images, labels = next(iter(inputs.zip_streams(human=human, pseudo=pseudo)))
    assert images["human"].shape[0] == 2 and images["pseudo"].shape[0] == 6
    assert labels["pseudo"]["boxes"].shape == (6, 4, 4)


def test_prediction_fills_the_last_batch_and_counts(files):
    """Silent error 3: a replica that gets no image writes NaN; batches are always full."""
    batches = list(inputs.prediction_dataset(files, TASK.parser(), 4))
    assert [int(count) for *_, count in batches] == [4, 3]
    assert all(images.shape == (4, 128, 128, 3) for images, *_ in batches)
    images = np.asarray(batches[1][0])
    np.testing.assert_array_equal(images[2], images[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoded": b"junk"},
            r"record 1 of .*a.tfrecord \(bad.png\): its image cannot be",
        ),
        ({"mask": b"junk"}, r"record 1 of .*a.tfrecord \(bad.png\): its mask cannot be decoded"),
        ({"encoded": png()[:-30]}, r"record 1 of .*a.tfrecord \(bad.png\) cannot be decoded: "),
        ({"mask": mask_png()[:-30]}, r"record 1 of .*a.tfrecord \(bad.png\) cannot be decoded: "),
    ],
)
def test_undecodable_record_is_named(tmp_path, changes, message):
    file = str(tmp_path / "a.tfrecord")
    records.write(file, [record(), record(name="bad.png", **changes)])
    with pytest.raises(UserError, match=message):
        inputs.find_bad_record([file])


# --- Mixing and sharding ---------------------------------------------------------------------


def gray_values(batches):
    """The gray value of each image, which tells the images of `files` apart."""
    return [x for images, _ in batches for x in np.asarray(images)[:, 0, 0, 0].round(3).tolist()]


def of_pipeline(files, parse, pipeline, pipelines, replicas, start=0):
    context = tf.distribute.InputContext(pipelines, pipeline, num_replicas_in_sync=replicas)
    return inputs.training_dataset(files, parse, 6, 1, start, input_context=context)


@pytest.mark.parametrize(("pipelines", "replicas"), [(1, 2), (2, 2), (3, 6)])
def test_replicas_of_all_workers_see_the_batches_of_one_device(files, pipelines, replicas):
    """The same images with the same augmentation, in the order of the replicas."""
    parse = TASK.parser(InputConfig(jitter=(0.3, 2.0)))
    whole = take(inputs.training_dataset(files, parse, 6, 1), 5)
    here = replicas // pipelines
    streams = [
        take(of_pipeline(files, parse, p, pipelines, replicas), 5 * here) for p in range(pipelines)
    ]
    for step, (images, labels) in enumerate(whole):
        parts = [part for s in streams for part in s[step * here : (step + 1) * here]]
        np.testing.assert_array_equal(images, np.concatenate([p[0] for p in parts]))
        boxes = np.concatenate([p[1]["boxes"] for p in parts])
        np.testing.assert_array_equal(labels["boxes"], boxes)


def test_resumed_pipeline_of_a_worker_equals_the_uninterrupted_one(files):
    parse = TASK.parser(InputConfig())
    context = tf.distribute.InputContext(2, 1, num_replicas_in_sync=2)

    def data(start):
        return inputs.training_dataset(files, parse, 4, 1, start_step=start, input_context=context)

    assert_equal(take(data(0), 6)[2:], take(data(2), 4))


def test_a_batch_that_replicas_cannot_share_is_refused(files):
    context = tf.distribute.InputContext(2, 0, num_replicas_in_sync=4)
    with pytest.raises(UserError, match="a batch of 6 images cannot be divided evenly among 4"):
        inputs.training_dataset(files, TASK.parser(), 6, 1, input_context=context)


def test_three_sources_at_any_ratio_each_with_its_own_epochs(files):
    source = InputConfig(flip=False, jitter=(1.0, 1.0))
    human = dataset(files, source)
    pseudo = inputs.training_dataset(files[:1], TASK.parser(source), 3, 2)
    labeled = inputs.training_dataset(files, inputs.classification_parser(source, (128, 128)), 1, 3)
    mixed = inputs.zip_streams(human=human, pseudo=pseudo, classification=labeled)
    batches = take(mixed, 14)
    for images, labels in batches:
        assert {k: len(v) for k, v in images.items()} == {
            "human": 2, "pseudo": 3, "classification": 1,
        }  # fmt: skip
        assert labels["classification"]["label"].tolist() == [9]
    counts = {
        name: np.unique(
            np.concatenate([x[name][:, 0, 0, 0] for x, _ in batches]).round(3), return_counts=True
        )[1].tolist()
        for name in ("human", "pseudo", "classification")
    }
    assert counts["human"] == [4] * 7  # 28 images are four epochs of seven
    assert sorted(counts["pseudo"]) == [10, 10, 11, 11]  # 42 images of the four in the first file
    assert counts["classification"] == [2] * 7


def test_simclr_parser_gives_two_views(files):
    images, labels = take(inputs.training_dataset(files, inputs.simclr_parser(16), 4, 1), 1)[0]
    assert images.shape == (4, 2, 16, 16, 3)
    assert labels["label"].tolist() == [9] * 4

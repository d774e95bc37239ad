"""Measures images/s per core from 640 x 480 JPEG TFRecords to 512 x 512 training batches.

    python benchmarks/input_pipeline.py [PEER_PYTHON] [ROUNDS]

PEER_PYTHON is the Python of an environment with TensorFlow Model Garden, whose RetinaNet input is
then measured in the same run:

    python -m venv /tmp/peer && /tmp/peer/bin/pip install tf-models-official

Every line is measured in a process of its own on one core, and all lines once per round. Printed
are medians of images per CPU second and the ratio to only decoding the JPEG, the upper bound. "S1
unbatched" and "S1 resized only" leave out parts of the pipeline, so that the differences show where
the time goes.

    python benchmarks/input_pipeline.py --operations        # milliseconds per image operation
    python benchmarks/input_pipeline.py --memory MINUTES    # resident memory while S4 runs
"""

import io
import os
import statistics
import sys
import tempfile
import time

import harness

IMAGES, BATCH, SIZE, WARM_UP = 320, 16, (512, 512), 64

OURS = ["decode", "S1", "S2", "S3", "S4", "S1 unbatched", "S1 resized only", "keras_cv", "simclr"]
PEER = ["peer S1", "peer autoaugment", "peer randaugment"]


def write_records(file):
    """Writes noisy images of 130 kB with seven boxes each."""
    import numpy as np
    from PIL import Image

    from official_selftrain.data import records

    def stream():
        rng = np.random.default_rng(0)
        for index in range(IMAGES):
            coarse = rng.integers(0, 255, (60, 80, 3), "uint8")
            picture = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.BICUBIC))
            noise = rng.integers(-12, 13, picture.shape)
            picture = np.clip(picture + noise, 0, 255).astype("uint8")
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=90)
            corners = np.sort(rng.random((7, 2, 2)), axis=1)
            yield records.ImageRecord(
                image_id=index,
                encoded=buffer.getvalue(),
                height=480,
                width=640,
                boxes=corners.reshape(7, 4),
                classes=rng.integers(1, 81, 7),
                label=int(rng.integers(1000)),
            )

    records.write(file, stream())


def our_dataset(name, file):
    import tensorflow as tf

    from official_selftrain.config import InputConfig
    from official_selftrain.data import inputs, records
    from official_selftrain.data.augmentation import geometry
    from official_selftrain.tasks.detection import DetectionTask

    if name == "decode":
        data = tf.data.TFRecordDataset(file).repeat()
        return data.map(lambda s: records.decode(s)["image"]), 1
    if name == "simclr":
        parse = inputs.simclr_parser(224)
        return inputs.training_dataset([file], parse, BATCH, 0, threads=1), BATCH
    if name.startswith("S1 "):
        augmentation = geometry.Augmentation(InputConfig(policy="S1"), SIZE)
        data = tf.data.TFRecordDataset(file).repeat().enumerate()

        def parse(index, serialized):
            seed = tf.stack([tf.constant(0, tf.int64), index])
            example = records.decode(serialized)
            if name == "S1 unbatched":
                scene = {key: example[key] for key in ("image", "boxes")}
                return augmentation(scene, seed)["image"]
            info = geometry.plan_resize(tf.shape(example["image"])[:2], SIZE)
            return tf.raw_ops.ResizeBilinear(
                images=example["image"][None], size=tf.cast(tf.round(info[0] * info[2]), tf.int32)
            )

        return data.map(parse), 1
    task = DetectionTask(num_classes=91, image_size=SIZE)
    parse = task.parser(InputConfig(policy=name))
    return inputs.training_dataset([file], parse, BATCH, 0, threads=1), BATCH


def peer_dataset(name, file):
    import tensorflow as tf
    from official.vision.configs import common
    from official.vision.dataloaders import retinanet_input, tf_example_decoder

    kinds = {"peer S1": None, "peer autoaugment": "autoaug", "peer randaugment": "randaug"}
    kind = kinds[name]
    jitter = (0.5, 2.0) if kind == "randaug" else (0.8, 1.2)
    parser = retinanet_input.Parser(
        output_size=list(SIZE),
        min_level=3,
        max_level=7,
        num_scales=3,
        aspect_ratios=[0.5, 1.0, 2.0],
        anchor_size=4.0,
        aug_rand_hflip=True,
        aug_scale_min=jitter[0],
        aug_scale_max=jitter[1],
        aug_type=common.Augmentation(type=kind) if kind else None,
        dtype="float32",
    )
    decoder = tf_example_decoder.TfExampleDecoder()
    parse = parser.parse_fn(is_training=True)
    data = tf.data.TFRecordDataset(file).repeat()
    data = data.map(lambda s: parse(decoder.decode(s)), num_parallel_calls=1)
    return data.batch(BATCH, drop_remainder=True), BATCH


def measure(name, file):
    one_core()
    make = peer_dataset if name.startswith("peer") else our_dataset
    data, size = make(name, file)
    iterator = iter(data)
    for _ in range(WARM_UP // size):
        next(iterator)
    began = time.process_time()
    for _ in range(IMAGES // size):
        next(iterator)
    rate = IMAGES // size * size / (time.process_time() - began)
    harness.report(rate)


def time_operations(repeats=30):
    """CPU milliseconds of each operation at level 6 on a 640 x 480 image with seven boxes."""
    one_core()
    import numpy as np
    import tensorflow as tf

    from official_selftrain.data.augmentation import policies

    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((7, 2, 2)), axis=1).reshape(7, 4)
    scene = policies.make_scene(rng.integers(0, 255, (480, 640, 3), "uint8"), corners)
    for name, operation in policies.operations().items():
        argument = policies.level_to_argument(name, 6)

        @tf.function(autograph=False)
        def apply(scene, seed, operation=operation, argument=argument):
            return operation.apply(scene, tf.constant(argument, tf.float32), seed, 0.2)

        seeds = [tf.constant([0, number], tf.int64) for number in range(repeats)]
        apply(scene, seeds[0])
        began = time.process_time()
        for seed in seeds:
            apply(scene, seed)
        print(f"{name:<24}{1000 * (time.process_time() - began) / repeats:>8.2f} ms")


def one_core():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def watch_memory(file, minutes):
    """Prints the resident memory every minute while S4 runs on all cores."""
    data, size = our_dataset("S4", file)
    began = shown = time.time()
    for step, _ in enumerate(data):
        if time.time() - shown >= 60 or step == 50:
            shown = time.time()
            print(
                f"{(shown - began) / 60:.0f} min, {step * size} images, "
                f"{harness.resident_megabytes():.0f} MB",
                flush=True,
            )
        if time.time() - began > 60 * minutes:
            break


def main():
    peer = sys.argv[1] if len(sys.argv) > 1 else None
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    names = OURS + (PEER if peer else [])
    rates = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "a.tfrecord")
        write_records(file)
        print(f"{os.path.getsize(file) / IMAGES / 1000:.0f} kB per image")
        for _ in range(rounds):
            for name in names:
                python = peer if name.startswith("peer") else sys.executable
                rate = harness.measured(__file__, "--one", name, file, python=python)
                rates[name].append(rate)
    ceiling = statistics.median(rates["decode"])
    print(f"{'':<18}{'images/s':>10}{'ms':>8}{'to decode':>11}")
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:<18}{rate:>10.1f}{1000 / rate:>8.1f}{rate / ceiling:>11.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], sys.argv[3])
    elif sys.argv[1:2] == ["--operations"]:
        time_operations()
    elif sys.argv[1:2] == ["--memory"]:
        with tempfile.TemporaryDirectory() as folder:
            write_records(os.path.join(folder, "a.tfrecord"))
            watch_memory(os.path.join(folder, "a.tfrecord"), float(sys.argv[2]))
    else:
        main()

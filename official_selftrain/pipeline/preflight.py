"""Before a long run: one batch through everything, and what the run will need."""

import pathlib
import resource
import shutil
import time

import numpy as np

from official_selftrain import config as config_lib
from official_selftrain.data import records, visualize
from official_selftrain.data.prepared import SOURCES, WITHOUT_LABELS
from official_selftrain.engine import distribution as distribution_lib
from official_selftrain.engine import guards, memory
from official_selftrain.pipeline.folder import check_settings, working_in
from official_selftrain.pipeline.training import (
    Training,
    check_batches,
    check_start,
    check_startable,
    images_per_step,
)
from official_selftrain.pipeline.workspace import prepare, reading
from official_selftrain.utils.errors import UserError

SHOWN = 4  # images in the picture


def look(training, picture, stages=None):
    """Makes two steps, which nothing keeps, and looks at data, time, memory and disk.

    Args:
        training: a new `training.Training`.
        picture: path of a PNG of labeled images under each policy, or None.
        stages: `{stage: Config}` of all trainings of the run, if this one is only the first.

    Returns:
        `[(name, text)]` for people; texts that begin with "WARNING" call for a look.

    Raises:
        UserError: if the first batch already gives a loss that is not finite, or as in a run.
    """
    training.initialize()
    loop = training.loop(0)
    batch = loop.batch()
    seconds, scalars = [], {}
    for step in (1, 2):  # the first compiles
        began = time.perf_counter()
        scalars = loop.step(batch)
        seconds.append(time.perf_counter() - began)
        try:
            guards.check_finite(scalars, step)
        except guards.NonFiniteLossError as problem:
            raise UserError(
                f"{problem} of the check: the labels, trainer.init or the first learning rate "
                "(optimizer.warmup_learning_rate) cannot be right"
            ) from None
    if picture:
        names, seed = training.data.class_names, training.config.trainer.seed
        shown = records.read(training.data.files("human"))
        visualize.augmentation_sheet(picture, shown, SHOWN, names, seed)
    return [
        *_classes(training.data),
        *_labels(training, batch[0]),
        *((name, f"{value:.4g}") for name, value in scalars.items()),
        *_needs(training, seconds, len(stages or [1])),
        *_stages(training, stages or {}, seconds[1]),
    ]


def _classes(data):
    """The class map: how many images of each source hold each class."""
    known = set(data.class_names)
    held = {name: summary["images_per_class"] for name, summary in data.summaries.items()}
    for counts in held.values():
        known |= {int(c) for c in counts}
    for label in sorted(known):
        counts = ", ".join(
            f"{count} in {name}"
            for name, per_class in held.items()
            if (count := per_class.get(label, per_class.get(str(label), 0)))
        )
        yield f"class {label} {data.class_names.get(label, '')}".strip(), counts or "WARNING: none"


def _labels(training, micro_batch):
    """Objects and pixel values of the first batch, as the network gets them."""
    images, labels = micro_batch
    local = training.distribution.local
    for source, pixels in images.items():
        pixels = local(pixels)
        values = {name: local(x) for name, x in labels[source].items()}
        objects = float(training.task.label_density(values))
        unit = "boxes an image" if training.config.task.kind == "detection" else "of pixels"
        text = f"{len(pixels)} images {pixels.shape[1:]}, labels: {objects:.3g} {unit}, "
        text += f"pixels {pixels.mean():.2f} +- {pixels.std():.2f}"
        yield f"first batch of {source}", text if objects else f"WARNING: no label, {text}"


def _needs(training, seconds, stages):
    """Time of one training, memory, and disk of all."""
    config, saved = training.config, training.saved
    size = sum(int(np.prod(v.shape)) * 4 for v in saved.variables.values())
    needed = size * (config.trainer.keep_checkpoints + 1) * stages
    folder = training.folder
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield "weights", f"{training.trainer.student.count_params():,}"
    yield "first step", f"{seconds[0]:.1f} s, with compilation"
    hours = seconds[1] * config.trainer.steps / 3600
    yield "second step", f"{seconds[1]:.3g} s; {config.trainer.steps} steps take {hours:.1f} hours"
    yield "memory of this process", f"{peak:.1f} GB at its peak{_gpu_memory()}"
    short = "WARNING: too little disk, " if needed > free else ""
    yield "checkpoints", f"{short}{needed / 1e9:.2f} GB in all, {free / 1e9:.1f} GB are free"


def _stages(training, stages, seconds):
    """Images, steps and hours of each training of a run, from the time that a step has taken."""
    per_image = seconds / images_per_step(training.config)
    hours = {
        name: per_image * images_per_step(config) * config.trainer.steps / 3600
        for name, config in stages.items()
    }
    for name, config in stages.items():
        images, steps = images_per_step(config), config.trainer.steps
        yield f"stage {name}", f"{steps} steps of {images} images, {hours[name]:.1f} hours"
    if stages:
        yield "all stages", f"{sum(hours.values()):.1f} hours, and the labeling of the images"


def _gpu_memory():
    import keras

    if keras.backend.backend() == "jax":
        import jax

        peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    else:
        import tensorflow as tf

        names = [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices("GPU")]
        peaks = [tf.config.experimental.get_memory_info(name)["peak"] for name in names]
    peaks = [peak for peak in peaks if peak]
    return f", {max(peaks) / 2**30:.1f} GB on a device" if peaks else ""


def check(config, folder, whole=False):
    """What a training would meet and need, without training; see `look`.

    Prepares the data in `folder/data`, and draws `folder/check.png`. Of a recipe for `run`, whose
    student has no labels yet, the teacher is looked at; the time is that of all stages.

    Args:
        config: `Config`.
        folder: the run folder.
        whole: look at the stages of `run`, even if `pseudo.records` is given.
    """
    whole = whole or (config.pseudo is not None and not config.pseudo.given)
    first = config_lib.teacher_config(config) if whole else config
    check_startable(first)
    folder = pathlib.Path(folder)
    distribution = distribution_lib.make_distribution(config.runtime)
    check_batches(first, distribution)
    with working_in(folder, distribution):
        check_settings(config, folder)
        names = WITHOUT_LABELS if whole else SOURCES
        data = prepare(config, folder / "data", distribution, names)
        first, config = data.with_num_classes(first), data.with_num_classes(config)
        check_start(first, data)
        picture = folder / "check.png" if distribution.chief else None
        with reading(data, distribution), memory.given_back():
            rows = look(
                Training(first, folder, data, distribution),
                picture,
                config_lib.stages(config) if whole else {},
            )
    return [*(("boxes", f"WARNING: {text}") for text in data.lost_boxes(first)), *rows]

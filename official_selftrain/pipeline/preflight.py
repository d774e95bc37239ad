"""Before a long run: one batch through everything, and what the run will need."""

import resource
import shutil
import time
from collections.abc import Mapping

import numpy as np

from official_selftrain import config as config_lib
from official_selftrain.config import Config
from official_selftrain.data import records, visualize
from official_selftrain.data.prepared import SOURCES, WITHOUT_LABELS
from official_selftrain.engine import guards, memory
from official_selftrain.pipeline.folder import check_settings
from official_selftrain.pipeline.start import check_start, check_startable
from official_selftrain.pipeline.thresholds import from_records
from official_selftrain.pipeline.training import Training, check_batches
from official_selftrain.pipeline.workspace import Workspace
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.types import StrPath

SHOWN = 4  # images in the picture


def look(
    training: Training,
    picture: StrPath | None,
    stages: Mapping[str, Config] | None = None,
) -> list[tuple[str, str]]:
    """Runs two training steps, discards them, and reports on data, time, memory and disk space.

    Args:
        training: a new one.
        picture: PNG file to write, of labeled images under each augmentation policy, or None.
        stages: `{stage: config}` of all trainings of the run, if this one is only the first.

    Returns:
        Lines to print, as (name, text). Texts that need attention start with "WARNING".

    Raises:
        UserError: if the first loss is already not finite, or for what would stop a training.
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
                f"{problem}, at the very beginning: check the labels, trainer.init and "
                "optimizer.warmup_learning_rate"
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
    """How many images of each source hold each class."""
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
    """Label density and pixel values of the first batch, as the network gets them."""
    images, labels = micro_batch
    local = training.distribution.local
    for source, pixels in images.items():
        pixels = local(pixels)
        values = {name: local(x) for name, x in labels[source].items()}
        density = float(training.task.label_density(values))
        text = f"{len(pixels)} images {pixels.shape[1:]}, {density:.3g} "
        text += f"{training.task.label_unit}, pixels {pixels.mean():.2f} +- {pixels.std():.2f}"
        yield f"first batch of {source}", text if density else f"WARNING: no label, {text}"


def _needs(training, seconds, stages):
    """Time of one training, memory, and disk of all."""
    config, saved = training.config, training.saved
    size = sum(int(np.prod(v.shape)) * 4 for v in saved.variables.values())
    needed = size * (config.trainer.keep_checkpoints + 1) * stages
    folder = training.folder
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield "weights", f"{training.trainer.student.count_params():,}"
    yield "first step", f"{seconds[0]:.1f} s, compilation included"
    hours = seconds[1] * config.steps / 3600
    yield "second step", f"{seconds[1]:.3g} s; {config.steps} steps take {hours:.1f} hours"
    yield "peak memory", f"{peak:.1f} GB in this process{_gpu_memory()}"
    short = "WARNING: too little disk space, " if needed > free else ""
    yield "checkpoints", f"{short}{needed / 1e9:.2f} GB in all, {free / 1e9:.1f} GB are free"


def _stages(training, stages, seconds):
    """Images, steps and hours of each training of a run, estimated from the time of one step."""
    per_image = seconds / training.config.images_per_step
    hours = {
        name: per_image * config.images_per_step * config.steps / 3600
        for name, config in stages.items()
    }
    for name, config in stages.items():
        images, steps = config.images_per_step, config.steps
        yield f"stage {name}", f"{steps} steps of {images} images, {hours[name]:.1f} hours"
    if stages:
        yield "all stages", f"{sum(hours.values()):.1f} hours, and the time to label the images"


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


def check(config: Config, folder: StrPath, whole: bool = False) -> list[tuple[str, str]]:
    """What a training would meet and need, without training; see `look`.

    Prepares the data in `folder/data`, and draws `folder/check.png`. For a recipe of `run`, whose
    student has no labels yet, the teacher is checked and the time is estimated for all stages.

    Args:
        config: of a training or a run.
        folder: the run folder.
        whole: check the stages of `run`, even if `pseudo.records` is given.

    Returns:
        Lines to print, as (name, text). Texts that need attention start with "WARNING".

    Raises:
        UserError: for what would stop a training.
    """
    whole = whole or (config.pseudo is not None and not config.pseudo.given)
    config = config if whole else from_records(config)
    first = config_lib.teacher_config(config) if whole else config
    check_startable(first)
    workspace = Workspace.open(first, folder)
    check_batches(first, workspace.distribution)
    with workspace:
        check_settings(config, workspace.folder)
        workspace.prepare(WITHOUT_LABELS if whole else SOURCES)
        first, data = workspace.config, workspace.data
        check_batches(first, workspace.distribution)  # automatic ones are known by now
        check_start(first, data)
        stages = config_lib.stages(config, data.completed) if whole else {}
        picture = workspace.folder / "check.png" if workspace.distribution.chief else None
        with workspace.reading(), memory.given_back():
            training = Training(workspace)
            rows = look(training, picture, stages)
            warnings = list(training.task.warnings(first, data))
    return [*(("boxes", f"WARNING: {text}") for text in warnings), *rows]

"""Measures devices, XLA, precision, resuming and Beam, and estimates the cost of labels.

    python benchmarks/scale.py [train|resume|labels|cost ...]

`train`: images/s of the demo's teacher on one and two logical devices of the CPU, with and without
XLA, and in bfloat16, each in a process of its own and as a ratio to the first. `resume`: seconds to
save, to restore, and from the command to the next step. `labels`: pseudo labels/s of one process
and of Apache Beam. `cost`: multiply-adds per image, and an estimate of what a million images would
cost on an H100.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import harness

STEPS, BATCH = 20, 16
BF16 = "task.precision=mixed_bfloat16"
SETTINGS = {
    "default": "runtime.strategy=default",
    "mirrored, 1 device": "runtime={strategy: mirrored, devices: 1}",
    "mirrored, 2 devices": "runtime={strategy: mirrored, devices: 2}",
    "XLA": "runtime.jit_compile=true",
    "bfloat16": BF16,
    "bfloat16, XLA": f"runtime.jit_compile=true,{BF16}",
    "jax, 1 device": "runtime={strategy: jax, devices: 1}",
    "jax, 2 devices": "runtime={strategy: jax, devices: 2}",
}
# The dense bfloat16 peak of an H100 SXM in FLOP/s, the fraction of it that inference of these
# networks is assumed to reach, and an assumed price. Multiply-adds are counted; nothing was run
# on an H100.
PEAK, UTILIZATION, DOLLARS_PER_HOUR = 989e12, 0.3, 3.0
TEACHERS = {
    "SpineNet-190, 1280 px": ("coco_spinenet190", "task.image_size=[1280,1280]", 1.0),
    "EfficientNet-B7, 640 px, six scales": (
        "pascal_b7_imagenetpp_s4_selftrain_aug",
        "task={image_size: [640, 640], num_classes: 21}",
        sum(scale**2 for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)),
    ),
}


def settings(*overrides):
    from official_selftrain import config

    overrides = ["human.batch_size=4,pseudo=null,task.num_classes=6", *overrides]
    return config.resolve("demo", overrides=overrides)


def train(name):
    """Reports seconds of the first two steps, then images/s and CPU seconds per image."""
    if name.startswith("jax"):
        os.environ["KERAS_BACKEND"] = "jax"
    from official_selftrain.pipeline import training
    from official_selftrain.pipeline.workspace import Workspace

    chosen = settings(SETTINGS[name], f"human.batch_size={BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.open(chosen, folder)
        workspace.prepare()
        loop = training.Training(workspace).loop(0)
        began = time.perf_counter()
        loop.steps(2)
        first = time.perf_counter() - began
        began, cpu = time.perf_counter(), time.process_time()
        loop.steps(STEPS)
        rate = STEPS * BATCH / (time.perf_counter() - began)
        cpu = (time.process_time() - cpu) / (STEPS * BATCH)
    harness.report({"first": first, "rate": rate, "cpu": cpu})


def all_trainings():
    rates = {}
    for name in SETTINGS:
        row = harness.measured(__file__, "train", name)
        rates[name] = row["rate"]
        print(
            f"{name}: {row['rate']:.1f} images/s, {rates[name] / rates['default']:.2f} of default, "
            f"{1000 * row['cpu']:.0f} CPU ms per image, first two steps {row['first']:.0f} s"
        )


def resume():
    from official_selftrain.config import resolve
    from official_selftrain.engine import checkpoints, distribution
    from official_selftrain.pipeline import training
    from official_selftrain.tasks import make_task

    for experiment in ("demo", "coco_spinenet49"):
        chosen = resolve(experiment, overrides=["task.num_classes=91", "pseudo=null"])
        distribution.make_distribution(chosen.runtime)
        task = make_task(chosen.task.model_copy(update={"bn_synchronized": False}))
        trainer = training.make_trainer(chosen, task)
        with tempfile.TemporaryDirectory() as folder:
            saved = checkpoints.Checkpoints(folder, trainer)
            began = time.perf_counter()
            saved.save(1)
            middle = time.perf_counter()
            saved.restore()
            end = time.perf_counter()
            size = saved.path(1).stat().st_size / 1e6
        print(f"{experiment}: {size:.0f} MB, saved in {middle - began:.2f} s, restored in "
              f"{end - middle:.2f} s")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "official_selftrain.train", "--experiment=demo"),
            *(f"--model_dir={folder}", "--mode=train", "--params_override=pseudo=null"),
            "--params_override=trainer={steps: 4, steps_per_loop: 2, checkpoint_interval: 2}",
            "--params_override=optimizer.warmup_steps=2",
        ]
        subprocess.run(command, check=True, capture_output=True)
        for lost in ("model.weights.h5", "checkpoints/ckpt-00000004.npz"):
            (pathlib.Path(folder) / lost).unlink()
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        print(f"demo: {time.perf_counter() - began:.1f} s from the command to the next loop's end")


def labels():
    """The demo's 1,000 unlabeled images in shards of 250, by an untrained teacher."""
    from official_selftrain.data import records
    from official_selftrain.data.prepared import PreparedData
    from official_selftrain.pipeline import training
    from official_selftrain.tasks import make_task

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        chosen = settings("task.nms.score_threshold=0.0", "pseudo={score_threshold: 0.001}")
        data = PreparedData(chosen, folder / "data")
        images = list(records.read(data.files("unlabeled")))
        for shard in range(4):
            records.write(str(folder / f"u-{shard}.tfrecord"), images[250 * shard :][:250])
        model = make_task(chosen.task).build_model()
        training.checkpoints.save_weights(model, folder)
        command = [
            *(sys.executable, "-m", "official_selftrain.pseudo_label", "--experiment=demo"),
            f"--weights={folder / 'model.weights.h5'}",
            f"--params_override=unlabeled={{builtin: null, records: {folder}/u-*.tfrecord}}",
            "--params_override=task={num_classes: 6, nms: {score_threshold: 0.0}}",
            "--params_override=pseudo.score_threshold=0.001",
        ]
        beam = "--beam=--runner=DirectRunner"
        workers = "--beam=--direct_num_workers=2", "--beam=--direct_running_mode=multi_processing"
        ways = {"one process": (), "Beam, one process": (beam,), "Beam, two": (beam, *workers)}
        for name, flags in ways.items():
            out = folder / name.replace(" ", "-").replace(",", "")
            began = time.perf_counter()
            subprocess.run(
                [*command, f"--model_dir={out}", *flags], check=True, capture_output=True
            )
            written = [file.stat().st_mtime for file in sorted(out.glob("pseudo-*.tfrecord"))]
            print(
                f"{name}: {len(images) / (time.perf_counter() - began):.1f} images/s, start and "
                f"report included; {750 / max(max(written) - min(written), 1e-9):.1f} images/s "
                "from the first finished shard to the last"
            )


def cost():
    from official_selftrain.config import resolve
    from official_selftrain.models.cost import multiply_adds
    from official_selftrain.tasks import make_task

    for name, (experiment, override, passes) in TEACHERS.items():
        task = make_task(resolve(experiment, overrides=[override]).task)
        operations = 2 * passes * multiply_adds(task.build_model())
        rate = UTILIZATION * PEAK / operations
        hours = 1e6 / rate / 3600
        print(
            f"{name}: {operations / 1e12:.2f} TFLOP per image; at {UTILIZATION:.0%} of "
            f"{PEAK / 1e12:.0f} TFLOP/s {rate:.0f} images/s, a million in {hours:.1f} hours, "
            f"{hours * DOLLARS_PER_HOUR:.0f} dollars at {DOLLARS_PER_HOUR:.0f} dollars per hour"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"] and len(sys.argv) == 3:
        train(sys.argv[2])
    else:
        parts = {"train": all_trainings, "resume": resume, "labels": labels, "cost": cost}
        for part in sys.argv[1:] or parts:
            print(f"-- {part}")
            parts[part]()

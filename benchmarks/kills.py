"""Kills a small run at random moments in all stages and compares it with an uninterrupted run.

    python benchmarks/kills.py --kills=24 --seed=0

The run has every kind of file: two policies, averaged and best weights, evaluations during
training, three shards of pseudo labels, a control. Each kill (SIGKILL) comes a random time after
the run has written the next file of a list that covers all stages. `--inside` more kills come while
a temporary file exists, in the middle of writing a checkpoint, weights or a shard. Then the command
is repeated until it finishes. Prints where the run was killed and which files equal those of the
uninterrupted run bit for bit; the exit status is 1 if any differs. Takes about 10 minutes on two
cores.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

RECIPE = """
SOURCE = {"images": "train", "annotations": "train.json", "batch_size": 4}
EXPERIMENTS = {"kills": {
    "task": {
        "image_size": (128, 128), "backbone": "resnet10", "neck": "fpn", "neck_filters": 16,
        "head_convs": 1, "head_filters": 16, "nms": {"score_threshold": 0.0, "max_detections": 5},
    },
    "human": SOURCE | {"policy": "S3"},
    "unlabeled": {"images": "unlabeled"},
    "pseudo": {"batch_size": 4, "policy": "S4", "score_threshold": 0.001},
    "evaluation": {"images": "val", "annotations": "val.json"},
    "self_training": {"control": True},
    "optimizer": {"learning_rate": 0.02, "warmup_steps": 4},
    "trainer": {
        "steps": 12, "steps_per_loop": 2, "checkpoint_interval": 4, "evaluation_interval": 6,
        "ema_decay": 0.9,
    },
}}
"""
IMAGES = {"train": 30, "val": 12, "unlabeled": 1100}
# Files that show how far a run has come, in the order in which they appear.
TRAINING = ("ckpt-00000000.npz", "ckpt-00000004.npz", "ckpt-00000008.npz", "ckpt-00000012.npz")
MARKS = (
    "config.yaml",
    "data/human-00000-of-00001.tfrecord",
    "data/unlabeled-00001-of-00003.tfrecord",
    *(f"teacher/checkpoints/{name}" for name in TRAINING),
    "teacher/metrics.json",
    *(f"labels/pseudo-{shard:05d}.tfrecord" for shard in range(3)),
    "labels/statistics.json",
    *(f"student/checkpoints/{name}" for name in TRAINING),
    "student/metrics.json",
    *(f"control/checkpoints/{name}" for name in TRAINING),
    "control/metrics.json",
)
# Where temporary files lie while something is written.
INSIDE = (
    "data/*.tmp",
    "teacher/checkpoints/*.tmp",
    "teacher/*.tmp.weights.h5",
    "labels/*.tfrecord.*.tmp",
    "student/checkpoints/*.tmp",
    "student/*.tmp.weights.h5",
)
STARTED = "--- started ---"  # in the log, before what a process writes
ROOT = pathlib.Path(__file__).resolve().parents[1]


def write_data(folder, seed):
    from PIL import Image

    rng = np.random.default_rng(seed)
    (folder / "recipe.py").write_text(RECIPE)
    for split, count in IMAGES.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            picture = rng.integers(0, 80, (100, 128, 3), "uint8")
            x, y = (int(v) for v in rng.integers(0, 60, 2))
            picture[y : y + 40, x : x + 40] += 150
            Image.fromarray(picture).save(folder / split / f"{index:04d}.jpg")
            images.append(
                {"id": index, "file_name": f"{index:04d}.jpg", "width": 128, "height": 100}
            )
            if index % 5:  # the others have no box
                box = {"bbox": [x, y, 40, 40], "category_id": 1, "area": 1600}
                annotations.append({"id": index, "image_id": index} | box)
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "square"}]
        (folder / f"{split}.json").write_text(json.dumps(content))


def start(data, run):
    command = [
        *(sys.executable, "-m", "official_selftrain.run", f"--experiment={data}/recipe.py:kills"),
        *(f"--data_dir={data}", f"--model_dir={run}"),
    ]
    log = open(f"{run}.log", "a", encoding="utf-8")  # noqa: SIM115
    print(STARTED, file=log, flush=True)
    # Without this, sums in another order would differ in the last bit.
    env = os.environ | {"TF_DETERMINISTIC_OPS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def finish(data, run):
    """Seconds of the command, which must succeed."""
    began = time.perf_counter()
    if status := start(data, run).wait():
        log = pathlib.Path(f"{run}.log").read_text(encoding="utf-8")
        sys.exit(f"the run ended with status {status}: {log[-3000:]}")
    return time.perf_counter() - began


def kill(process, due):
    """Kills the process as soon as `due()` is true; returns whether it was still running."""
    while process.poll() is None:
        if due():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def stage(run):
    """The stage that the last process had logged last; "start" before the first stage."""
    log = pathlib.Path(f"{run}.log").read_text(encoding="utf-8").rpartition(STARTED)[2]
    stages = [line.rpartition("stage ")[2] for line in log.splitlines() if " stage " in line]
    return stages[-1] if stages else "start"


def kill_after(data, run, mark, seconds):
    """Kills some time after a file has appeared, or after the start if it already exists."""
    process = start(data, run)
    appeared = []

    def due():
        if not appeared and (run / mark).exists():
            appeared.append(time.perf_counter())
        return appeared and time.perf_counter() - appeared[0] >= seconds

    return kill(process, due)


def kill_inside(data, run, pattern):
    """Kills while a file that matches a pattern exists; returns whether one did in its stage."""
    before = set(run.glob(pattern))  # left by an earlier kill
    place = pattern.partition("/")[0]
    end = {"data": "teacher", "labels": "labels/statistics.json"}.get(
        place, f"{place}/metrics.json"
    )
    found = []

    def due():
        found.append(not before.issuperset(run.glob(pattern)))
        return found[-1] or (run / end).exists()

    return kill(start(data, run), due) and found[-1]


# --- Comparison ------------------------------------------------------------------------------


def arrays_of(file):
    if file.suffix == ".npz":
        with np.load(file) as archive:
            return dict(archive)
    import h5py

    found = {}
    with h5py.File(file) as archive:
        archive.visititems(
            lambda name, item: found.update({name: item[()]}) if hasattr(item, "dtype") else None
        )
    return found


def equal(first, second):
    """Whether two files of runs are equal bit for bit, except for speeds."""
    if not second.exists():
        return False
    if first.suffix in (".npz", ".h5"):
        a, b = arrays_of(first), arrays_of(second)
        return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)
    if first.name == "history.jsonl":
        rows = [[json.loads(line) for line in file.open()] for file in (first, second)]
        for row in (*rows[0], *rows[1]):
            del row["images_per_second"]
        return rows[0] == rows[1]
    return first.read_bytes() == second.read_bytes()


KINDS = {
    "data shards": "data/*.tfrecord",
    "checkpoints": "*/checkpoints/*.npz",
    "final, averaged and best weights": "*/*.weights.h5",
    "metrics": "*/metrics.json",
    "best evaluations": "*/best.json",
    "histories": "*/history.jsonl",
    "pseudo labels": "labels/*.tfrecord",
    "label statistics": "labels/statistics.json",
    "comparisons": "comparison.json",
}


def compare(whole, killed):
    """Prints how many files of each kind are equal; returns the number that differ."""
    wrong = []
    for kind, pattern in KINDS.items():
        files = sorted(whole.glob(pattern))
        different = [f for f in files if not equal(f, killed / f.relative_to(whole))]
        print(f"{kind:<34} {len(files) - len(different)} of {len(files)} equal")
        wrong += different or ([] if files else [kind])
    left = [file for file in killed.rglob("*.tmp*") if file.is_file()]
    print(f"{'temporary files left':<34} {len(left)}")
    for file in [*wrong, *left]:
        print(f"WRONG: {file}")
    return len(wrong) + len(left)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills at random moments")
    parser.add_argument("--inside", type=int, default=6, help="kills while a file is being written")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, stages and moments")
    parser.add_argument(
        "--longest", type=float, default=4.0, help="longest wait before a kill, in s"
    )
    parser.add_argument("--folder", type=pathlib.Path, help="keeps data and runs in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder, arguments.seed)
        sys.exit(1 if test(folder, arguments) else 0)


def test(folder, arguments):
    rng = random.Random(arguments.seed)
    whole, killed = folder / "whole", folder / "killed"
    print(f"uninterrupted: {finish(folder, whole):.0f} s")
    # Covers all parts of the list equally often, in order.
    marks = [MARKS[i * len(MARKS) // arguments.kills] for i in range(arguments.kills)]
    plan = [(mark, rng.uniform(0, arguments.longest)) for mark in marks]
    inside = [INSIDE[i % len(INSIDE)] for i in range(arguments.inside)]
    counts, began = collections.Counter(), time.perf_counter()

    def killed_inside(stages):
        for pattern in [p for p in inside if p.partition("/")[0] in stages]:
            inside.remove(pattern)
            if kill_inside(folder, killed, pattern):
                counts[f"inside {pattern}"] += 1

    for mark, seconds in plan:
        killed_inside({mark.partition("/")[0]})
        if kill_after(folder, killed, mark, seconds):
            counts[f"stage {stage(killed)}"] += 1
            print(f"killed {seconds:.2f} s after {mark}, in the stage {stage(killed)}", flush=True)
    finish(folder, killed)
    print(f"{sum(counts.values())} kills in {time.perf_counter() - began:.0f} s:")
    for place, count in counts.items():
        print(f"  {count} {place}")
    return compare(whole, killed)


if __name__ == "__main__":
    main()

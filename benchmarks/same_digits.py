"""Compares all digits of the first training steps and the golden outputs before and after a change.

    python benchmarks/same_digits.py --record=DIGITS.json     # before a change
    python benchmarks/same_digits.py --compare=DIGITS.json    # after it, on the same machine

Runs the teacher and the student of both demos for 50 steps each (seed 0, one thread) from the
command line and collects every scalar of every step, the metrics and the checksum of the pseudo
labels; then it adds checksums of the outputs of networks with golden weights. If anything differs,
it is printed and the exit status is 1. Takes about 6 minutes on one core.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import harness
import numpy as np

STEPS = 50
OVERRIDES = (
    "optimizer.warmup_steps=10",
    f"trainer={{seed: 0, steps: {STEPS}, steps_per_loop: 1, checkpoint_interval: {STEPS}}}",
    # After so few steps all scores are low; without this the student would have no labels.
    "pseudo.score_threshold=0.02",
    f'self_training={{control: false, teacher: {{"trainer.steps": {STEPS}}}}}',
)
DEMOS = ("demo", "demo_segmentation")
NETWORKS = (
    "retinanet_spinenet49S_128",
    "retinanet_resnet50_fpn_128",
    "segmentation_efficientnet-b0_nasfpn_128",
)
# With several threads the order of sums, and with it the last digit, would vary.
ONE_THREAD = {
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TF_DETERMINISTIC_OPS": "1",
}


def steps_of(name, folder):
    """Returns `{name: digits}` for the first steps of a demo."""
    command = [sys.executable, "-m", "official_selftrain.run", f"--experiment={name}"]
    command += [f"--model_dir={folder}", *(f"--params_override={text}" for text in OVERRIDES)]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found = {}
    for stage in ("teacher", "student"):
        for line in (folder / stage / "history.jsonl").open(encoding="utf-8"):
            scalars = json.loads(line)
            del scalars["images_per_second"]
            found[f"{name}, {stage}, step {scalars['step']}"] = scalars
        found[f"{name}, {stage}, metrics"] = json.loads(
            (folder / stage / "metrics.json").read_text()
        )
    for file in sorted(folder.glob("labels/*.tfrecord")):
        found[f"{name}, {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def outputs_of(case):
    """Checksums of the outputs of a network with golden weights."""
    _, model = harness.golden_networks().golden_network(harness.GOLDEN, case)
    with np.load(harness.GOLDEN / f"forward/{case}_infer.npz") as arrays:
        image = arrays["image"]
    outputs = {key: np.asarray(value) for key, value in model(image, training=False).items()}
    return {
        f"{case}, {key}": f"{hashlib.sha256(value.tobytes()).hexdigest()} {value.shape}"
        for key, value in outputs.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--record", type=pathlib.Path)
    group.add_argument("--compare", type=pathlib.Path)
    arguments = parser.parse_args()
    os.environ.update(ONE_THREAD)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in DEMOS:
            found |= steps_of(name, pathlib.Path(scratch) / name)
    if harness.GOLDEN.is_dir():
        for case in NETWORKS:
            found |= outputs_of(case)
    if arguments.record:
        arguments.record.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} recorded")
        return
    wanted = json.loads(arguments.compare.read_text())
    different = [key for key in wanted.keys() | found if wanted.get(key) != found.get(key)]
    for key in sorted(different)[:20]:
        print(f"{key}: {wanted.get(key)} before, {found.get(key)} now")
    print(f"{len(found)} compared, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

"""Every digit of what must not change while code is moved: the first steps and the golden outputs.

    python benchmarks/same_digits.py --record=DIGITS.json     # before a change
    python benchmarks/same_digits.py --compare=DIGITS.json    # after it, on the same machine

Runs teacher and student of both demos for 50 steps each (seed 0, one thread) through the command
line, and collects every scalar of every step, the metrics and the checksum of the pseudo labels;
then the outputs of networks with golden weights, as checksums of their bytes. Exit status 1 names
what differs. Some 6 minutes on one core.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 50
OVERRIDES = (
    "optimizer.warmup_steps=10",
    f"trainer={{seed: 0, steps: {STEPS}, steps_per_loop: 1, checkpoint_interval: {STEPS}}}",
    # So short a teacher is sure of nothing; the student has labels all the same.
    "pseudo.score_threshold=0.02",
    f'self_training={{control: false, teacher: {{"trainer.steps": {STEPS}}}}}',
)
DEMOS = ("demo", "demo_segmentation")
NETWORKS = (
    "retinanet_spinenet49S_128",
    "retinanet_resnet50_fpn_128",
    "segmentation_efficientnet-b0_nasfpn_128",
)
# Sums in another order would differ in the last digit.
ONE_THREAD = {
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TF_DETERMINISTIC_OPS": "1",
}


def steps_of(name, folder):
    """`{what: digits}` of the first steps of a demo."""
    command = [sys.executable, "-m", "official_selftrain.run", f"--experiment={name}"]
    command += [f"--model_dir={folder}", *(f"--params_override={text}" for text in OVERRIDES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


def outputs_of(case, golden):
    """Checksums of the outputs of a network with golden weights."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/models")]
    import conftest
    import test_golden

    _, model = test_golden.golden_network(golden, case)
    image = conftest.load(golden / f"forward/{case}_infer.npz")["image"]
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
    golden = ROOT.parent / "shared" / "golden"
    if golden.is_dir():
        for case in NETWORKS:
            found |= outputs_of(case, golden)
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

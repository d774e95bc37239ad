"""Measures the seconds from a command to its answer.

    python benchmarks/startup.py

Times `--help`, `--experiment=list`, a misspelled experiment, `import tensorflow` as the baseline,
and a training of SpineNet-49 at 256 px up to the end of its first step.
"""

import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

TRAIN = [sys.executable, "-m", "official_selftrain.train"]
ONE_STEP = (
    "task.image_size=[256,256],trainer.steps=1,optimizer.warmup_steps=0,human.batch_size=2,"
    "human.builtin=digits/train,evaluation=null"
)


def timed(name, command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, capture_output=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name:<34} {wall:6.2f} s, {cpu:6.2f} CPU s")


def until(name, command, file):
    """Prints the time until a command has written `file`, then waits for its end (Linux)."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not file.exists():
        if process.poll() is not None:
            sys.exit("the training did not finish; run its command to see why")
        time.sleep(0.05)
    wall = time.perf_counter() - began
    ticks = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    print(f"{name:<34} {wall:6.2f} s, {cpu:6.2f} CPU s")
    process.wait()


def main():
    timed("--help", [*TRAIN, "--help"])
    timed("--experiment=list", [*TRAIN, "--experiment=list"])
    timed("misspelled experiment", [*TRAIN, "--experiment=coco_spinent49"])
    timed("import tensorflow", [sys.executable, "-c", "import tensorflow"])
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *TRAIN,
            "--experiment=coco_spinenet49",
            f"--model_dir={folder}/run",
            f"--params_override={ONE_STEP}",
            "--mode=train",
        ]
        history = pathlib.Path(folder) / "run/history.jsonl"
        until("SpineNet-49 to the first step", command, history)


if __name__ == "__main__":
    main()

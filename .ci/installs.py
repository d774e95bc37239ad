"""What the documents tell people to install, in a fresh environment: both tasks run in miniature.

make test-installs
"""

import pathlib
import re
import shutil
import subprocess
import sys

import mini
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETS = {
    "slim": "tf-cpu",
    "readme": "tf-cpu,eval,report",
    "demo": "tf-cpu,demo,eval,report",
    "lowest": "tf-cpu,demo,eval,report,tensorboard",
}
# Few steps: what is tried here is the installation.
QUICK = "trainer.steps=2,optimizer.warmup_steps=1"


def lowest_versions():
    """The lower bounds of setup.py, as constraints of pip."""
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert len(bounds) > 20
    return "".join(f"{name}=={version}\n" for name, version in bounds)


def call(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", SETS)
def test_what_is_installed_runs_both_tasks(name, tmp_path):
    call(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    # Isolated: neither the folder nor the environment may lend what is not installed.
    python = [tmp_path / "venv/bin/python", "-I", "-m"]
    constraints = []
    if name == "lowest":
        (tmp_path / "lowest.txt").write_text(lowest_versions())
        constraints = ["--constraint", tmp_path / "lowest.txt"]
    # A copy, because pip builds in the folder, and two builds would mix.
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg*"))
    call(
        *python,
        "pip",
        "install",
        "-qq",
        "--no-compile",
        *constraints,
        f".[{SETS[name]}]",
        cwd=checkout,
    )
    shutil.rmtree(checkout)
    call(*python, "pip", "check", cwd=tmp_path)
    mini.write_boxes(tmp_path)
    mini.write_masks(tmp_path)
    for recipe in ("recipe.py:mini", "masks.py:masks"):
        folder = tmp_path / recipe.partition(":")[2]
        call(
            *python, "official_selftrain.run", f"--experiment={tmp_path}/{recipe}",
            f"--data_dir={tmp_path}", f"--model_dir={folder}", f"--params_override={QUICK}",
            cwd=tmp_path,
        )  # fmt: skip
        assert (folder / "report.html").stat().st_size > 10_000
        for stage in ("teacher", "student"):
            assert (folder / stage / "metrics.json").is_file()

"""The commands as typed: one line on a mistake, exit status 2, no stack trace."""

import json
import pathlib
import subprocess
import sys

import pytest
from helpers import png

ROOT = pathlib.Path(__file__).resolve().parents[1]


def command(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"official_selftrain.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", [], "say what to run: --experiment=NAME"),
        ("train", ["--experiment=demo"], "give --model_dir"),
        ("run", ["--experiment=dmo", "--model_dir=x"], "did you mean 'demo'"),
        ("run", ["--experiment=demo", "list"], "unexpected argument 'list'"),
        ("train", ["--experiment=demo", "--params_override=trainer.step=1"], "mean 'steps'"),
        ("pseudo_label", ["--experiment=demo", "--model_dir=x"], "give --weights"),
        ("prepare_data", ["--images=x"], "give --output=FOLDER/PREFIX"),
        ("evaluate", ["--config_file=nowhere.yaml"], "cannot read the config file"),
    ],
)
def test_mistakes_take_one_line(name, arguments, message):
    done = command(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_misspelt_flag_and_mode_are_answered():
    done = command("train", "--experimnt=demo")
    assert done.returncode == 1 and "Did you mean: experiment" in done.stderr
    done = command("train", "--mode=evaluate")
    assert done.returncode == 1 and "train|eval|train_and_eval" in done.stderr


def test_list_prints_every_experiment():
    done = command("train", "--experiment=list")
    assert done.returncode == 0
    for name in ("demo", "folder", "aquarium_25", "bccd_10", "coco_spinenet49 "):
        assert name in done.stdout
    assert "44.3" in done.stdout


def test_prepare_data_writes_shards_summary_and_picture(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        (images / f"{index}.png").write_bytes(png(20, 30, 40 * index))
    (images / "bad.png").write_bytes(b"not an image")
    arguments = [f"--images={images}", f"--output={tmp_path}/out/all", "--preview=2"]
    done = command("prepare_data", *arguments)
    assert done.returncode == 2
    assert "bad.png cannot be decoded" in done.stderr.splitlines()[-1]
    done = command("prepare_data", *arguments, "--on_bad_record=skip")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "images": 3,
        "boxes": 0,
        "masks": 0,
        "empty": 3,
        "classes": {},
        "skipped": 1,
        "files": 1,
    }
    assert (tmp_path / "out/all-00000-of-00001.tfrecord").is_file()
    assert (tmp_path / "out/all-preview.png").is_file()


@pytest.mark.parametrize(
    ("number", "status", "message"), [("SIGTERM", 143, "SIGTERM: what"), ("SIGINT", 130, "Ctrl-C:")]
)
def test_a_command_that_is_asked_to_end_anywhere_says_where_it_goes_on(number, status, message):
    code = (
        "import signal; from official_selftrain import cli; "
        f"cli.main(lambda: signal.raise_signal(signal.{number}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status
    assert done.stderr.startswith(message) and "the same command goes on" in done.stderr
    assert done.stderr.count("\n") == 1

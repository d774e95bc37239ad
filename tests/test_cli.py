"""The commands as typed: one line on a mistake, exit status 2, no stack trace."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from helpers import png

import official_selftrain as ost
from official_selftrain import cli
from official_selftrain.utils.errors import UserError

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
        ("train", [], "no experiment is given: use --experiment=NAME"),
        ("train", ["--experiment=demo"], "--model_dir is required"),
        ("run", ["--experiment=dmo", "--model_dir=x"], "did you mean 'demo'"),
        ("run", ["--experiment=demo", "list"], "unexpected argument 'list'"),
        ("train", ["--experiment=demo", "--params_override=trainer.step=1"], "mean 'steps'"),
        ("pseudo_label", ["--experiment=demo", "--model_dir=x"], "--weights is required"),
        ("prepare_data", ["--images=x"], "--output is required, for example --output=out/train"),
        ("prepare_data", ["--output=x"], "no source is given: use --images"),
        ("export", ["--experiment=demo"], "--output is required"),
        ("export", ["--experiment=demo", "--output=x"], "--model_dir (a finished training) or"),
        ("convert_checkpoint", ["--output=x"], "--checkpoint is required"),
        ("convert_checkpoint", ["--checkpoint=x"], "--output is required"),
        ("convert_checkpoint", ["--checkpoint=x", "--output=x.keras"], "is required: a checkpoint"),
        ("report", ["--experiment=demo"], "--model_dir is required"),
        ("evaluate", ["--config_file=nowhere.yaml"], "cannot read the config file"),
        ("study", [], "--study is required, for example --study=demo_alpha"),
        ("study", ["--study=demo_alpha"], "--model_dir is required"),
        ("study", ["--study=demo_alfa", "--model_dir=x"], "did you mean 'demo_alpha'"),
        ("study", ["--study=demo_alpha", "--jobs=0"], "--jobs takes a positive integer; given '0'"),
        ("study", ["--study=demo_alpha", "--model_dir=tests"], "holds something else than studies"),
    ],
)
def test_mistakes_take_one_line(name, arguments, message):
    done = command(name, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experimnt=demo"], "unknown flag --experimnt; did you mean '--experiment'?"),
        (["--zzzzzzzz=demo"], "unknown flag --zzzzzzzz; known: --experiment, --config_file, "),
        (["--mode=evaluate"], "check; given 'evaluate'; did you mean 'eval'?"),
        (["--mode=a: b"], "--mode takes one of train, eval, train_and_eval, check; given 'a: b'"),
        (["--mode"], "--mode takes one of train, eval, train_and_eval, check; no value is given"),
        (["--mode=check", "mode=eval"], "unexpected argument 'mode=eval': flags are written --na"),
        (["experimnt=demo"], "--name=value; did you mean '--experiment'?"),
        (["--flagfile=/nowhere"], "Unable to open flagfile"),
        (["--experiment=\x1b]0;title\x07\udcff\n"], r"'\x1b]0;title\x07\udcff\n'"),
    ],
)
def test_mistakes_in_flags_take_one_line_and_status_2(arguments, message):
    done = command("train", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and done.stderr.isprintable() is False
    assert not set(done.stderr) & {"\x1b", "\x07"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--seed=-1", "--seed takes a non-negative integer; given '-1'"),
        ("--seed=1.5", "--seed takes a non-negative integer; given '1.5'"),
        ("--verify=maybe", "--verify takes true or false; given 'maybe'"),
        ("--noverify=1", "--noverify=1 does not take an argument"),
        ("--on_bad_record=skipp", "one of stop, skip; given 'skipp'; did you mean 'skip'?"),
        ("--splits=1,x", "--splits takes percentages such as 1,10,50; given '1,x'"),
    ],
)
def test_a_value_of_the_wrong_type_takes_one_line_and_status_2(argument, message):
    done = command("prepare_data", "--output=x", argument)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.endswith(f"{message}\n")
    assert done.stderr.count("\n") == 1


def test_a_broken_backend_is_one_line_even_where_its_error_names_nothing(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("raise ImportError('libcudart.so.12: no such file')")
    arguments = ["--experiment=demo", f"--model_dir={tmp_path}/run", "--strategy=jax"]
    done = subprocess.run(
        [sys.executable, "-m", "official_selftrain.train", *arguments],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: jax is not installed or cannot be loaded (libcudart.so.12" in done.stderr
    assert "pip install 'official_selftrain[jax]'" in done.stderr


@pytest.mark.parametrize(
    ("modules", "backend"),
    [
        (["official_selftrain.cli", "keras.src", "jax", "jaxlib"], "jax"),
        (["official_selftrain.cli", "tensorflow.python", "official_selftrain.data.beam"], None),
        (["official_selftrain.cli", "pandas"], None),
    ],
)
def test_a_backend_is_at_fault_only_where_it_raised_the_error(modules, backend):
    """Not where it had only called what could not be imported, as a traced function is."""

    def broken():
        raise ImportError("libx.so: no such file")

    call = broken
    for module in reversed(modules):
        scope = {"__name__": module, "inner": call}
        exec("def call():\n    inner()", scope)
        call = scope["call"]
    with pytest.raises(ImportError) as told:
        call()
    assert cli._backend_of(told.value) == backend


COMMANDS = (
    "train", "run", "pseudo_label", "evaluate", "report", "prepare_data", "export",
    "convert_checkpoint",
)  # fmt: skip
# Prints the names of the flags that a command defines, instead of running it.
ACCEPTED = """
import runpy, sys
sys.argv[0] = "-m"  # as for a command: without Keras, and the flags of TensorFlow
from official_selftrain import cli
cli.main = lambda command: print(*cli._own_flags())
runpy.run_module("official_selftrain.{name}", run_name="__main__")
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_with_type_default_and_example(name):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"official_selftrain.{name}", "--help"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith(".") and lines[0][0].isupper()
    assert lines[-1].startswith("Documentation: ")
    assert (ROOT / lines[-1].removeprefix("Documentation: ")).is_file()
    # Backends take half a minute, which an answer does not need.
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "absl.app" in imported and not {"keras", "tensorflow", "jax"} & imported
    accepted = subprocess.run(
        [sys.executable, "-c", ACCEPTED.format(name=name)], capture_output=True, text=True, cwd=ROOT
    )
    flags = accepted.stdout.split()
    assert "output" in flags or "model_dir" in flags, accepted.stderr
    entries = dict(re.findall(r"^  --(?:\[no\])?(\w+)(.*\n(?: {6}.*\n)+)", done.stdout, re.M))
    assert list(entries) == flags
    for flag, entry in entries.items():
        usage, *text, facts = entry.splitlines()
        assert re.fullmatch(r"|=(TEXT|INTEGER|NUMBER|[a-z_/]+\|).*", usage), (flag, usage)
        assert text and text[0].strip()[0].isupper() and text[-1].endswith("."), (flag, text)
        assert re.fullmatch(rf" +Default: .+\. Example: --(no)?{flag}(=\S+)?", facts), facts
    examples = re.findall(r"^  python -m (?:.*\\\n)*.*$", done.stdout, re.M)
    assert 2 <= len(examples) <= 3
    for example in examples:
        assert f"official_selftrain.{name} --" in example
        assert set(re.findall(r" --(\w+)", example)) <= set(flags), example


def test_help_has_several_names_and_shows_the_flags_of_absl_only_when_asked():
    done = command("train", "--help")
    assert done.stderr == "" and "\n  --mode=train|eval|train_and_eval|check\n" in done.stdout
    assert "Default: train_and_eval. Example: --mode=check" in done.stdout
    assert "--pdb" not in done.stdout and "repeat this option" not in done.stdout
    for other in ("-h", "--helpshort"):
        assert command("train", "--mode=eval", other).stdout == done.stdout
    full = command("train", "--helpfull")
    assert full.returncode == 0 and full.stderr == ""
    assert "\n  --[no]pdb\n" in full.stdout and "\n  --mode=train|" in full.stdout
    assert max(map(len, full.stdout.splitlines())) <= 100


PROGRAM = """
import os, sys
sys.argv[0] = "-m"  # as for a command: without Keras
from official_selftrain import cli
from official_selftrain.utils.errors import TrainingInterrupted, UserError
def main():
    import logging
    logging.warning("clear \\x1b[2J\\n%s", "\\ud800")
    print("name \\x1b[31m \\ud800\\ttab\\nnext")
    {body}
cli.main(main)
"""


def program(body, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{body}", body)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("pass", 0, None),
        ("raise UserError('a\\nb')", 2, r"error: a\nb"),
        ("open('/nowhere/file')", 2, "error: [Errno 2] No such file or directory: '/nowhere/file'"),
        ("raise MemoryError", 2, "error: this machine has too little memory; reduce"),
        ("raise KeyboardInterrupt", 130, "Ctrl-C: finished work is kept; the same"),
        ("raise TrainingInterrupted('stopped at step 7')", 143, "stopped at step 7"),
        ("sys.modules['jax'] = None; import jax", 2, "pip install 'official_selftrain[jax]'"),
        ("sys.modules['tensorflow'] = None; import tensorflow", 2, "official_selftrain[tf-cpu]'"),
        ("{}['x' + chr(27)]", 1, r"internal error at <string>:10: KeyError: 'x\x1b'; the stack"),
        ("sys.exit(3)", 3, None),
    ],
)
def test_every_end_of_a_command_is_one_line_with_its_status(tmp_path, body, status, message):
    done = program(body, TMPDIR=str(tmp_path))
    assert done.returncode == status, done.stderr
    assert done.stdout == "name \\x1b[31m \\ud800\ttab\nnext\n"
    logged, *lines = done.stderr.splitlines()
    assert logged.endswith(r"warning: clear \x1b[2J\n\ud800")
    assert len(lines) == (message is not None)
    if message is not None:
        assert message in lines[0]
    traces = list(tmp_path.glob("official_selftrain-*.txt"))
    assert len(traces) == (status == 1)
    if traces:
        assert str(traces[0]) in lines[0]
        assert traces[0].read_text().startswith("Traceback (most recent call last)")


def test_names_are_printed_where_the_encoding_lacks_them():
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = program(r"print('K\xf6ln')", **ascii_only)
    assert done.returncode == 0 and done.stdout.endswith("K\\xf6ln\n")


def test_a_closed_pipe_ends_a_command_without_a_word():
    done = subprocess.run(
        f"{sys.executable} -m official_selftrain.train --experiment=list | true; "
        "echo ${PIPESTATUS[0]}",
        capture_output=True, text=True, cwd=ROOT, shell=True, executable="/bin/bash",
    )  # fmt: skip
    assert done.stderr == "" and done.stdout in ("141\n", "0\n")


def test_an_experiment_without_a_description_is_listed(monkeypatch):
    experiments = {"mine": {"published": "3", "trainer": {}}, "other": {"description": 5}}
    monkeypatch.setattr(cli.config_lib, "load_experiments", lambda: experiments)
    rows = [line.split() for line in cli.listing().splitlines()[1:]]
    assert rows == [["mine"], ["other", "5"]]


@pytest.mark.parametrize("text", ["0", "1,2,3", "-1", "a", "²", "99999", "1e3", ""])
def test_an_impossible_image_size_is_refused(text):
    with pytest.raises(UserError, match="--image_size takes"):
        cli.image_size(text)


def test_public_names_are_listed():
    assert {"DetectionTask", "RetinaNet", "SelfTrainer", "UserError"} <= set(dir(ost))


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
    shown = json.loads(done.stdout)
    summary = json.loads((tmp_path / "out/all.json").read_text())
    assert shown.pop("content") == summary["content"]
    assert shown == {
        "images": 3,
        "boxes": 0,
        "masks": 0,
        "empty": 3,
        "most_boxes": 0,
        "turned": 0,
        "classes": {},
        "left_out": {},
        "skipped": 1,
        "files": 1,
    }
    assert (tmp_path / "out/all-00000-of-00001.tfrecord").is_file()
    assert (tmp_path / "out/all-preview.png").is_file()


@pytest.mark.parametrize(
    ("number", "status", "message"), [("SIGTERM", 143, "SIGTERM: fin"), ("SIGINT", 130, "Ctrl-C:")]
)
def test_a_command_that_is_asked_to_end_anywhere_says_how_to_resume(
    number, status, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["train"])
    before = signal.getsignal(signal.SIGTERM)
    # A shell starts its background jobs without it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as left:
            cli.main(lambda: signal.raise_signal(signal.Signals[number]))
    finally:
        signal.signal(signal.SIGTERM, before)
    error = capsys.readouterr().err
    assert left.value.code == status and error.startswith(message) and error.count("\n") == 1
    assert "the same command resumes it" in error

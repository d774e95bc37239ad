"""What README and docs print runs: Python, YAML, command lines, names of flags and settings."""

import ast
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from official_selftrain import cli
from official_selftrain import config as config_lib
from official_selftrain.config import build
from official_selftrain.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
EXPERIMENTS = {
    str(path.relative_to(ROOT)): ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "experiments").glob("*.py"))
}
# Results and habits are pages of command lines, too.
ALL_PAGES = PAGES | {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/results").glob("*.md")))
}
COMMANDS = (
    "train", "run", "pseudo_label", "evaluate", "prepare_data", "report", "convert_checkpoint",
    "export", "predict", "study",
)  # fmt: skip


def blocks(language):
    """`page, number, text` of the code blocks of all pages."""
    found = []
    for page, text in ALL_PAGES.items():
        for number, block in enumerate(re.findall(rf"```{language}\n(.*?)```", text, re.S)):
            found.append(pytest.param(block, id=f"{page}-{number}"))
    return found


def test_no_code_hides_behind_another_language():
    """Python and YAML are run only where their fence says so; the rest are pictures."""
    found = 0
    for page, text in ALL_PAGES.items():
        for language, block in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M):
            assert language in ("python", "yaml", "sh", "bibtex", ""), f"{page}: {language}"
            code = language == "" and re.search(r"^(import|from) \w+|^\w+: ", block, re.M)
            assert not code, f"{page}: say which language this is:\n{block}"
            found += 1
    assert found >= 10


# --- Python ----------------------------------------------------------------------------------

# A test takes smaller networks, fewer steps and no downloads.
SMALLER = {
    "steps_per_epoch=100": "steps_per_epoch=1, verbose=0",
    "range(100)": "range(1)",
    "(640, 640": "(128, 128",
    "(512, 512": "(128, 128",
    "(256, 256": "(128, 128",
    "1280, 1280": "128, 128",
    "EfficientNetB7": "EfficientNetB0",
    "ResNet50": "ResNet18",
    "3), include_top=False)": "3), include_top=False, weights=None)",
    # A SpineNet takes a minute to trace.
    "import SpineNet49S": "import ResNet18",
    "ost.SpineNet49S(include_top=False, input_shape=(128, 128, 3))": (
        "ost.FPN(ost.ResNet18(include_top=False, input_shape=(128, 128, 3)), filters=16)"
    ),
    "SpineNet49S(include_top=False, input_shape=(*size, 3))": (
        "ost.FPN(ResNet18(include_top=False, input_shape=(*size, 3)), filters=16)"
    ),
    "num_classes=3)\n": "num_classes=3, num_convs=1, num_filters=8)\n",
    "num_classes=6)\n": "num_classes=6, num_convs=1, num_filters=8)\n",
    "momentum=0.9))\ntrainer.fit": "momentum=0.9), run_eagerly=True)\ntrainer.fit",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the pages speak of, in small."""
    import mini

    import official_selftrain as ost
    from official_selftrain.applications.spinenet import SpineNet49S, Variant
    from official_selftrain.data import numpy_inputs, records

    folder = tmp_path_factory.mktemp("docs")
    Image.fromarray(np.full((120, 160, 3), 90, "uint8")).save(folder / "photo.jpg")
    mini.write_boxes(folder)
    shutil.copytree(folder / "train", folder / "new")
    (folder / "labels_of_a_teacher.json").write_text((folder / "train.json").read_text())
    source = config_lib.InputConfig(
        images=str(folder / "train"), annotations=str(folder / "train.json")
    )
    images = numpy_inputs.read_records(source)
    for name in ("data/human", "labels/pseudo"):
        file = folder / f"runs/demo/{name}-00000.tfrecord"
        file.parent.mkdir(parents=True)
        records.write(str(file), images)
    backbone = SpineNet49S(
        include_top=False, input_shape=(128, 128, 3), sizes=Variant(8, 0.125, 0.5, 1)
    )
    ost.RetinaNet(backbone, num_classes=91).save(folder / "spinenet190.keras")
    return folder


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_printed(code, folder, monkeypatch):
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    monkeypatch.chdir(folder)
    if "KERAS_BACKEND" in code:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, cwd=folder, timeout=300,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


# --- YAML ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_resolves_with_the_experiment_that_it_names(text, tmp_path):
    experiment = re.search(r"--experiment=(\w+)", text)
    assert experiment, "say in a comment which experiment the file is for"
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    config = config_lib.resolve(experiment[1], str(file))
    assert config.human.given and config.unlabeled.given and config.evaluation.given


def test_tables_of_settings_are_those_of_the_config():
    fields = runpy.run_path(str(ROOT / "docs/fields.py"))
    assert "<!-- fields of SourceConfig -->" in PAGES["docs/data.md"]
    for page, text in PAGES.items():
        assert fields["filled"](text) == text, f"{page} is out of date: run python docs/fields.py"


def test_links_lead_to_files_and_headings():
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", file.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            linked = file.parent / path if path else file
            assert linked.exists(), f"{file.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
                anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert anchor in anchors, f"{file.name}: {target}"


def test_layouts_of_data_are_possible_sources():
    layouts = re.findall(r"\| `(\{images: .*\})` \|", PAGES["docs/data.md"])
    assert len(layouts) >= 8
    for layout in layouts:
        source = config_lib.model_from_dict(
            config_lib.SourceConfig, config_lib.load_yaml(layout, "docs/data.md")
        )
        assert source.given


# --- Command lines ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags_of():
    """`flags_of(command)` defines its flags, and returns their names; they go with the fixture."""
    defined = set()
    patch = pytest.MonkeyPatch()
    patch.setattr(cli, "main", lambda command: None)

    def define(command):
        forget()
        runpy.run_module(f"official_selftrain.{command}", run_name="__main__")
        return cli._own_flags()

    def forget():
        for name in defined | set(cli._own_flags()):
            if name in flags.FLAGS:
                delattr(flags.FLAGS, name)

    outside = {name: flags.FLAGS[name] for name in cli._own_flags()}
    yield define
    forget()
    for name, flag in outside.items():
        flags.FLAGS[name] = flag
    patch.undo()


def command_lines():
    """`page, command, arguments` of all command lines, those of the experiments included."""
    found = []
    for page, text in (ALL_PAGES | EXPERIMENTS).items():
        whole = re.sub(r"\\\n\s*", " ", text)
        for command, rest in re.findall(r"python -m official_selftrain\.(\w+)([^`\n]*)", whole):
            arguments = [a for a in shlex.split(rest, comments=True) if a != "..."]
            found.append((page, command, arguments))
    return found


def test_command_lines_name_flags_experiments_and_settings_that_exist(flags_of):
    lines = command_lines()
    assert len(lines) >= 10
    for page, command, arguments in lines:
        assert command in COMMANDS or command == "NAME", (page, command)
        if command == "NAME":
            continue
        flags_of(command)
        flags.FLAGS(["program", *arguments])
        given = {name: flags.FLAGS[name].value for name in cli._own_flags()}
        experiment, overrides = given.get("experiment"), given.get("params_override") or []
        if experiment and experiment not in ("...", "NAME", "list"):
            config_lib.resolve(experiment, None, overrides, given["data_dir"])
        for text in overrides:
            config_lib.parse_override(text)
        if (study := given.get("study")) and study != "list" and not study.startswith("mine.py"):
            config_lib.load_study(study)


def test_flags_of_a_source_are_its_fields(flags_of):
    flags_of("prepare_data")
    for name, field in config_lib.SourceConfig.model_fields.items():
        flag = flags.FLAGS[name]
        assert field.description in flag.help, name
        assert flag.default in (field.default, list(field.default or ())), name


def test_scripts_and_targets_that_are_called_exist():
    """With the flags that their parsers name."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    scripts = 0
    for page, text in ALL_PAGES.items():
        for target in re.findall(r"(?:`|^    )make ([a-z][\w-]*)", text, re.M):
            assert target in targets, f"{page}: no target {target}"
        called = re.findall(r"python ((?:benchmarks|examples|tests)/\S+?\.py)([^`\n#]*)", text)
        for script, rest in called:
            scripts += 1
            assert (ROOT / script).is_file(), f"{page}: {script}"
            source = (ROOT / script).read_text()
            for flag in re.findall(r"--[a-z]+", rest):
                assert flag in source, f"{page}: {script} has no flag {flag}"
    assert scripts >= 10


def test_flags_and_settings_in_the_text_exist(flags_of):
    known = {"helpfull", "help", "tensorboard", "logdir"}
    for command in COMMANDS:
        if (ROOT / f"official_selftrain/{command}.py").exists():
            known |= set(flags_of(command))
    keys = {".".join(key) for key in build.keys_of(config_lib.Config)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for page, text in PAGES.items():
        # `--beam=--runner=...` hands its value on to Beam.
        for flag in re.findall(r"(?<![=\w-])--([a-z_]+)(?![a-z_-]|\.[a-z])", text):
            assert flag in known, f"{page}: no flag --{flag}"
        for key in re.findall(r"`(?:[^`\s]*[,=\s])?([a-z_]+(?:\.[a-z_]+)+)[=`:,]", text):
            if key.partition(".")[0] in sections and not key.endswith((".py", ".json", ".md")):
                assert key in keys, f"{page}: no setting {key}"


def test_a_source_without_images_is_refused_instead_of_waited_for():
    from official_selftrain.data import numpy_inputs

    with pytest.raises(UserError, match="the stream pseudo has no image"):
        next(numpy_inputs.training_batches({"pseudo": ([], 2)}, (128, 128)))

"""What the files around the package say about versions and extras is true of setup.py."""

import pathlib
import re
import runpy
import subprocess

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement

import official_selftrain

ROOT = pathlib.Path(__file__).resolve().parents[1]


INSTALLED = "tf-cpu", "demo", "eval", "report", "tensorboard", "dev"  # by `make`


@pytest.fixture
def settings(monkeypatch):
    """What setup.py passes on."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_every_extra_that_is_named_exists(settings):
    """In messages, documents, the Makefile and the tried installations."""
    files = [*ROOT.glob("official_selftrain/**/*.py"), *ROOT.glob("docs/**/*.md")]
    named = {}
    for file in [*files, ROOT / "README.md", ROOT / "Makefile"]:
        text = file.read_text(encoding="utf-8")
        for extras in re.findall(r"(?:official_selftrain|\"\.)\[([\w,-]+)\]", text):
            named |= dict.fromkeys(extras.split(","), file)
        for extra in re.findall(r"import_extra\([^,]+, \"([\w-]+)\"", text):
            named[extra] = file
    assert {"eval", "report", "beam", "tfds", "tensorboard", "demo"} <= named.keys()
    extras = settings["extras_require"].keys()
    assert named.keys() <= extras, {name: named[name] for name in named.keys() - extras}


def test_every_requirement_says_from_which_version_on(settings):
    needs = settings["extras_require"].values()
    needs = {line for lines in needs for line in lines} | set(settings["install_requires"])
    without = {line for line in needs if not re.fullmatch(r"[\w-]+>=[\d.]+", line)}
    assert without == {"importlib-resources"}


def test_the_version_is_that_of_the_package(settings):
    assert settings["version"] == official_selftrain.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", settings["version"])


def test_the_version_can_be_cited_and_has_a_place_in_the_changelog(settings):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings["version"]
    assert citation["license"] == settings["license"]
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_wheel_says_that_it_is_typed(settings):
    assert settings["package_data"]["official_selftrain"] == ["py.typed"]
    assert (ROOT / "official_selftrain/py.typed").is_file()


def pins():
    """`{name: version}` of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            found[_normalized(requirement.name)] = pin.version
    return found


def _normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_make_installs_is_pinned_within_its_bounds(settings):
    extras = settings["extras_require"]
    needs = settings["install_requires"] + [line for name in INSTALLED for line in extras[name]]
    pinned = pins()
    for requirement in map(Requirement, needs):
        assert requirement.specifier.contains(pinned[_normalized(requirement.name)]), requirement
    assert f".[$(TF),{','.join(INSTALLED[1:])}]" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_a_commit_is_checked_by_the_versions_that_are_pinned():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    versions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in config["repos"]}
    assert versions["ruff-pre-commit"] == f"v{pins()['ruff']}"
    assert versions["codespell"] == f"v{pins()['codespell']}"


def test_every_python_of_the_metadata_is_tested(settings):
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    prefix = "Programming Language :: Python :: 3."
    stated = [line[len(prefix) - 2 :] for line in settings["classifiers"] if prefix in line]
    assert stated == workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert settings["python_requires"] == f">={stated[0]}"


def test_make_check_names_tests_that_exist():
    command = ["make", "--dry-run", "--old-file=.venv/ready", "check"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = re.findall(r"tests/[\w/.]+", printed)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []

"""What is said about the installation is true of setup.py."""

import pathlib
import re
import runpy

import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[1]


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

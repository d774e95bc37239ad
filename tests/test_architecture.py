"""Imports point downwards; an alarm for drift, to be changed when a better cut is found."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "official_selftrain"
COMMANDS = {
    "train", "run", "pseudo_label", "evaluate", "prepare_data", "report", "export",
    "convert_checkpoint",
}  # fmt: skip

# What each module may import from inside the package; a name also allows what lies in it.
ALLOWED = {
    "__init__": {"*"},
    "errors": set(),
    "extras": {"errors"},
    "config": {"errors", "files"},
    "replicas": set(),
    "self_training": {"errors", "replicas"},
    "distribution": {"errors"},
    "loop": {"errors", "extras"},
    "training": {
        "applications", "checkpoints", "config", "data", "errors", "files", "loop", "memory",
        "optimization",
        "released", "self_training", "tasks", "teacher",
    },
    "losses": set(),
    "memory": set(),
    "metrics": {"errors"},
    "optimization": set(),
    "checkpoints": {"errors", "files"},
    "ops": {"ops"},
    "applications": {"applications", "errors", "replicas"},
    "models": {"applications", "models"},
    "files": {"errors"},
    "data": {"data", "config", "errors", "files", "metrics"},
    "tasks": {
        "losses", "metrics", "applications", "models", "ops", "config", "data", "tasks", "errors",
    },
    "teacher": {"checkpoints", "config", "data", "distribution", "errors", "files", "tasks"},
    "visualize": {"config", "data"},
    "released": {"applications", "models", "config", "errors"},
    "serving": {"tasks", "data", "ops", "config", "errors", "files"},
    "cli": {"config", "errors"},
    "preflight": {"data", "errors", "loop", "training", "visualize"},
    "runner": {"*"},
}  # fmt: skip


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(PACKAGE.name + "."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_imports_point_downwards(file):
    module = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if module in COMMANDS:
        return
    names = set(imported(ast.parse(file.read_text())))
    allowed = ALLOWED[module] | ({"extras"} if "errors" in ALLOWED[module] else set())
    assert "*" in allowed or names <= allowed, f"{module} imports {names - allowed}"
    assert not names & (COMMANDS - {"report"}), f"{module} imports a command"


@pytest.mark.parametrize("folder", ["ops", "models", "applications"])
def test_networks_and_ops_do_not_import_tensorflow(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        assert "tensorflow" not in file.read_text(), file
    assert "tensorflow" not in (PACKAGE / "losses.py").read_text()

"""The layers of the package: what lies in one imports from itself and from those below."""

import ast
import pathlib
import runpy

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "official_selftrain"
LAYERS = (
    {"utils"},
    {"ops"},
    {"config"},
    {"engine"},
    {"applications", "data"},
    {"models", "evaluation", "self_training"},
    {"tasks"},
    {"teacher", "conversion"},
    {"pipeline"},
    {"studies"},
    {"cli"},
    {
        "train", "run", "pseudo_label", "evaluate", "prepare_data", "report", "export",
        "convert_checkpoint", "study",
    },
    {"__init__"},
)  # fmt: skip
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def part(file):
    """The folder or module of the package's root in which a file lies."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def module(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(file): file for file in PACKAGE.rglob("*.py")}


def imported(file):
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == PACKAGE.name:
                yield rest if rest in FILES else rest.rpartition(".")[0]


def test_every_module_has_a_layer():
    assert {part(file) for file in FILES.values()} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_downwards(name):
    here = part(FILES[name])
    for other in imported(FILES[name]):
        there = part(FILES[other])
        assert there == here or LEVEL[there] < LEVEL[here], f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: set(imported(file)) for name, file in FILES.items()}

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    done = set()
    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("folder", ["ops", "models", "applications"])
def test_networks_and_ops_do_not_import_tensorflow(folder):
    for file in (PACKAGE / folder).rglob("*.py"):
        assert "tensorflow" not in file.read_text(), file


def test_the_house_is_kept():
    """What docs/architecture.md says of the package; a limit is never raised to fit the code."""
    numbers = runpy.run_path(str(PACKAGE.parent / "benchmarks/house.py"))["measure"]()
    # One for each of nine commands, and four for the rest.
    assert numbers["modules at the root"] <= 13
    assert numbers["lines of self_training.py"] <= 210
    assert numbers["lines of the longest function"] <= 60
    assert numbers["percent of them with a docstring"] >= 95
    assert numbers["percent of them with all types"] == 100
    assert numbers["comments per 100 lines of code"] >= 4
    assert numbers["calls that make devices, in pipeline/"] == 1

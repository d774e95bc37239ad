"""What `import official_selftrain` offers to people and to their editors."""

import ast
import importlib
import pathlib
import types

import pytest

import official_selftrain as ost

INIT = pathlib.Path(ost.__file__)


def names_for_editors():
    """`{module: names}` of the imports that only editors and type checkers follow."""
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and "TYPE" in ast.dump(node.test)
    )
    return {node.module: {alias.name for alias in node.names} for node in block.body}


def test_editors_see_the_names_that_can_be_imported():
    found = names_for_editors()
    package = importlib.import_module("official_selftrain.applications")
    assert found.pop("official_selftrain.applications") == {"*"}
    assert set(package.__all__) | {n for names in found.values() for n in names} == set(ost.__all__)
    for module, names in found.items():
        for name in names:
            assert getattr(ost, name) is getattr(importlib.import_module(module), name)


def test_dir_shows_what_there_is_and_nothing_else():
    shown = [name for name in dir(ost) if not name.startswith("__")]
    assert shown == sorted(ost.__all__) and len(shown) == len(set(shown))
    assert {"run", "train", "evaluate", "pseudo_label", "load_experiment", "SpineNet49"} <= set(
        shown
    )


@pytest.mark.parametrize("verb", ["run", "train", "evaluate", "pseudo_label"])
def test_a_verb_stays_a_function_when_its_command_is_imported(verb):
    command = importlib.import_module(f"official_selftrain.{verb}")
    assert isinstance(command, types.ModuleType) and callable(command.main)
    assert isinstance(getattr(ost, verb), types.FunctionType)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SpineNet50'"):
        _ = ost.SpineNet50


def test_an_experiment_is_loaded_with_changes_and_checked():
    config = ost.load_experiment("demo", "trainer.steps=700", data_dir="here")
    assert isinstance(config, ost.Config) and config.trainer.steps == 700
    assert pathlib.Path(config.data_dir) == pathlib.Path("here").absolute()
    with pytest.raises(ost.UserError, match="did you mean 'demo'"):
        ost.load_experiment("dmo")
    with pytest.raises(ost.UserError, match="mean 'steps'"):
        ost.load_experiment("demo", "trainer.stps=1")


@pytest.mark.parametrize("settings", [ost.DetectionTask, ost.DetectionConfig, ost.SegmentationTask])
def test_a_misspelled_setting_in_python_is_answered_with_the_nearest_name(settings):
    with pytest.raises(ost.UserError, match="num_clases.* did you mean 'num_classes'"):
        settings(num_clases=91)

"""Finds and loads experiments, and resolves a command line to a checked config."""

import os
import pathlib
import runpy
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from official_selftrain.config.build import Layers, model_from_dict
from official_selftrain.config.overrides import check_depth, load_file, merge, parse_override
from official_selftrain.config.schema import Config
from official_selftrain.config.stages import teacher_config
from official_selftrain.utils.errors import UserError, did_you_mean, one_line, or_nearest, short
from official_selftrain.utils.types import StrPath

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
PLACES = {"records", "images", "annotations", "masks", "tfds", "builtin"}  # keys of a source
EXPERIMENT_FOLDERS = (PACKAGE / "experiments", PACKAGE.parent / "experiments")


def config_from_dict(values: Any, origin: str | Layers | None = None) -> Config:
    """Builds a `Config` from nested dicts; see `model_from_dict`."""
    return model_from_dict(Config, values, origin)


def load(path: StrPath) -> Config:
    """Loads the checked `Config` of a complete file, such as the `config.yaml` of a run.

    Raises:
        UserError: if the file cannot be read, or a setting in it is wrong.
    """
    return config_from_dict(load_file(path), str(path))


def experiment_folder() -> pathlib.Path:
    """The folder of experiment files: inside the package if installed, beside it in a checkout."""
    for folder in EXPERIMENT_FOLDERS:
        if folder.is_dir():
            return folder
    raise UserError(
        f"found no folder of experiments: neither {' nor '.join(map(str, EXPERIMENT_FOLDERS))}"
    )


def load_experiments(path: StrPath | None = None) -> dict[str, dict[str, Any]]:
    """`{name: nested dicts}` of one file, or by default of all files that come with the package.

    The files are Python and are executed, so load only those of people you trust.

    Raises:
        UserError: with file and line if a file cannot be executed, or if its `EXPERIMENTS` is not
            `{name: settings}`.
    """
    found = _entries("EXPERIMENTS", path)
    return {name: {"experiment": name, **values} for name, (_, values) in found.items()}


def load_studies(path: StrPath | None = None) -> dict[str, dict[str, Any]]:
    """`{name: nested dicts}` of the `STUDIES` of the same files; see `load_experiments`.

    An experiment that a study names is looked for in the file of the study first.
    """
    studies: dict[str, dict[str, Any]] = {}
    for name, (file, values) in _entries("STUDIES", path).items():
        beside = _execute(file).get("EXPERIMENTS", {}) if path else {}
        study = {"study": name, **values}
        variants = study.get("variants")
        if isinstance(variants, dict):
            variants = {key: _from_file(file, beside, value) for key, value in variants.items()}
            study["variants"] = variants
        studies[name] = _from_file(file, beside, study)
    return studies


def _from_file(file: pathlib.Path, known: Any, values: Any) -> Any:
    """Settings whose experiment, if it is one of the `known`, is named with its file."""
    if isinstance(values, dict) and isinstance(known, dict) and values.get("experiment") in known:
        return {**values, "experiment": f"{file}:{values['experiment']}"}
    return values


def _entries(variable: str, path: StrPath | None) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    """`{name: (file, settings)}` of a variable of one file, or of all of the package."""
    files = [pathlib.Path(path)] if path else sorted(experiment_folder().glob("[!_]*.py"))
    kind = {"EXPERIMENTS": "experiment", "STUDIES": "study"}[variable]
    entries: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}
    for file in files:
        # Every file that comes with the package has experiments, but not all have studies.
        optional = variable == "STUDIES" and not path
        found = _execute(file).get(variable, {} if optional else None)
        if not isinstance(found, dict):
            raise UserError(
                f"{file} must define {variable}, a dict of names and settings; it is "
                f"{'missing' if found is None else short(found)}"
            )
        for name, values in found.items():
            if not isinstance(name, str) or not isinstance(values, dict):
                raise UserError(
                    f"{file}: {variable} must be a dict of names and settings; the value of "
                    f"{short(name)} is {short(values)}"
                )
            if name in entries:
                many = {"experiment": "experiments", "study": "studies"}[kind]
                raise UserError(f"two {many} are named {name!r}; the second one is in {file}")
            check_depth(values, f"{file}, {kind} {name!r}")
            entries[name] = file, values
    return entries


def _execute(file: pathlib.Path) -> dict[str, Any]:
    """Executes a Python file; returns its variables."""
    if not file.is_file():
        beside = file.parent.glob("*.py") if file.parent.is_dir() else ()
        hint = or_nearest(file.name, [other.name for other in beside])
        raise UserError(f"the experiment file {file} does not exist{hint}")
    try:
        return runpy.run_path(str(file))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}, is not valid Python: {error.msg}") from None
    except (Exception, SystemExit) as error:  # whatever the code of a user does
        # The innermost frame of the file itself, which may have called a library.
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), None)
        where = f"{file}, line {line}" if line else str(file)
        reason = one_line(f"{type(error).__name__}: {error}", None)
        raise UserError(f"{where}, cannot be executed: {reason}") from None


def experiment_settings(name: str) -> dict[str, Any]:
    """Loads the nested dicts of an experiment.

    Args:
        name: its name, or `FILE.py:NAME`, which executes the file.

    Raises:
        UserError: if there is no such experiment, with the nearest name.
    """
    return _named(name, load_experiments, "experiment")


def study_settings(name: str) -> dict[str, Any]:
    """Loads the nested dicts of a study; see `experiment_settings`."""
    return _named(name, load_studies, "study")


def _named(
    name: str, entries: Callable[[StrPath | None], dict[str, dict[str, Any]]], kind: str
) -> dict[str, Any]:
    path, _, wanted = name.rpartition(":") if ".py:" in name else ("", "", name)
    if name.endswith(".py"):
        known = ", ".join(f"{name}:{other}" for other in entries(name))
        raise UserError(
            f"{name} names a file, but no {kind} in it; use --{kind}=FILE.py:NAME, one of: "
            f"{known or 'none'}"
        )
    found = entries(path or None)
    if wanted not in found:
        hint = did_you_mean(wanted, list(found))
        where = f" in {path}" if path else ""
        more = "" if path else f"; --{kind}=list shows all"
        raise UserError(f"no {kind} is named {wanted!r}{where}{hint}{more}")
    return found[wanted]


def load_experiment(name: str, *overrides: str, data_dir: StrPath | None = None) -> Config:
    """Loads an experiment, with changes, for `run` or `train`.

    Args:
        name: its name, or `FILE.py:NAME`, which executes the file.
        overrides: settings that replace those of the experiment, such as `"trainer.steps=100"`.
        data_dir: folder at which relative paths of the data start.

    Raises:
        UserError: if there is no such experiment, or for a wrong setting, with the nearest name.
    """
    return resolve(name, None, overrides, data_dir)


def resolve(
    experiment: str | None = None,
    config_file: StrPath | None = None,
    overrides: Iterable[str] = (),
    data_dir: StrPath | None = None,
) -> Config:
    """Resolves a command line to a checked config. Later arguments win over earlier ones.

    Args:
        experiment: see `experiment_settings`.
        config_file: YAML or JSON file; without an experiment it must be complete.
        overrides: texts as `parse_override` takes them.
        data_dir: folder at which relative paths of the data start.

    Raises:
        UserError: one line for all mistakes, each with the file or flag that it is in.
    """
    if not experiment and not config_file:
        raise UserError(
            "no experiment is given: use --experiment=NAME (--experiment=list shows all) or "
            "--config_file=FILE"
        )
    layers: list[tuple[str, dict[str, Any]]] = []
    if experiment:
        layers.append((f"experiment {experiment!r}", experiment_settings(experiment)))
    if config_file:
        layers.append((str(config_file), load_file(config_file)))
    for text in overrides:
        layers.append((f"--params_override {short(text)}", parse_override(text)))
    return resolve_layers(layers, data_dir)


def _names_evaluation(values: dict[str, Any]) -> bool:
    """Whether a user names evaluation images, which then have to exist, unlike a recipe's."""
    named = values.get("evaluation")
    if not isinstance(named, dict) or "from_labeled" in named:
        return False
    return any(named.get(key) for key in PLACES)


def resolve_layers(
    layers: Iterable[tuple[str, dict[str, Any]]], data_dir: StrPath | None = None
) -> Config:
    """A checked config of `(name, nested dicts)` pairs, the later on top of the earlier ones.

    Raises:
        UserError: one line for all mistakes, each with the name of its pair.
    """
    layers = list(layers)
    if data_dir:
        layers.append(("--data_dir", {"data_dir": os.path.abspath(data_dir)}))
    merged: dict[str, Any] = {}
    for number, (_, values) in enumerate(layers):
        merged = merge(merged, values)
        if number and _names_evaluation(values):
            merged = merge(merged, {"evaluation": {"from_labeled": None}})
    config = config_from_dict(merged, layers)
    try:
        teacher_config(config)  # its overrides would otherwise be checked only when it trains
    except UserError as error:
        raise UserError(f"self_training.teacher: {error}") from None
    return config

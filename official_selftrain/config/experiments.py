"""Finds and loads experiments, and resolves a command line to a checked config."""

import os
import pathlib
import runpy
import traceback
from collections.abc import Iterable
from typing import Any

from official_selftrain.config.build import Layers, model_from_dict
from official_selftrain.config.overrides import check_depth, load_file, merge, parse_override
from official_selftrain.config.schema import Config
from official_selftrain.config.stages import teacher_config
from official_selftrain.utils.errors import UserError, did_you_mean, one_line, or_nearest, short
from official_selftrain.utils.types import StrPath

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
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
    files = [pathlib.Path(path)] if path else sorted(experiment_folder().glob("[!_]*.py"))
    experiments: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, values in _execute(file).items():
            if not isinstance(name, str) or not isinstance(values, dict):
                raise UserError(
                    f"{file}: EXPERIMENTS must be a dict of names and settings; the value of "
                    f"{short(name)} is {short(values)}"
                )
            if name in experiments:
                raise UserError(f"two experiments are named {name!r}; the second one is in {file}")
            check_depth(values, f"{file}, experiment {name!r}")
            experiments[name] = {"experiment": name, **values}
    return experiments


def _execute(file: pathlib.Path) -> dict[Any, Any]:
    """Executes a Python file; returns its `EXPERIMENTS`."""
    if not file.is_file():
        beside = file.parent.glob("*.py") if file.parent.is_dir() else ()
        hint = or_nearest(file.name, [other.name for other in beside])
        raise UserError(f"the experiment file {file} does not exist{hint}")
    try:
        found = runpy.run_path(str(file))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}, is not valid Python: {error.msg}") from None
    except (Exception, SystemExit) as error:  # whatever the code of a user does
        # The innermost frame of the file itself, which may have called a library.
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == str(file)), None)
        where = f"{file}, line {line}" if line else str(file)
        reason = one_line(f"{type(error).__name__}: {error}", None)
        raise UserError(f"{where}, cannot be executed: {reason}") from None
    experiments = found.get("EXPERIMENTS")
    if not isinstance(experiments, dict):
        raise UserError(
            f"{file} must define EXPERIMENTS, a dict of names and settings; it is "
            f"{'missing' if experiments is None else short(experiments)}"
        )
    return experiments


def experiment_settings(name: str) -> dict[str, Any]:
    """Loads the nested dicts of an experiment.

    Args:
        name: its name, or `FILE.py:NAME`, which executes the file.

    Raises:
        UserError: if there is no such experiment, with the nearest name.
    """
    path, _, wanted = name.rpartition(":") if ".py:" in name else ("", "", name)
    if name.endswith(".py"):
        known = ", ".join(f"{name}:{other}" for other in load_experiments(name))
        raise UserError(
            f"{name} names a file, but no experiment in it; use --experiment=FILE.py:NAME, one of: "
            f"{known or 'none'}"
        )
    experiments = load_experiments(path or None)
    if wanted not in experiments:
        hint = did_you_mean(wanted, list(experiments))
        where = f" in {path}" if path else ""
        more = "" if path else "; --experiment=list shows all"
        raise UserError(f"no experiment is named {wanted!r}{where}{hint}{more}")
    return experiments[wanted]


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
    if data_dir:
        layers.append(("--data_dir", {"data_dir": os.path.abspath(data_dir)}))
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged = merge(merged, values)
    config = config_from_dict(merged, layers)
    try:
        teacher_config(config)  # its overrides would otherwise be checked only when it trains
    except UserError as error:
        raise UserError(f"self_training.teacher: {error}") from None
    return config

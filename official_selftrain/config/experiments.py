"""Experiments: where they are found, and the checked config of a command line."""

import functools
import os
import pathlib
import runpy
import traceback

from official_selftrain.config.build import model_from_dict
from official_selftrain.config.overrides import check_depth, load_file, merge, parse_override
from official_selftrain.config.schema import Config
from official_selftrain.config.stages import teacher_config
from official_selftrain.utils.errors import UserError, did_you_mean, one_line, or_nearest, short

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENT_FOLDERS = (PACKAGE / "experiments", PACKAGE.parent / "experiments")


def config_from_dict(values, origin=None):
    """Builds a `Config` from nested dicts; see `model_from_dict`."""
    return model_from_dict(Config, values, origin)


def load(path):
    """The checked `Config` of a file that is complete, such as the `config.yaml` of a run."""
    return config_from_dict(load_file(path), str(path))


def experiment_folder():
    """The folder of experiment files: inside a wheel, or beside the package in a checkout."""
    for folder in EXPERIMENT_FOLDERS:
        if folder.is_dir():
            return folder
    raise UserError(f"no experiments found in {' or '.join(map(str, EXPERIMENT_FOLDERS))}")


def load_experiments(path=None):
    """`{name: nested dicts}` of one file, or of all files that come with the package.

    The files are Python and are executed: load those of people you trust.

    Raises:
        UserError: one line with file and line if one cannot be executed, or its `EXPERIMENTS` is
            not `{name: settings}`.
    """
    files = [pathlib.Path(path)] if path else sorted(experiment_folder().glob("[!_]*.py"))
    experiments = {}
    for file in files:
        for name, values in _execute(file).items():
            if not isinstance(name, str) or not isinstance(values, dict):
                raise UserError(
                    f"{file}: EXPERIMENTS must be a dict of names and settings; {short(name)} is "
                    f"{short(values)}"
                )
            if name in experiments:
                raise UserError(f"two experiments are called {name!r}; the second is in {file}")
            check_depth(values, f"{file}, experiment {name!r}")
            experiments[name] = {"experiment": name, **values}
    return experiments


def _execute(file):
    """The `EXPERIMENTS` of a Python file."""
    if not file.is_file():
        beside = file.parent.glob("*.py") if file.parent.is_dir() else ()
        hint = or_nearest(file.name, [other.name for other in beside])
        raise UserError(f"the experiment file {file} does not exist{hint}")
    try:
        found = runpy.run_path(str(file))
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}, is not valid Python: {error.msg}") from None
    except (Exception, SystemExit) as error:
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


def load_experiment(name):
    """The nested dicts of an experiment: `name`, or `FILE.py:name`, which executes the file."""
    path, _, wanted = name.rpartition(":") if ".py:" in name else ("", "", name)
    if name.endswith(".py"):
        known = ", ".join(f"{name}:{other}" for other in load_experiments(name))
        raise UserError(f"--experiment=FILE.py:NAME says which one of the file: {known or 'none'}")
    experiments = load_experiments(path or None)
    if wanted not in experiments:
        hint = did_you_mean(wanted, list(experiments))
        where = f" in {path}" if path else ""
        more = "" if path else "; --experiment=list shows all"
        raise UserError(f"no experiment is called {wanted!r}{where}{hint}{more}")
    return experiments[wanted]


def resolve(experiment=None, config_file=None, overrides=(), data_dir=None):
    """The checked config of a command line.

    Raises:
        UserError: one line for all mistakes, each with the file or flag that it is in.
    """
    if not experiment and not config_file:
        raise UserError("say what to run: --experiment=NAME (`list` shows all) or --config_file")
    layers = []
    if experiment:
        layers.append((f"experiment {experiment!r}", load_experiment(experiment)))
    if config_file:
        layers.append((str(config_file), load_file(config_file)))
    for text in overrides:
        layers.append((f"--params_override {short(text)}", parse_override(text)))
    if data_dir:
        layers.append(("--data_dir", {"data_dir": os.path.abspath(data_dir)}))
    config = config_from_dict(functools.reduce(merge, (values for _, values in layers), {}), layers)
    try:
        teacher_config(config)
    except UserError as error:
        raise UserError(f"self_training.teacher: {error}") from None
    return config

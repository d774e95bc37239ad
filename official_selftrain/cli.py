"""Flags shared by the commands, logging, and how errors are shown."""

import logging
import os
import signal
import sys
import warnings

from absl import app, flags

from official_selftrain import config as config_lib
from official_selftrain.errors import Stopped, UserError

FLAGS = flags.FLAGS


def define_flags(model_dir_help="folder of the run; made if missing, resumed if not"):
    """The flags that every command has."""
    flags.DEFINE_string("experiment", None, "name of an experiment, FILE.py:NAME, or `list`")
    flags.DEFINE_string("config_file", None, "YAML or JSON file on top of the experiment")
    flags.DEFINE_multi_string(
        "params_override", [], "a.b=1,c=[1,2], inline YAML or a file, on top of both; repeatable"
    )
    flags.DEFINE_string("model_dir", None, model_dir_help)
    flags.DEFINE_string("data_dir", None, "folder that relative data paths start from")
    flags.DEFINE_enum(
        "strategy", None, config_lib.STRATEGIES, "what it runs on, runtime.strategy: docs/scale.md"
    )
    flags.DEFINE_string("tpu", None, "name or address of a TPU, or `local`, with --strategy=tpu")


def config_from_flags(needs_folder=True, folder=None):
    """The resolved config; with `--experiment=list` prints all and leaves.

    Args:
        needs_folder: insist on --model_dir.
        folder: whose config.yaml is taken where no flag names a config; None takes --model_dir.
    """
    if FLAGS.experiment == "list":
        print(listing())
        sys.exit(0)
    config_file = FLAGS.config_file
    folder = folder or FLAGS.model_dir
    if not FLAGS.experiment and not config_file and folder:
        saved = os.path.join(folder, "config.yaml")
        config_file = saved if os.path.exists(saved) else None
    overrides = list(FLAGS.params_override)
    for flag in ("strategy", "tpu"):
        if FLAGS[flag].value is not None:
            overrides.append(f"runtime.{flag}={FLAGS[flag].value!r}")
    config = config_lib.resolve(FLAGS.experiment, config_file, overrides, FLAGS.data_dir)
    if config.runtime.strategy == "jax":
        os.environ["KERAS_BACKEND"] = "jax"  # Keras, which reads it, is not imported yet
    if needs_folder and not FLAGS.model_dir:
        raise UserError(
            f"give --model_dir, the folder for this run, such as runs/{config.experiment}"
        )
    return config


def image_size(text):
    """`(height, width)` from "640" or "512,768"; None stays None."""
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise UserError(f"--image_size takes SIDE or HEIGHT,WIDTH in pixels; given {text!r}")
    return int(sides[0]), int(sides[-1])


def listing():
    """One line an experiment: name, published AP, description."""
    rows = []
    for name, values in config_lib.load_experiments().items():
        published = values.get("published")
        rows.append((name, "" if published is None else f"{published:.1f}", values["description"]))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'experiment':<{width}}  published  description"]
    lines += [f"{name:<{width}}  {ap:>9}  {text}" for name, ap, text in rows]
    return "\n".join(lines)


def main(command):
    """Runs a command; a `UserError` becomes one line and exit status 2.

    Args:
        command: function without arguments, called when flags are parsed.
    """

    def run(arguments):
        _set_up_logging()
        signal.signal(signal.SIGTERM, _end)
        try:
            if len(arguments) > 1:
                raise UserError(f"unexpected argument {arguments[1]!r}; flags are --name=value")
            command()
        except (UserError, OSError) as error:  # OSError: a full disk, a folder without permission
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(128 + stopped.signal)
        except KeyboardInterrupt as interrupted:
            print(str(interrupted) or f"Ctrl-C: {GOES_ON}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    app.run(run)


GOES_ON = "what was finished is kept; the same command goes on there, a training at its checkpoint"


def _end(number, _):
    raise Stopped(f"SIGTERM: {GOES_ON}", number)


def _set_up_logging():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=UserWarning, module="keras")
    logging.getLogger().setLevel(logging.INFO)


def print_metrics(name, metrics):
    """The headline of an evaluation."""
    if metrics:
        names = [key for key in metrics if "/" not in key][:3]
        line = ", ".join(f"{key} {100 * metrics[key]:.1f}" for key in names)
        print(f"{name}: {line}")


def print_rows(rows):
    """Lines of (name, text)."""
    print("\n".join(f"{name}: {text}" for name, text in rows))

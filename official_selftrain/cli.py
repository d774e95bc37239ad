"""Flags shared by the commands, logging, and how errors are shown."""

import io
import logging
import os
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings

from absl import app, flags
from absl import logging as absl_logging

from official_selftrain import config as config_lib
from official_selftrain.utils.errors import (
    TrainingInterrupted,
    UserError,
    did_you_mean,
    one_line,
    printable,
)

FLAGS = flags.FLAGS

BACKENDS = {"tensorflow": "tf-cpu", "jax": "jax"}  # the extra that brings it


def define_flags(model_dir_help="folder of the run; made if missing, resumed if not"):
    """The flags that every command has."""
    flags.DEFINE_string(
        "experiment",
        None,
        "name of an experiment, FILE.py:NAME, or `list`. FILE.py is Python and is executed",
    )
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
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise UserError(f"--image_size takes SIDE or HEIGHT,WIDTH in pixels; given {text!r}")
    size = int(sides[0]), int(sides[-1])
    if not all(0 < side <= config_lib.MAX_SIDE for side in size):
        raise UserError(
            f"--image_size takes sides from 1 to {config_lib.MAX_SIDE} pixels; given {text!r}"
        )
    return size


def listing():
    """One line an experiment: name, published AP, description."""
    rows = []
    for name, values in config_lib.load_experiments().items():
        published = values.get("published")
        number = f"{published:.1f}" if isinstance(published, (int, float)) else ""
        rows.append((name, number, str(values.get("description", ""))))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'experiment':<{width}}  published  description"]
    lines += [f"{name:<{width}}  {ap:>9}  {text}" for name, ap, text in rows]
    return "\n".join(lines)


def main(command):
    """Runs a command, and ends the process with its exit status.

    A mistake in what was given is one line and status 2, an error of this package one line and
    status 1; its stack trace is in a file that the line names.

    Args:
        command: function without arguments, called when flags are parsed.
    """
    _set_up_output()
    try:
        status = _run(command)
        sys.stdout.flush()
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _run(command):
    def run(arguments):
        _set_up_logging()
        signal.signal(signal.SIGTERM, _end)
        if len(arguments) > 1:
            raise UserError(f"unexpected argument {arguments[1]!r}; flags are --name=value")
        command()

    try:
        app.run(run, flags_parser=_parse)
    except SystemExit as end:
        return end.code
    except BrokenPipeError:
        raise
    except (UserError, flags.Error, OSError) as error:  # OSError: a full disk, no permission
        return _tell(f"error: {error}", 2)
    except MemoryError:
        return _tell(
            "error: the memory of this machine is not enough; take a smaller batch_size, "
            "image_size or shuffle_buffer, or fewer workers",
            2,
        )
    except ImportError as error:
        package = _backend_of(error)
        if package is None:
            return _internal(error)
        return _tell(
            f"error: {package} is not installed, or broken ({error}): pip install "
            f"'official_selftrain[{BACKENDS[package]}]'",
            2,
        )
    except TrainingInterrupted as stopped:
        return _tell(stopped, 128 + stopped.signal)
    except KeyboardInterrupt as interrupted:
        return _tell(str(interrupted) or f"Ctrl-C: {GOES_ON}", 128 + signal.SIGINT)
    except Exception as error:  # the last net
        return _internal(error)
    return 0


def _backend_of(error):
    """The backend that an ImportError names, or that raised it when this package imported it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [frame.f_globals.get("__name__", "").split(".")[0] for frame in frames]
    ours = [i for i, name in enumerate(packages) if name in ("official_selftrain", "__main__")]
    beyond = packages[max(ours, default=-1) + 1 :]  # the fault of what our last frame imported
    names = [(error.name or "").split(".")[0], *beyond]
    return next((name for name in names if name in BACKENDS), None)


def _tell(message, status):
    print(printable(message), file=sys.stderr)
    return status


def _internal(error):
    """Tells of an error that is none of the user's."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="official_selftrain-", suffix=".txt", delete=False, errors="replace"
        ) as file:
            file.write(trace)
        kept = f"the stack trace is in {file.name}"
    except OSError:
        print(trace, file=sys.stderr)
        kept = "the stack trace is above"
    reason = f"{type(error).__name__}: {str(error)[:300]}"
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return _tell(f"internal error at {place}: {reason}; {kept}; please report it", 1)


# --- Flags -----------------------------------------------------------------------------------


def _parse(arguments):
    """Parses flags; `--help` shows those of the command alone.

    Raises:
        UserError: for a flag that does not exist, with the nearest, or a value that is not one.
    """
    for argument in arguments[1:]:
        if argument == "--":
            break
        if argument in ("--help", "-help", "-h", "--h", "-?", "--help=true"):
            print(_help())
            sys.exit(0)
    try:
        return FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        hint = did_you_mean(f"--{error.flagname}", [f"--{f}" for f in _own_flags()])
        raise UserError(f"unknown flag --{error.flagname}{hint}") from None
    except flags.Error as error:
        raise UserError(one_line(error, None)) from None


def _own_flags():
    """The names of the flags that the command defines, in order of definition."""
    return [
        flag.name
        for module, defined in FLAGS.flags_by_module_dict().items()
        if not module.startswith("absl")
        for flag in defined
    ]


def _help():
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for name in _own_flags():
        flag = FLAGS[name]
        kind = "" if flag.boolean else "=..."
        text = (flag.help or "").split(";\n")[0]  # absl adds that a list may be repeated
        if getattr(flag.parser, "enum_values", None):
            text = f"{'|'.join(flag.parser.enum_values)}: {text}"
        if flag.default not in (None, [], "", False):
            text += f" (default: {flag.default})"
        lines.append(f"  --{name}{kind}")
        lines += textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", "--helpfull shows those of absl too."])


# --- Terminal --------------------------------------------------------------------------------


class _Printable(io.TextIOWrapper):
    """An output in which only line breaks and tabs control anything."""

    def write(self, text):
        shown = "\n".join(
            "\t".join(printable(cell) for cell in line.split("\t")) for line in text.split("\n")
        )
        super().write(shown)
        return len(text)


class _Formatter(logging.Formatter):
    """Time and message of a log line; stack traces follow in lines of their own."""

    def format(self, record):
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        time = self.formatTime(record, "%H:%M:%S")
        line = f"{time} {level}{printable(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "\n" + "\n".join(map(printable, trace.split("\n")))
        return line


def _set_up_output():
    """Standard output cannot fail for a name that its encoding lacks."""
    out = sys.stdout
    if type(out) is io.TextIOWrapper:
        buffering, encoding = out.line_buffering, out.encoding
        sys.stdout = _Printable(
            out.detach(), encoding, "backslashreplace", line_buffering=buffering
        )


GOES_ON = "what was finished is kept; the same command goes on there, a training at its checkpoint"


def _end(number, _):
    raise TrainingInterrupted(f"SIGTERM: {GOES_ON}", number)


def _set_up_logging():
    warnings.filterwarnings("ignore", category=UserWarning, module="keras")
    absl_logging.get_absl_handler().setFormatter(_Formatter())
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

"""Flags that the commands share, their help, logging, and how errors are shown.

Imports in the modules of the commands follow one rule: the standard library, `cli`, `config` and
`utils` are imported at the top; whatever imports Keras or TensorFlow is imported inside `main`,
after the flags and the config have been checked. Help, a list of experiments and an answer to a
misspelled flag then take half a second and not half a minute.
"""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from official_selftrain import config as config_lib
from official_selftrain.utils.errors import (
    TrainingInterrupted,
    UserError,
    did_you_mean,
    nearest,
    one_line,
    or_nearest,
    printable,
)

FLAGS = flags.FLAGS

BACKENDS = {"tensorflow": "tf-cpu", "jax": "jax"}  # package: the extra that installs it
WIDTH = 100  # columns of the help


def define_flags(
    model_dir_help: str = "Folder of the run. It is created if it is missing; a run that it holds "
    "is resumed. Example: runs/demo",
    experiment: bool = True,
) -> None:
    """Defines the flags that every command has; without `experiment`, another flag names it."""
    with group("Experiment"):
        if experiment:
            flags.DEFINE_string(
                "experiment",
                None,
                "Name of an experiment, or FILE.py:NAME for one of your own; `list` prints all "
                "names. A FILE.py is executed as Python. Example: demo",
            )
            flags.DEFINE_string(
                "config_file",
                None,
                "YAML or JSON file whose settings replace those of the experiment. "
                "Example: mine.yaml",
            )
        flags.DEFINE_multi_string(
            "params_override",
            [],
            "Settings that replace those of the experiment and of --config_file: a list such as "
            "a.b=1,c=[1,2], inline YAML, or a YAML file. Example: trainer.steps=1000",
        )
        flags.DEFINE_string(
            "data_dir", None, "Folder that relative paths of data start from. Example: data"
        )
    with group("Run folder"):
        flags.DEFINE_string("model_dir", None, model_dir_help)
    with group("Devices"):
        flags.DEFINE_enum(
            "strategy",
            None,
            config_lib.STRATEGIES,
            "How the work is distributed over devices; sets runtime.strategy, which is described "
            "in docs/scale.md. Example: mirrored",
        )
        flags.DEFINE_string(
            "tpu",
            None,
            "Name or address of a TPU, or `local`; used with --strategy=tpu. Example: local",
        )


def config_from_flags(
    needs_folder: bool = True, folder: str | os.PathLike | None = None
) -> config_lib.Config:
    """The resolved config. With `--experiment=list` it prints all experiments and exits.

    Args:
        needs_folder: whether --model_dir is required.
        folder: folder whose config.yaml is used if no flag names a config; --model_dir by default.

    Raises:
        UserError: if a flag is missing or the config is invalid.
    """
    if FLAGS.experiment == "list":
        print(listing())
        sys.exit(0)
    config_file = FLAGS.config_file
    folder = folder or FLAGS.model_dir
    if not FLAGS.experiment and not config_file and folder:
        saved = os.path.join(folder, "config.yaml")
        config_file = saved if os.path.exists(saved) else None
    config = config_lib.resolve(FLAGS.experiment, config_file, overrides(), FLAGS.data_dir)
    if config.runtime.strategy == "jax":
        os.environ["KERAS_BACKEND"] = "jax"  # Keras, which reads it, is not imported yet
    if needs_folder:
        require("model_dir")
    return config


def overrides() -> list[str]:
    """The settings that flags give, as `parse_override` takes them."""
    given = list(FLAGS.params_override)
    for flag in ("strategy", "tpu"):
        if FLAGS[flag].value is not None:
            given.append(f"runtime.{flag}={FLAGS[flag].value!r}")
    return given


def require(*names: str) -> None:
    """Raises a UserError for the first of the flags that was not given."""
    for name in names:
        if not FLAGS[name].value:
            text, example = _described(FLAGS[name])
            raise UserError(f"--{name} is required, for example {example}. {text}")


def image_size(text: str | None) -> tuple[int, int] | None:
    """`(height, width)` in pixels from "640" or "512,768"; None stays None.

    Raises:
        UserError: for another form, or a side that is too long.
    """
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


def listing() -> str:
    """One line per experiment: name, published AP or mIoU, description."""
    rows = []
    for name, values in config_lib.load_experiments().items():
        published = values.get("published")
        number = f"{published:.1f}" if isinstance(published, (int, float)) else ""
        rows.append((name, number, str(values.get("description", ""))))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'experiment':<{width}}  published  description"]
    lines += [f"{name:<{width}}  {ap:>9}  {text}" for name, ap, text in rows]
    return "\n".join(lines)


def main(command: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process with its exit status.

    A mistake of the user gives one line and status 2; an error of this package gives one line and
    status 1, and the line names the file that holds the stack trace.

    Args:
        command: function that is called once the flags are parsed.
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
            raise UserError(_unexpected(arguments[1]))
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
            "error: this machine has too little memory; reduce batch_size, image_size, "
            "shuffle_buffer or the number of workers",
            2,
        )
    except ImportError as error:
        package = _backend_of(error)
        if package is None:
            return _internal(error)
        return _tell(
            f"error: {package} is not installed or cannot be loaded ({error}); install it with "
            f"pip install 'official_selftrain[{BACKENDS[package]}]'",
            2,
        )
    except TrainingInterrupted as stopped:
        return _tell(stopped, 128 + stopped.signal)
    except KeyboardInterrupt as interrupted:
        return _tell(str(interrupted) or f"Ctrl-C: {RESUME}", 128 + signal.SIGINT)
    except Exception as error:  # the last net
        return _internal(error)
    return 0


def _backend_of(error):
    """The backend that an ImportError names, or that raised it while being imported from here."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [frame.f_globals.get("__name__", "").split(".")[0] for frame in frames]
    ours = [i for i, name in enumerate(packages) if name in ("official_selftrain", "__main__")]
    # Frames before our last one only called what could not be imported: it is not their fault.
    beyond = packages[max(ours, default=-1) + 1 :]
    names = [(error.name or "").split(".")[0], *beyond]
    return next((name for name in names if name in BACKENDS), None)


def _tell(message, status):
    print(printable(message), file=sys.stderr)
    return status


def _internal(error):
    """Reports an error that is not the user's; the stack trace goes to a file."""
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


# --- Flags and help --------------------------------------------------------------------------

# Whatever is known about a flag is in its definition: name, type, default and text from absl; the
# example at the end of the text, after "Example: "; the group from the `with group(...)` around it.

_EXAMPLE = " Example: "
_HELP = re.compile(r"--?(h|\?|help|helpshort|helpfull|helpxml)(=true)?")
_groups: dict[str, str] = {}  # flag: title of its group


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
    """Lists the flags that are defined inside under a title of their own in the help."""
    before = set(FLAGS)
    yield
    _groups.update(dict.fromkeys(set(FLAGS) - before, title))


def _parse(arguments):
    """Parses the flags; `--help` prints the help of the command and exits.

    Raises:
        UserError: for an unknown flag, with the nearest known one, or a wrong value.
    """
    for argument in arguments[1:]:
        if argument == "--":
            break
        if asked := _HELP.fullmatch(argument):
            print(_help(with_absl=asked[1] == "helpfull"))
            sys.exit(0)
    try:
        return FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        hint = did_you_mean(f"--{error.flagname}", [f"--{f}" for f in _own_flags()])
        raise UserError(f"unknown flag --{error.flagname}{hint}") from None
    except (flags.Error, ValueError) as error:  # ValueError: as for --noverify=1
        raise UserError(_wrong_value(error)) from None


def _wrong_value(error):
    """The message for a missing value, or one that the flag cannot take."""
    text = one_line(error, None)
    found = re.match(r"(?:flag|Missing value for flag) --(\w+)(=?)", text)
    if not found or found[1] not in FLAGS:
        return text
    flag = FLAGS[found[1]]
    if not found[2]:
        return f"--{flag.name} takes {_expected(flag)}; no value is given"
    # absl writes "flag --NAME=VALUE: REASON"; the reason is the error that it caught.
    value = str(error)[found.end() :].removesuffix(f": {error.__context__}")
    near = or_nearest(value, getattr(flag.parser, "enum_values", []))
    return f"--{flag.name} takes {_expected(flag)}; given {value!r}{near}"


def _unexpected(argument):
    """The message for an argument that is not a flag."""
    near = nearest(argument.partition("=")[0], _own_flags())
    hint = f"; did you mean '--{near}'?" if near else ""
    return f"unexpected argument {argument!r}: flags are written --name=value{hint}"


def _expected(flag):
    """What a flag takes, in words."""
    if flag.boolean:
        return "true or false"
    if values := getattr(flag.parser, "enum_values", None):
        return f"one of {', '.join(values)}"
    return flag.parser.syntactic_help or "text"


def _own_flags():
    """The names of the flags that the command defines, in order of definition."""
    return [
        flag.name
        for module, defined in FLAGS.flags_by_module_dict().items()
        if not module.startswith("absl")
        for flag in defined
    ]


def _help(with_absl=False):
    """The help of the command, made from its docstring and the definitions of its flags."""
    text = (sys.modules["__main__"].__doc__ or "").strip()
    # The pointer to the documentation is the last paragraph, and belongs at the end.
    text, _, pages = text.partition("\n\nDocumentation: ")
    sections: dict[str, list[str]] = {}
    for name in _own_flags():
        sections.setdefault(_groups.get(name, "This command"), []).append(name)
    if with_absl:  # by the flag's own name, as some have a short one too
        sections["absl"] = sorted({FLAGS[name].name for name in FLAGS} - set(_own_flags()))
        end = []
    else:
        end = ["--helpfull also lists the flags of absl, the library that reads the flags."]
    lines = [text]
    for title, names in sections.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _flag_help(name)
    return "\n".join([*lines, "", *end, f"Documentation: {pages or 'README.md'}"])


def _flag_help(name):
    """The lines of a flag: type, text, default and example."""
    flag = FLAGS[name]
    text, example = _described(flag)
    default = flag.default
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, list):
        default = ",".join(default)
    facts = "Default: none." if default in (None, "") else f"Default: {default}."
    if example:
        facts += f" Example: {example}"
    indent = " " * 6
    return [
        f"  {_usage(flag)}",
        *textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent),
        f"{indent}{facts}",
    ]


def _usage(flag):
    """A flag and its type, such as `--seed=INTEGER`."""
    if flag.boolean:
        return f"--[no]{flag.name}"
    if values := getattr(flag.parser, "enum_values", None):
        return f"--{flag.name}={'|'.join(values)}"
    kind = flag.flag_type()
    name = {"int": "INTEGER", "float": "NUMBER"}.get(kind, "TEXT")
    if "comma" in kind:
        name = "TEXT,TEXT,..."
    elif limits := _limits(flag.parser):
        name += f" ({limits})"
    return f"--{flag.name}={name}" + (" (repeatable)" if isinstance(flag, flags.MultiFlag) else "")


def _limits(parser):
    """The range of a number, in words; empty where it is not limited."""
    low, high = (getattr(parser, f"{side}_bound", None) for side in ("lower", "upper"))
    if low is None or high is None:
        return f"{low} or more" if low is not None else ""
    return f"{low} to {high}"


def _described(flag):
    """Text and example of a flag."""
    text = (flag.help or "").split(";\n")[0]  # absl adds there that a flag is repeatable
    text = re.sub(r"^<[^>]*>: ", "", text)  # and here what an enumeration takes
    text, _, example = " ".join(text.split()).partition(_EXAMPLE)
    if flag.boolean:
        return text, f"--{'no' if flag.default else ''}{flag.name}"
    if values := getattr(flag.parser, "enum_values", None):
        example = example or next(value for value in values if value != flag.default)
    return text, example and f"--{flag.name}={example}"


# --- Terminal --------------------------------------------------------------------------------


class _Printable(io.TextIOWrapper):
    """An output that escapes control characters, except for line breaks and tabs."""

    def write(self, text):
        shown = "\n".join(
            "\t".join(printable(cell) for cell in line.split("\t")) for line in text.split("\n")
        )
        super().write(shown)
        return len(text)


class _Formatter(logging.Formatter):
    """Formats a log line as time and message; stack traces follow on lines of their own."""

    def format(self, record):
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        time = self.formatTime(record, "%H:%M:%S")
        line = f"{time} {level}{printable(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "\n" + "\n".join(map(printable, trace.split("\n")))
        return line


def _set_up_output():
    """Escapes characters that the encoding of standard output lacks, instead of failing."""
    out = sys.stdout
    if type(out) is io.TextIOWrapper:
        buffering, encoding = out.line_buffering, out.encoding
        sys.stdout = _Printable(
            out.detach(), encoding, "backslashreplace", line_buffering=buffering
        )


RESUME = "finished work is kept; the same command resumes it, a training from its last checkpoint"


def _end(number, _):
    raise TrainingInterrupted(f"SIGTERM: {RESUME}", number)


def _set_up_logging():
    warnings.filterwarnings("ignore", category=UserWarning, module="keras")
    absl_logging.get_absl_handler().setFormatter(_Formatter())
    logging.getLogger().setLevel(logging.INFO)


def print_metrics(name: str, metrics: Mapping[str, float] | None) -> None:
    """Prints the first three metrics of an evaluation, in percent."""
    if metrics:
        names = [key for key in metrics if "/" not in key][:3]
        line = ", ".join(f"{key} {100 * metrics[key]:.1f}" for key in names)
        print(f"{name}: {line}")


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Prints (name, text) as one line each."""
    print("\n".join(f"{name}: {text}" for name, text in rows))

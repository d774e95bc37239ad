"""Settings as text: YAML and JSON files and `--params_override`, and how they are merged."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.files import read_text
from official_selftrain.utils.types import StrPath

if TYPE_CHECKING:
    from official_selftrain.config.build import ConfigModel

# Limits of a file. Anchors count wherever they are used: nine lines can expand to a billion values.
MAX_VALUES, MAX_LEVELS = 100_000, 50


class _Loader(yaml.SafeLoader):
    """YAML that reads plain values by the rules of YAML 1.2.

    In PyYAML's 1.1, `no` and `on` are truth values, `16:9` is a number, and `1e-3` is a text.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class _LastWins(yaml.SafeLoader):
    """YAML 1.1 except for floats; equal keys, which the released Pascal files have, are allowed."""


_FLOAT = r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", rf"{_FLOAT}|[-+]?([0-9]+\.[0-9]*|\.[0-9]+)", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
_LastWins.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^{_FLOAT}$"), list("-+0123456789")
)


def load_yaml(text: str, origin: StrPath, last_wins: bool = False) -> Any:
    """Parses YAML.

    Args:
        text: the YAML.
        origin: where it comes from, for errors.
        last_wins: of equal keys, take the last instead of raising an error.

    Raises:
        UserError: if it is not valid, has more than 50 levels or more than 100,000 values.
    """
    loader = None
    try:
        loader = (_LastWins if last_wins else _Loader)(text)
        node = loader.get_single_node()
        _check_size(node, {})
        if not last_wins:
            _check_keys(node, set())  # PyYAML keeps the last of equal keys without a word
        return None if node is None else loader.construct_document(node)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except RecursionError:
        raise UserError(f"{origin} is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{origin}{where}: not valid YAML: {reason}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{origin} is not valid YAML: {one_line(error, None)}") from None
    finally:
        if loader is not None:
            loader.dispose()  # breaks the reference cycles in the parser


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_size(node: Any, sizes: dict[int, int], depth: int = 0) -> int:
    """The number of values in a node, in which an anchor counts wherever it is used."""
    if depth > MAX_LEVELS:
        raise UserError(f"nested too deeply, more than {MAX_LEVELS} levels, or contains itself")
    if id(node) not in sizes:
        sizes[id(node)] = 1 + sum(_check_size(n, sizes, depth + 1) for n in _children(node))
        if sizes[id(node)] > MAX_VALUES:
            raise UserError(
                f"contains more than {MAX_VALUES:,} values; is it really a file of settings, or of "
                "class names?"
            )
    return sizes[id(node)]


def check_depth(value: Any, origin: StrPath, depth: int = 0) -> None:
    """Checks the number of levels of dicts and lists that do not come from YAML."""
    if depth > MAX_LEVELS:
        raise UserError(
            f"{origin}: nested too deeply, more than {MAX_LEVELS} levels, or contains itself"
        )
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            check_depth(part, origin, depth + 1)


def _check_keys(node: Any, seen: set[int]) -> None:
    """Refuses equal keys in a mapping; a key that is merged by `<<` may be set again."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"has the key {key.value!r} twice, in line {lines[name]} and in line {line}"
                )
            lines[name] = line
    for part in _children(node):
        _check_keys(part, seen)


def _load_json(text: str, path: StrPath) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path} has the key {twice!r} twice")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None


def load_file(path: StrPath, last_wins: bool = False) -> dict[str, Any]:
    """Loads a YAML or JSON file as nested dicts; see `load_yaml`."""
    text = read_text(path, "config file")
    if str(path).endswith(".json") and not last_wins:
        values = _load_json(text, path)
        check_depth(values, path)
    else:
        values = load_yaml(text, path, last_wins)
    if not isinstance(values, dict):
        raise UserError(f"{path} must contain keys and values, such as `trainer: {{steps: 100}}`")
    return values


def parse_override(text: str) -> dict[str, Any]:
    """Parses one `--params_override` to nested dicts.

    Args:
        text: in one of the released code's forms: `a.b=1,c=[1,2]`, inline YAML such as
            `{a: {b: 1}}`, or the name of a YAML or JSON file.

    Raises:
        UserError: if it has none of these forms.
    """
    text = text.strip()
    if text.startswith("{"):
        return load_yaml(text, "--params_override")
    if text.endswith((".yaml", ".yml", ".json")) and "=" not in text:
        return load_file(text)
    merged: dict[str, Any] = {}
    for item in _split_commas(text):
        key, equals, value = item.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(f"--params_override takes key=value,key=value; cannot read {item!r}")
        merged = merge(merged, nested(key.strip(), load_yaml(value, f"--params_override {item!r}")))
    return merged


def _split_commas(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes; the quote in `it's` is a letter."""
    items, depth, quote, before = [""], 0, "", "="
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        # A quote counts only where a value begins: description=it's has none.
        elif letter in "'\"" and before in "=,[{:":
            quote = letter
        elif letter in "[{]}":
            depth = max(depth + (1 if letter in "[{" else -1), 0)
        if letter == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += letter
        before = letter if letter.strip() else before
    return [item for item in items if item.strip()]


def nested(key: str, value: Any) -> dict[str, Any]:
    """Nested dicts of one dotted key: `nested("a.b", 1)` is `{"a": {"b": 1}}`."""
    *sections, last = key.split(".")
    found = {last: value}
    for section in reversed(sections):
        found = {section: found}
    return found


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested dicts; any other value of `changes`, such as a list, replaces the old one."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)
        merged[key] = value
    return merged


def dump(config: "ConfigModel") -> str:
    """YAML text from which `model_from_dict` rebuilds the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)

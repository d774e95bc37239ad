"""Settings as text: YAML and JSON files, `--params_override`, and what lies on top of what."""

import json
import re
from typing import ClassVar

import yaml

from official_selftrain.utils.errors import UserError, one_line
from official_selftrain.utils.files import read_text

LARGEST, DEEPEST = 100_000, 50  # values of a file once its anchors are written out, and levels


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and reads plain values by the rules of YAML 1.2.

    So `no` and `on` are words, a date is a text, and 1e-3 is a number.
    """

    yaml_implicit_resolvers: ClassVar = {}


class _LastWins(yaml.SafeLoader):
    """YAML in which the later of two equal keys wins, as the released Pascal files need it."""


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


def load_yaml(text, origin, last_wins=False):
    """Parses YAML; `origin` is named in errors. Equal keys are refused unless the last wins.

    Raises:
        UserError: if it is not valid, nested more than 50 levels, or of more than 100,000 values.
    """
    loader = None
    try:
        loader = (_LastWins if last_wins else _Loader)(text)
        node = loader.get_single_node()
        _check_size(node, {})
        if not last_wins:
            _check_keys(node, set())
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
            loader.dispose()


def _children(node):
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_size(node, sizes, depth=0):
    """How many values a node holds, each anchor counted where it is used."""
    if depth > DEEPEST:
        raise UserError(f"nested too deeply, more than {DEEPEST} levels, or holds itself")
    if id(node) not in sizes:
        sizes[id(node)] = 1 + sum(_check_size(n, sizes, depth + 1) for n in _children(node))
        if sizes[id(node)] > LARGEST:
            raise UserError(f"holds more than {LARGEST:,} values: no file of settings, or names?")
    return sizes[id(node)]


def check_depth(value, origin, depth=0):
    """The same for dicts and lists that are not from YAML."""
    if depth > DEEPEST:
        raise UserError(f"{origin}: nested too deeply, more than {DEEPEST} levels, or holds itself")
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            check_depth(part, origin, depth + 1)


def _check_keys(node, seen):
    """Refuses equal keys of a mapping; a merged one (`<<`) may be set again."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and isinstance(key, yaml.ScalarNode):
                raise UserError(
                    f"the key {key.value!r} twice, in line {lines[name]} and in line {line}"
                )
            lines[name] = line
    for part in _children(node):
        _check_keys(part, seen)


def _load_json(text, path):
    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: the key {twice!r} twice")
        return values

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None


def load_file(path, last_wins=False):
    """A YAML or JSON file as nested dicts; see `load_yaml`."""
    text = read_text(path, "config file")
    if str(path).endswith(".json") and not last_wins:
        values = _load_json(text, path)
        check_depth(values, path)
    else:
        values = load_yaml(text, path, last_wins)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, such as `trainer: {{steps: 100}}`")
    return values


def parse_override(text):
    """Nested dicts from one `--params_override`.

    Takes the released code's forms: `a.b=1,c=[1,2]`, inline YAML `{a: {b: 1}}`, or a file.
    """
    text = text.strip()
    if text.startswith("{"):
        return load_yaml(text, "--params_override")
    if text.endswith((".yaml", ".yml", ".json")) and "=" not in text:
        return load_file(text)
    merged = {}
    for item in _split_commas(text):
        key, equals, value = item.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(f"--params_override takes key=value,key=value; cannot read {item!r}")
        merged = merge(merged, nested(key.strip(), load_yaml(value, f"--params_override {item!r}")))
    return merged


def _split_commas(text):
    """Splits at commas outside brackets and quotes; a quote inside a word is a letter."""
    items, depth, quote, before = [""], 0, "", "="
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
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


def nested(key, value):
    """`nested("a.b", 1)` is `{"a": {"b": 1}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base, changes):
    """Nested dicts merge; every other value, lists too, replaces."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value) if both else value
    return merged


def dump(config):
    """YAML text from which `make` rebuilds the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)

"""Builds checked settings from nested dicts; an error names the key and the nearest known name."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args, get_origin

import pydantic
import pydantic_core

from official_selftrain.utils.errors import UserError, nearest, or_nearest, short

Group = TypeVar("Group", bound="ConfigModel")
Path: TypeAlias = tuple[str, ...]  # the parts of a dotted key
Layers: TypeAlias = Sequence[tuple[str | None, Any]]  # (name, nested dicts), the later on top


class ConfigModel(pydantic.BaseModel):
    """Settings that belong together: immutable, checked, and without unknown keys."""

    # The message for keys of this group where another member of its union was expected.
    misplaced: ClassVar[str] = ""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    def __init__(self, /, **values: Any) -> None:
        """Checks settings that are given in Python; an error reads like that of a file.

        Raises:
            UserError: see `model_from_dict`.
        """
        with _as_user_error(type(self), [(None, values)]):
            super().__init__(**values)

    # Pydantic would call an overridden `__init__` for nested dicts as well, and each of these calls
    # would turn its errors into text before their keys are complete. This mark, which
    # `pydantic.BaseModel` puts on its own `__init__`, prevents that.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def model_from_dict(group: type[Group], values: Any, origin: str | Layers | None = None) -> Group:
    """Builds a `Config`, or one of its groups, from nested dicts.

    Args:
        group: class of the result.
        values: nested dicts.
        origin: where the values come from: a name, or `(name, nested dicts)` pairs, the later on
            top of the earlier ones. Each error then names the pair that it is in.

    Raises:
        UserError: one line for all errors, each with its dotted key, the value that was given, and
            the nearest known name.
    """
    layers = [(origin, values)] if origin is None or isinstance(origin, str) else origin
    with _as_user_error(group, layers):
        return group.model_validate(values)


@contextlib.contextmanager
def _as_user_error(group: type[ConfigModel], layers: Layers) -> Iterator[None]:
    """Raises all errors that Pydantic finds as one `UserError`."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise UserError("; ".join(_explain(group, error.errors(), layers))) from None
    except RecursionError:
        raise UserError("the settings are nested too deeply, or contain themselves") from None


def changed(config: Group, **changes: Any) -> Group:
    """Returns a copy of a config, or of one of its groups, with some fields changed, and checks it.

    Raises:
        UserError: for an unknown field or an impossible value, see `model_from_dict`.
    """
    return model_from_dict(type(config), {**dict(config), **changes})


def _explain(
    root: type[ConfigModel], errors: list[pydantic_core.ErrorDetails], layers: Layers
) -> list[str]:
    """What is wrong, as one text per layer."""
    located = [(*_locate(root, error["loc"]), error) for error in errors]
    unknown = {(path[:-1], path[-1]) for path, *_, e in located if e["type"] == "extra_forbidden"}
    lines: dict[str | None, list[str]] = {}
    misplaced: dict[tuple[str | None, type[ConfigModel]], list[str]] = {}
    reported = set()
    # All errors are reported at once; several messages about one key would hide the others.
    for path, group, siblings, error in located:
        if path in reported:  # for example the second number of a pair
            continue
        reported.add(path)
        origin = _origin(layers, path) or (layers[0][0] if len(layers) == 1 else None)
        if error["type"] == "missing" and any(
            section == path[:-1] and nearest(name, [path[-1]]) for section, name in unknown
        ):
            continue  # it is given, but misspelled
        if error["type"] != "extra_forbidden":
            message = _impossible(path, error)
        elif other := next((g for g in siblings if path[-1] in g.model_fields), None):
            misplaced.setdefault((origin, other), []).append(".".join(path))
            continue
        else:
            message = _unknown(root, path, group)
        lines.setdefault(origin, []).append(message)
    for (origin, other), keys in misplaced.items():
        lines.setdefault(origin, []).append(f"{', '.join(sorted(keys))}: {other.misplaced}")
    return [
        f"{origin}: {'; '.join(messages)}" if origin else "; ".join(messages)
        for origin, messages in lines.items()
    ]


def _locate(
    root: type[ConfigModel], location: tuple[int | str, ...]
) -> tuple[Path, type[ConfigModel] | None, list[type[ConfigModel]]]:
    """The keys of an error, the group of the last key, and the groups that could replace this one.

    Pydantic's location also holds the tags of unions and the positions in lists, which are no keys
    that a user could write.
    """
    path: list[int | str] = []
    group: type[ConfigModel] | None = root
    siblings: list[type[ConfigModel]] = []
    others: list[type[ConfigModel]] = []
    field: pydantic.fields.FieldInfo | None = None
    members: dict[Any, type[ConfigModel]] = {}
    for part in location:
        if len(members) > 1:
            others = [other for tag, other in members.items() if tag != part]
            members = {part: members[part]} if part in members else {}  # `part` is a tag
        elif field is None or members:
            group, siblings, others = next(iter(members.values()), group), others, []
            path.append(part)
            field = group.model_fields.get(str(part)) if group else None
            members = members_of(field.annotation) if field else {}
            if field is None:
                break
        elif get_origin(field.annotation) is dict:
            path.append(part)
            break
    return tuple(map(str, path)), group, siblings


def members_of(annotation: Any) -> dict[Any, type[ConfigModel]]:
    """`{tag: group}` of the groups that a field can hold."""
    found: dict[Any, type[ConfigModel]] = {}
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, ConfigModel):
            tags = [t.tag for t in getattr(annotation, "__metadata__", ()) if hasattr(t, "tag")]
            found[tags[0] if tags else part.__name__] = part
        elif part is not annotation:
            found |= members_of(part)
    return found


def choices(field: pydantic.fields.FieldInfo) -> list[str]:
    """The values of a field that takes one of a few words; [] for other fields."""
    parts = (field.annotation, *get_args(field.annotation))
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


@functools.cache
def keys_of(root: type[ConfigModel]) -> list[Path]:
    """All keys below a group, as tuples of their parts."""
    found: dict[Path, None] = {}  # the tasks have keys in common
    for name, field in root.model_fields.items():
        found[(name,)] = None
        for group in members_of(field.annotation).values():
            found |= {(name, *below): None for below in keys_of(group)}
    return list(found)


def _unknown(root: type[ConfigModel], path: Path, group: type[ConfigModel] | None) -> str:
    """The message for a key that does not exist."""
    key, name = ".".join(path), path[-1]
    parts = tuple(name.split("."))
    if len(parts) > 1 and (*path[:-1], *parts) in keys_of(root):
        inside = ": {".join(parts) + ": ..." + "}" * (len(parts) - 1)
        return f"unknown key {key!r}; in a file, write {inside}"
    elsewhere = [".".join(known) for known in keys_of(root) if known[-1] == name]
    if elsewhere:
        return f"unknown key {key!r}; the full name is {' or '.join(elsewhere)}"
    fields = list(group.model_fields) if group else []
    near = nearest(name, fields)
    if near:
        return f"unknown key {key!r}; did you mean {near!r}?"
    # A key may be right except for its section; this takes a closer match, since all names count.
    if "experiment" in root.model_fields:
        names = {known[-1]: ".".join(known) for known in reversed(keys_of(root))}
        near = nearest(name, list(names), 0.8)
        if near:
            return f"unknown key {key!r}; did you mean {names[near]!r}?"
    return f"unknown key {key!r}; known: {', '.join(fields)}"


def _impossible(path: Path, error: pydantic_core.ErrorDetails) -> str:
    """The message for a value that is missing or not possible."""
    key, kind, given = ".".join(path), error["type"], error.get("input")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if kind == "missing" and error["loc"][-1] == path[-1]:
        if path == ("experiment",):
            return (
                "no experiment is named: give --experiment=NAME, the experiment that these "
                "settings change; or, if they are complete, add a line `experiment: NAME` with a "
                "name of your own"
            )
        return f"{key} is missing"
    if kind == "union_tag_invalid":
        key, given = f"{key}.kind", str(given["kind"])
        kinds = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        return (
            f"{key}: must be {' or '.join(kinds)} (given {short(given)}){or_nearest(given, kinds)}"
        )
    if kind in ("model_type", "dict_type"):
        message = "must be a section, that is, keys with values"
    if kind == "invalid_key":
        message = "a key must be text; put it in quotes"
    if kind == "missing":
        message = "has too few numbers"
    if kind == "tuple_type":
        message = "must be a list, such as [a, b]"
    if kind == "literal_error" and isinstance(given, str):
        near = nearest(given, re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        if near:
            return f"{key}: unknown value {short(given)}; did you mean {near!r}?"
    if isinstance(given, (dict, ConfigModel)):
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (given {short(given)})"


def _origin(layers: Layers, path: Path) -> str | None:
    """The name of the last layer that sets a key; the last one wins."""
    for name, values in reversed(layers):
        for part in path:
            if not isinstance(values, dict) or part not in map(str, values):
                break
            values = next(value for key, value in values.items() if str(key) == part)
        else:
            if path:
                return name
    return None

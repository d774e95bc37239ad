"""Groups of settings, made from nested dicts and checked; a fault names key and nearest name."""

import contextlib
import functools
import re
from typing import ClassVar, Literal, get_args, get_origin

import pydantic

from official_selftrain.utils.errors import UserError, nearest, or_nearest, short


class ConfigModel(pydantic.BaseModel):
    """Settings that belong together: frozen, checked, and without unknown keys."""

    # What keys of this group are called where another one of its union was expected.
    misplaced: ClassVar[str] = ""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    def __init__(self, /, **values):
        """Checks settings given in Python; an error reads like that of a file.

        Raises:
            UserError: see `model_from_dict`.
        """
        with _as_user_error(type(self), [(None, values)]):
            super().__init__(**values)

    # Pydantic would call an `__init__` of one's own for nested dicts too, and each of these calls
    # would turn its errors into text before their keys are complete.
    __init__.__pydantic_base_init__ = True


def model_from_dict(group, values, origin=None):
    """Builds a `Config`, or one of its groups, from nested dicts.

    Args:
        group: the class.
        values: nested dicts.
        origin: where they come from: a name, or `(name, nested dicts)` pairs, the later on top of
            the earlier; each fault then names the one that it is in.

    Raises:
        UserError: one line for all faults, each with its dotted key, what was given, and the
            nearest known name.
    """
    layers = origin if isinstance(origin, (list, tuple)) else [(origin, values)]
    with _as_user_error(group, layers):
        return group.model_validate(values)


@contextlib.contextmanager
def _as_user_error(group, layers):
    """Raises what Pydantic finds wrong as one `UserError`."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise UserError("; ".join(_explain(group, error.errors(), layers))) from None
    except RecursionError:
        raise UserError("the settings are nested too deeply, or hold themselves") from None


def changed(config, **changes):
    """A copy of a config, or of one of its groups, with some fields changed and all checked.

    Raises:
        UserError: as `model_from_dict` does, for a misspelt field and a value out of range.
    """
    return model_from_dict(type(config), {**dict(config), **changes})


def _explain(root, errors, layers):
    """What is wrong, a line for each layer."""
    located = [(*_locate(root, error["loc"]), error) for error in errors]
    unknown = {(path[:-1], path[-1]) for path, *_, e in located if e["type"] == "extra_forbidden"}
    lines, others, told = {}, {}, set()
    for path, group, siblings, error in located:
        if path in told:  # the second number of a pair, say
            continue
        told.add(path)
        origin = _origin(layers, path) or (layers[0][0] if len(layers) == 1 else None)
        if error["type"] == "missing" and any(
            section == path[:-1] and nearest(name, [path[-1]]) for section, name in unknown
        ):
            continue  # it is there, misspelt
        if error["type"] != "extra_forbidden":
            message = _fault(root, path, error)
        elif other := next((g for g in siblings if path[-1] in g.model_fields), None):
            others.setdefault((origin, other), []).append(".".join(path))
            continue
        else:
            message = _unknown(root, path, group)
        lines.setdefault(origin, []).append(message)
    for (origin, other), keys in others.items():
        lines.setdefault(origin, []).append(f"{', '.join(sorted(keys))}: {other.misplaced}")
    return [
        f"{origin}: {'; '.join(messages)}" if origin else "; ".join(messages)
        for origin, messages in lines.items()
    ]


def _locate(root, location):
    """The keys of a fault, the group of the last of them, and those that could be in its place.

    Pydantic's location also has the tags of unions and the positions in a list, which no user can
    type.
    """
    path, group, siblings, others, field, members = [], root, [], [], None, {}
    for part in location:
        if len(members) > 1:
            others = [other for tag, other in members.items() if tag != part]
            members = {part: members.get(part)}  # a tag
        elif field is None or members:
            group, siblings, others = next(iter(members.values()), group), others, []
            path.append(part)
            field = group.model_fields.get(part) if group else None
            members = members_of(field.annotation) if field else {}
            if field is None:
                break
        elif get_origin(field.annotation) is dict:
            path.append(part)
            break
    return tuple(map(str, path)), group, siblings


def members_of(annotation):
    """`{tag: group}` of the groups that a field can hold."""
    found = {}
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
def keys_of(root):
    """All keys below a group, as tuples."""
    found = {}
    for name, field in root.model_fields.items():
        found[(name,)] = None
        for group in members_of(field.annotation).values():
            found |= {(name, *below): None for below in keys_of(group)}
    return list(found)


def _unknown(root, path, group):
    """The message for a key that does not exist."""
    key, name = ".".join(path), path[-1]
    parts = tuple(name.split("."))
    if len(parts) > 1 and (*path[:-1], *parts) in keys_of(root):
        inside = ": {".join(parts) + ": ..." + "}" * (len(parts) - 1)
        return f"unknown key {key!r}; in a file, write it as {inside}"
    elsewhere = [".".join(known) for known in keys_of(root) if known[-1] == name]
    if elsewhere:
        return f"unknown key {key!r}; it is {' or '.join(elsewhere)}"
    fields = list(group.model_fields) if group else []
    near = nearest(name, fields)
    if near:
        return f"unknown key {key!r}; did you mean {near!r}?"
    if "experiment" in root.model_fields:
        names = {known[-1]: ".".join(known) for known in reversed(keys_of(root))}
        near = nearest(name, list(names), 0.8)
        if near:
            return f"unknown key {key!r}; did you mean {names[near]!r}?"
    return f"unknown key {key!r}; known: {', '.join(fields)}"


def _fault(root, path, error):
    """The message for a value that is not possible."""
    key, kind, given = ".".join(path), error["type"], error.get("input")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if kind == "missing" and error["loc"][-1] == path[-1]:
        if path == ("experiment",):
            return (
                "no experiment is named: give --experiment=NAME, the recipe that these settings "
                "change, or, if they are complete in themselves, a line `experiment: NAME` with a "
                "name of your own"
            )
        return f"{key} is missing"
    if kind == "union_tag_invalid":
        key, given = f"{key}.kind", given.get("kind")
        kinds = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        return (
            f"{key}: must be {' or '.join(kinds)} (given {short(given)}){or_nearest(given, kinds)}"
        )
    if kind in ("model_type", "dict_type"):
        message = "must be a section, keys with values"
    if kind == "invalid_key":
        message = "a key must be a text; put it in quotes"
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


def _origin(layers, path):
    """The name of the last layer that sets a key."""
    for name, values in reversed(layers):
        for part in path:
            if not isinstance(values, dict) or part not in map(str, values):
                break
            values = next(value for key, value in values.items() if str(key) == part)
        else:
            if path:
                return name
    return None

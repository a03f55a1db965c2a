"""Plain data, as a YAML holds it, becomes nested dataclasses whose type hints say what is allowed."""
from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from utils.config_schema import FLAG, ConfigError, is_number, refuse_unknown

Where = Callable[[str], str]  # dotted key -> the file and line, or the flag, that set it


def filled(schema: type, values: Mapping[Any, Any], where: Where, key: str = "") -> Any:
    """A `schema`, a dataclass of numbers, text, flags, lists, dicts and dataclasses.

    Args:
        key: where `values` stand in the file, dotted; empty for its top.
    Raises:
        ConfigError: an unknown or missing key, or a value of another type.
    """
    hints, prefix = get_type_hints(schema), f"{key}." if key else ""
    refuse_unknown(values, hints, where, prefix=prefix, explained=f"explained in {schema.__module__}")
    read = {name: _value(hints[name], value, where, prefix + name) for name, value in values.items()}
    needed = [field.name for field in fields(schema) if field.default is field.default_factory is MISSING]
    missing = [prefix + name for name in needed if name not in read]
    if missing:
        raise ConfigError(f"{where(key)}: lacks {', '.join(missing)}. Add {'it' if len(missing) == 1 else 'them'}.")
    return schema(**read)


def _value(hint: Any, value: Any, where: Where, key: str) -> Any:
    """`value` as `hint` wants it."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is types.UnionType:  # X | None
        if value is None:
            return None
        kind, inner = get_origin(inner[0]) or inner[0], get_args(inner[0])
    if is_dataclass(kind) and isinstance(value, Mapping):
        return filled(kind, value, where, key)
    if kind is list and isinstance(value, list):
        return [_value(inner[0], item, where, f"{key}[{index}]") for index, item in enumerate(value)]
    if kind is dict and isinstance(value, Mapping):
        return {str(name): _value(inner[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if kind in (int, bool) and type(value) is kind:
        return value
    if kind is float and is_number(value):
        return float(value)
    if kind is str and (isinstance(value, str) or is_number(value)):
        return str(value)
    raise ConfigError(f"{where(key)}: {key}={value!r:.80} is not allowed. Allowed: {_words(hint)}.")


def _words(hint: Any) -> str:
    """What a hint allows."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is types.UnionType:
        return f"{_words(inner[0])}, or null"
    if is_dataclass(kind):
        return f"a group of the keys {', '.join(field.name for field in fields(kind))}"
    if kind is list:
        return f"a list, in [], each of it {_words(inner[0])}"
    if kind is dict:
        return f"a group of names, each with {_words(inner[1])}"
    return {int: "a whole number", float: "a number", bool: FLAG.allowed, str: "text"}[kind]

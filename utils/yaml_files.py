"""YAML files and `key=value` flags become plain data that knows its lines; nothing else in the project reads YAML.

What the parsers say of a file that they cannot read gets its place and what to do here.
"""
from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from utils.config_schema import ConfigError, Layer
from utils.structured import filled

UNREADABLE = (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError)
REFERENCE = "Refer to a key of the same file or of its bases, such as ${height}, or write the value itself"


def read_file(path: Path) -> Layer:
    """The settings of one file.

    Raises: ConfigError, if it cannot be read or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # nodes know their lines, which OmegaConf drops
        if not isinstance(root, yaml.MappingNode):
            found = "is empty" if root is None else f"holds a {'list' if root.id == 'sequence' else 'single value'}"
            raise ConfigError(f"{path}: {found}; write lines of `key: value`.")
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}{_unread(root) or f': {_fault(error)}'}.") from error
    except UNREADABLE as error:
        raise _no_yaml(path, error) from error
    return Layer(str(path), values, {key: f"{path}:{line}" for key, line, _ in _nodes(root)})


def read_override(text: str) -> Layer:
    """The setting of one --set.

    Raises: ConfigError, if it is no key=value, or the value cannot be read.
    """
    name = f"--set {text}"
    key, equals, _ = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{name}: write key=value, such as kv_cache.sink_frames=12.")
    if key == "extends":
        raise ConfigError(f"{name}: only a file can extend another.")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{name}: the value cannot be read as YAML: {_fault(error)}.") from error
    return Layer(name, values, dict.fromkeys(_keys(values), name))


def merge(layers: Iterable[Layer], leave: Callable[[Any], bool] = lambda key: False) -> Layer:
    """One layer out of many, later ones winning, references resolved; named after the last file.

    Args:
        leave: which keys may refer to anything: their values stay as they are written.
    Raises:
        ConfigError: a list in the place of a group of keys, or a reference to nothing.
    """
    merged, where, name = OmegaConf.create(), {}, ""
    for layer in layers:
        name = name if layer.name.startswith("--set ") else layer.name
        _refuse_clash(OmegaConf.to_container(merged), layer.values, layer)
        try:
            merged = OmegaConf.merge(merged, layer.values)
        except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{layer.name}: does not fit what was there: {_fault(error)}.") from error
        where.update(layer.where)
    try:
        own = OmegaConf.masked_copy(merged, [key for key in merged if not leave(key)])
        values = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        if isinstance(error, MissingMandatoryValue):
            raise ConfigError(
                f"{where.get(key, name)}: {key} has no value, only ???. Give it one, or leave the key out."
            ) from error
        raise ConfigError(
            f"{where.get(key, name)}: {key}={_found(OmegaConf.to_container(merged), key)!r:.80} has no value: it names "
            f"nothing that has one, or is not written as a reference. {REFERENCE}."
        ) from error
    return Layer(name, {**OmegaConf.to_container(merged), **values}, where)


def load_structured(path: Path, schema: type, overrides: Sequence[str] = ()) -> Any:
    """A dataclass `schema` filled from the YAML at `path`, then from `key=value` overrides; every value type-checked.

    Raises:
        ConfigError: the file cannot be read, or a key or value does not fit.
    """
    given = merge([read_file(path), *map(read_override, overrides)])
    return filled(schema, given.values, given.at)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_plain_yaml(path: Path) -> Any:
    """What stands in the YAML at `path`, as plain data. Raises: ConfigError, if it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except UNREADABLE as error:
        raise _no_yaml(path, error) from error


def _no_yaml(path: Path, error: Exception) -> ConfigError:
    """Why the file is no YAML, with the line where the parser knows it."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return ConfigError(f"{path}:{mark.line + 1}: not valid YAML: {_fault(error)}.")
    problem = error.strerror if isinstance(error, OSError) else _fault(error)
    return ConfigError(f"{path}: cannot be read as YAML: {problem}.")


def _fault(error: Exception) -> str:
    """What went wrong, in the parser's first line, and what to do."""
    if isinstance(error, RecursionError):
        return "its values are nested too deeply. Write them flatter"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text. Save it as UTF-8"
    said = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{said}. Correct it, or put a text that holds signs of YAML, or a ${{, in quotes"


def _unread(root: yaml.Node) -> str | None:
    """`:line: key ...` of the first value that is no reference, though it holds a ${."""
    for key, line, node in _nodes(root):
        if isinstance(node, yaml.ScalarNode):
            try:
                OmegaConf.create([node.value])
            except OmegaConfBaseException as error:
                return f":{line}: {key}={node.value!r:.80}: {_fault(error)}"
    return None


def _nodes(node: yaml.Node, above: str = "") -> Iterator[tuple[str, int, yaml.Node]]:
    """(dotted key, line, value) of everything below, such as (tables.methods.columns[0].metric, 30, ...)."""
    below = []
    if isinstance(node, yaml.MappingNode):
        below = [(f"{above}.{key.value}" if above else str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(f"{above}[{index}]", value, value) for index, value in enumerate(node.value)]
    for name, place, value in below:
        yield name, place.start_mark.line + 1, value
        yield from _nodes(value, name)


def _keys(values: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """Dotted keys of a group and of the groups in it."""
    for key, value in values.items():
        yield f"{above}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{above}{key}.")


def _found(values: Any, key: str) -> Any:
    """What stands at a dotted key, such as tables.methods.columns[0].metric."""
    for part in re.findall(r"[^.\[\]]+", key):
        values = values[int(part)] if isinstance(values, list) else {str(k): v for k, v in values.items()}[part]
    return values


def _refuse_clash(old: Mapping[Any, Any], new: Mapping[Any, Any], layer: Layer, above: str = "") -> None:
    """Raise ConfigError for a list in the place of a group of keys, or a group in the place of a list."""
    for key in new.keys() & old.keys():
        there, here, name = old[key], new[key], f"{above}{key}"
        if isinstance(there, dict) and isinstance(here, dict):
            _refuse_clash(there, here, layer, f"{name}.")
        elif {type(there), type(here)} == {dict, list}:
            kind = "list" if isinstance(there, list) else "group of keys"
            raise ConfigError(
                f"{layer.at(name)}: {name}={here!r:.80} cannot take the place of {there!r:.80}. Give a whole {kind}."
            )

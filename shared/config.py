"""TOML into frozen dataclasses. Unknown keys, wrong types and bad units are refused by name.

A dataclass field's type says how its value is written:
`Duration` "30s" (seconds), `Size` "256M" (bytes), `Path`, an Enum by value, `tuple[X, ...]` a list,
a nested dataclass a table, `dict[str, X]` a table of X under names of one's own, and `str`, `int`,
`float`, `bool` as they are. A field without a default is required. A dataclass may
check itself in `__post_init__` by raising ValueError.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, NewType, TypeVar

from shared.units import parse_duration, parse_size

Duration = NewType("Duration", float)
Size = NewType("Size", int)

T = TypeVar("T")


class ConfigError(ValueError):
    """The text is not a valid configuration; the message names the key and says what is expected."""


def load(cls: type[T], text: str, source: str) -> T:
    """Reads TOML `text` into dataclass `cls`; `source` names the file in errors. ConfigError if it can't."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    return from_table(cls, table, source)


def load_file(cls: type[T], path: Path) -> T:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    return load(cls, text, str(path))


def from_table(cls: type[T], table: dict[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(fields))}")
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {name} is missing")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        items = _typed(value, list, where)
        inner = typing.get_args(kind)[0]
        return tuple(_value(inner, item, f"{where}[{i}]") for i, item in enumerate(items))
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        named = _typed(value, dict, where, "a table")
        return {name: _value(inner, item, f"{where}.{name}") for name, item in named.items()}
    try:
        if kind is Duration:
            return Duration(parse_duration(_typed(value, str, where, 'a duration in quotes, like "30s"')))
        if kind is Size:
            return Size(parse_size(_typed(value, str, where, 'a size in quotes, like "256M"')))
        if kind is Path:
            return Path(_typed(value, str, where))
        if isinstance(kind, type) and issubclass(kind, Enum):
            return kind(value)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if dataclasses.is_dataclass(kind):
        return from_table(typing.cast("type[Any]", kind), _typed(value, dict, where, "a table"), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _typed(value, kind, where)


def _typed(value: Any, kind: type, where: str, wanted: str = "") -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {
            str: "text in quotes",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            list: "a list",
            dict: "a table",
        }
        raise ConfigError(f"{where}: must be {wanted or names[kind]}, not {value!r}")
    return value

"""Configurations: nested frozen dataclasses from TOML tables, and back.

Errors name the key, and for an unknown key the most similar known one. The module does not depend on the dataclasses.
"""

from __future__ import annotations

import difflib
import functools
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from eventrnn._checks import need_text
from eventrnn._files import printable

# Names of TOML types in error messages.
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}


def need_file_name(name: str, value: str) -> None:
    """Refuse a name of a file that is not UTF-8, which the system allows and a configuration cannot hold."""
    try:
        need_text(name, value).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: the name {printable(value)} is not UTF-8; give another name, or a link") from None


def read_toml(text: str, source: str | Path) -> dict[str, Any]:
    """The tables of a TOML text. Raises `ValueError` with the position of a syntax error."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        # Of the syntax, or of a number with too many digits.
        raise ValueError(f"config: {source}: no valid TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"config: {source}: its arrays or tables are nested too deeply to be read") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """("training.batch", 16) from "training.batch=16". The value is TOML; a value that is not valid TOML is text."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"set: got {text!r}, need key=value such as training.batch=16")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return key.strip(), value.strip()


def merged(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge tables into one. For a key in several tables the value of the last one is used; inner tables are merged."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            inner = result.get(key)
            both = isinstance(value, Mapping) and isinstance(inner, Mapping)
            result[key] = merged([inner, value]) if both else value  # pyright: ignore[reportArgumentType]
    return result


def nested(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nested tables from pairs of dotted keys and values."""
    tables = []
    for key, value in settings:
        for part in reversed(key.split(".")):
            value = {part: value}
        tables.append(value)
    return merged(tables)


def from_table(cls: Any, table: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass from a table. Fields that are not in the table have their default values.

    Raises `ValueError` for an unknown key (with the most similar known one), for a value of another type, and for a
    value that the dataclass refuses.
    """
    hints, known = _hints(cls), [field.name for field in fields(cls)]
    values = {}
    for key, value in table.items():
        name = f"{where}.{key}" if where else key
        if key not in known:
            raise ValueError(f"config: unknown key {name}; {_nearest(key, known, cls, where)}")
        values[key] = _value(hints[key], value, name)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"config: {where}: {error}" if where else f"config: {error}") from None


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The types of the fields of a dataclass. To evaluate them takes most of the time of reading a small table."""
    return typing.get_type_hints(cls)


def to_toml(config: Any) -> str:
    """A dataclass as TOML with every key written out. `read_toml` and `from_table` restore it."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(config: Any, where: str) -> list[str]:
    inner = [field.name for field in fields(config) if is_dataclass(getattr(config, field.name))]
    plain = [field.name for field in fields(config) if field.name not in inner]
    lines = [f"[{where}]"] if where and plain else []
    lines += [f"{name} = {_text(getattr(config, name))}" for name in plain]
    for name in inner:
        lines += ["", *_lines(getattr(config, name), f"{where}.{name}" if where else name)]
    return lines


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str):
        # JSON writes the control character 127 as it is, which TOML refuses.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _value(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"config: {name}: got {value!r}, need a table [{name}]")
        return from_table(hint, value, name)
    if isinstance(hint, types.UnionType):
        matching = [each for each in typing.get_args(hint) if _fits(each, value)]
        if matching:
            return _value(matching[0], value, name)
        hint = typing.get_args(hint)[0]
    if not _fits(hint, value):
        what = WORDS.get(hint, "a list")
        raise ValueError(f"config: {name}: got {value!r}, need {what}")
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_value(item, each, f"{name}[{k}]") for k, each in enumerate(value))
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list | tuple)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _nearest(key: str, known: list[str], cls: Any, where: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {f'{where}.' if where else ''}{close[0]}?"
    # The most common mistake is a known key in the wrong table.
    for name, hint in _hints(cls).items():
        if is_dataclass(hint) and key in (field.name for field in fields(hint)):  # pyright: ignore[reportArgumentType]
            return f"did you mean {f'{where}.' if where else ''}{name}.{key}?"
    return f"have {', '.join(known)}"

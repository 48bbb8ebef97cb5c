"""A configuration as TOML text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["dump"]

BARE = re.compile(r"[A-Za-z0-9_-]+")


def dump(tables: Mapping[str, Any], comments: Iterable[str] = ()) -> str:
    """TOML of *tables*: tables, ``device`` as a list of tables, and inline tables in those."""
    parts = [f"# {one}" for one in comments]
    for name, table in tables.items():
        if isinstance(table, list):
            for one in table:
                parts += ["", f"[[{name}]]", *_lines(one)]
        elif table:
            parts += ["", f"[{name}]", *_lines(table)]
    return "\n".join(parts).strip("\n") + "\n"


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    """A basic string, whose escapes are JSON's; a character beyond 16 bits stands for itself."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    return _text(str(value))

"""Text in QEMU's manner, ``key=value,key=value``, for the shorthands of drives, networks and the like."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from cardcage.errors import near

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["join_pairs", "parse_pairs", "parse_repeated", "split_pairs", "typed_pairs"]

TRUTH = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}


def parse_repeated(text: str, first: str = "") -> list[tuple[str, str]]:
    """The pairs of *text* in order; ``,,`` stands for a comma; *first* is the key of a first part without a key.

    Raises :exc:`ValueError` for a part that is no pair.
    """
    found = []
    for at, part in enumerate(split_pairs(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if at or not first:
                raise ValueError(f'"{part}": expected key=value')
            key, value = first, part
        found.append((key, value))
    return found


def parse_pairs(text: str, first: str = "") -> dict[str, str]:
    """The same as a table. Raises :exc:`ValueError` also for a key that is given twice."""
    found: dict[str, str] = {}
    for key, value in parse_repeated(text, first):
        if key in found:
            raise ValueError(f'"{key}" is given twice')
        found[key] = value
    return found


def split_pairs(text: str) -> list[str]:
    """The parts of *text* between its commas; ``,,`` stands for a comma in one."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def join_pairs(parts: Iterable[str]) -> str:
    """The inverse of :func:`split_pairs`."""
    return ",".join(part.replace(",", ",,") for part in parts)


def typed_pairs(pairs: Iterable[tuple[str, str]], cls: Any) -> dict[str, Any]:
    """A table of *pairs* for an options class, which says what each text is: of any card, since nothing else knows.

    ``on off yes no true false`` for bool, ``0x40`` for int, a key again and again for a list; text for all else that a
    configuration writes as text. A dot leads into a table, inside of which values are what they look like.

    Args:
        cls: an attrs class or dataclass; None for options that nobody knows: all is what it looks like.

    Raises :exc:`ValueError` with the key, what was expected and near matches.
    """
    kinds = get_type_hints(cls) if cls is not None else {}
    known = [one.name for one in getattr(cls, "__attrs_attrs__", ())] or [*getattr(cls, "__dataclass_fields__", ())]
    found: dict[str, Any] = {}
    for path, text in pairs:
        *tables, key = path.split(".")
        name = path.partition(".")[0]
        if cls is not None and name not in known:
            hint = near(name, known) or f" Known: {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f'no key "{name}".{hint}')
        table = found
        for one in tables:
            table = table.setdefault(one, {})
            if not isinstance(table, dict):
                raise ValueError(f'"{path}": "{one}" is already given as text')
        if isinstance(table.get(key), dict):
            raise ValueError(f'"{path}" is already given as a table')
        kind = None if tables else kinds.get(name)
        if get_origin(kind) in (list, tuple, set, frozenset):
            table.setdefault(key, []).append(_value(key, text, get_args(kind)[0]))
        elif key in table:
            raise ValueError(f'"{path}" is given twice')
        else:
            table[key] = _value(key, text, kind)
    return found


def _value(key: str, text: str, kind: Any) -> Any:
    kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]) - {NoneType}
    if kinds == {bool}:
        if text not in TRUTH:
            raise ValueError(f'{key}: expected on or off, got "{text}"')
        return TRUTH[text]
    if kinds in ({int}, {float}, {int, float}):
        try:
            return float(text) if float in kinds else int(text, 0)
        except ValueError as error:
            whole = "" if float in kinds else "whole "
            raise ValueError(f'{key}: expected a {whole}number, got "{text}"') from error
    return _guessed(text) if kind is None or kinds & {Any, object} else text


def _guessed(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text, 0)
    except ValueError:
        return text

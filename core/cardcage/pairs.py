"""Text in QEMU's manner, ``key=value,key=value``, for the shorthands of drives, networks and the like."""

from __future__ import annotations

__all__ = ["parse_pairs", "parse_repeated"]


def parse_repeated(text: str, first: str = "") -> list[tuple[str, str]]:
    """The pairs of *text* in order; ``,,`` stands for a comma; *first* is the key of a first part without a key.

    Raises :exc:`ValueError` for a part that is no pair.
    """
    found = []
    for at, part in enumerate(text.replace(",,", "\0").split(",")):
        part = part.replace("\0", ",")
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

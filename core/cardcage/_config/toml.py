"""TOML of a configuration, with bounds on what it can make grow."""

from __future__ import annotations

import re
import tomllib
from typing import Any

DEEPEST = 64
"""Tables and lists in one another, and the parts of a key."""
BITS = 128
"""The most that a number has."""

# Strings and comments, each to its end or the text's: nothing is looked at twice, whatever the text.
_OPAQUE = re.compile(
    r'"""(?>(?:[^\\"]|\\.|"(?!""))*)(?:"""|\Z)|'
    r"'''(?>(?:[^']|'(?!''))*)(?:'''|\Z)|"
    r'"(?>(?:[^\\"\n]|\\.)*)"?|'
    r"'[^'\n]*'?|"
    r"#[^\n]*",
    re.DOTALL,
)
_LONG_KEY = re.compile(rf"(?>(?:[\w-]+[ \t]*\.[ \t]*){{{DEEPEST}}})[\w-]")


def parse_toml(text: str) -> dict[str, Any]:
    """The table of *text*. Raises :exc:`ValueError` that says what is wrong, in time and memory linear in *text*."""
    # The parser takes time and memory by the square of a key's parts.
    if _LONG_KEY.search(_OPAQUE.sub(lambda found: "#" if found[0][0] == "#" else "s", text)):
        raise ValueError(f"a key of more than {DEEPEST} parts")
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEEPEST}") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python's own limit
        raise ValueError(f"a number of more than {BITS} bits") from error
    check_bounds(table)
    return table


def check_bounds(value: Any) -> None:
    """Raise :exc:`ValueError` for what is nested deeper, or a greater number, than any configuration has."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST}")
        below: dict[int, Any] = {}  # by identity: a table of Python's may be in itself
        for one in level:
            inner = one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
            below |= {id(value): value for value in inner}
            if isinstance(one, int) and one.bit_length() > BITS:
                raise ValueError(f"a number of {one.bit_length()} bits: expected at most {BITS}")
        level, depth = list(below.values()), depth + 1

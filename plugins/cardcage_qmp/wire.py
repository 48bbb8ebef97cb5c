"""The text on the wire: JSON values one after another, as QEMU's own parser takes them (docs/interop/qmp-spec.txt).

They need no line of their own, and a text may stand in single quotes. A peer is hostile: a value has at most
:data:`MOST` bytes and is :data:`DEEPEST` deep.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["DEEPEST", "MOST", "JsonError", "Splitter", "TooMuch", "dump", "load"]

MOST = 1 << 20
"""Bytes of one value."""
DEEPEST = 64
_SPECIAL = re.compile(rb"[\[\]{}\"'\\]")
_TEXTS = re.compile(r"'((?:[^'\\]|\\.)*+)'|\"(?:[^\"\\]|\\.)*+\"|['\"].*", re.DOTALL)
"""Texts; one without an end takes all the rest, so that the time grows with the length alone."""
_WRITTEN = re.compile(r"\\(.)|\"", re.DOTALL)


class JsonError(ValueError):
    """The line is no JSON."""


class TooMuch(Exception):
    """A value without an end in sight: nothing after it can be made out."""


class Splitter:
    """Cuts what arrives into JSON objects and arrays; what stands between them is cut at the end of its line."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._seen = self._depth = 0  # bytes of what is held that were looked at; brackets open
        self._quote = 0
        self._line = False  # text outside of objects, to the end of the line

    def feed(self, data: bytes) -> list[bytes]:
        """Whole values, in their order. Raises TooMuch."""
        self._held += data
        found = []
        while (end := self._end()) >= 0:
            found.append(bytes(self._held[:end]))
            del self._held[:end]
            self._seen = self._quote = 0
        if len(self._held) > MOST:
            raise TooMuch(f"JSON token size limit exceeded: more than {MOST} bytes")
        return found

    def _end(self) -> int:
        """Where the value that begins what is held ends; -1 where that is not known yet."""
        held = self._held
        if self._seen == 0 and not self._line:
            start = len(held) - len(held.lstrip(b" \t\r\n\xff"))
            del held[:start]
            self._line = bool(held) and held[0] not in b"{["
        if self._line:
            at = held.find(b"\n")
            self._line = at < 0 and bool(held)
            return at
        while (special := _SPECIAL.search(held, self._seen)) is not None:
            at, byte = special.start(), held[special.start()]
            if byte == 0x5C:  # a backslash takes the next byte with it
                if at + 1 == len(held):
                    self._seen = at
                    return -1
                self._seen = at + 2
                continue
            self._seen = at + 1
            if self._quote:
                self._quote = 0 if byte == self._quote else self._quote
            elif byte in b"\"'":
                self._quote = byte
            else:
                self._depth += 1 if byte in b"{[" else -1
                if self._depth > DEEPEST:
                    raise TooMuch("JSON nesting depth limit exceeded")
                if self._depth == 0:
                    return self._seen
        self._seen = len(held)
        return -1


def load(text: bytes) -> Any:
    """The value. Raises JsonError."""
    try:
        words = text.decode()
        if "'" in words:
            words = _TEXTS.sub(_doubled, words)
        return json.loads(words, object_pairs_hook=_table, parse_constant=_refuse)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(f"JSON parse error, {error}") from error


def _doubled(found: re.Match[str]) -> str:
    if found[1] is None:  # in double quotes, or without an end
        return found[0]
    inner = _WRITTEN.sub(lambda one: '\\"' if one[0] == '"' else "'" if one[1] == "'" else one[0], found[1])
    return f'"{inner}"'


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise JsonError("JSON parse error, duplicate key")
    return table


def _refuse(word: str) -> Any:
    raise JsonError(f"JSON parse error, invalid keyword '{word}'")


def dump(value: Any, *, pretty: bool = False) -> bytes:
    """A line for the peer."""
    return json.dumps(value, indent=4 if pretty else None).encode() + b"\r\n"

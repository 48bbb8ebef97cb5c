"""QEMU's text for options: ``value,key=value,flag``, with commas doubled, or one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from cardcage.errors import ConfigError

__all__ = ["Options", "of_table", "parse", "size_of", "split"]

MOST = 1 << 20
DEEPEST = 16
FRACTION = re.compile(r"[0-9]+\.[0-9]+")
UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def split(text: str) -> list[str]:
    """The parts of *text* between its commas; two of them are one in a part."""
    parts, part, at = [], "", 0
    while at < len(text):
        if text[at] != ",":
            part += text[at]
        elif text[at + 1 : at + 2] == ",":
            part += ","
            at += 1
        else:
            parts.append(part)
            part = ""
        at += 1
    return [*parts, part]


def size_of(text: str, unit: str = "b") -> int:
    """Bytes of a size such as ``512``, ``1.5G`` or ``1048576k``; *unit* is that of a bare number. Raises ValueError."""
    word, last = text.strip(), text.strip()[-1:].lower()
    if last in UNITS:
        word, unit = word[:-1], last
    if not word or word[0] not in "0123456789" or len(word) > 32:
        raise ValueError(f'expected a size such as 512M, got "{text}"')
    try:
        number: int | float = int(word, 0) if word.lower().startswith("0x") else int(word)
    except ValueError:
        if not FRACTION.fullmatch(word):
            raise ValueError(f'expected a size such as 512M, got "{text}"') from None
        number = float(word)
    found = int(number * (1 << UNITS[unit]))
    if found >= 1 << 63:
        raise ValueError(f'expected a size such as 512M, got "{text}"')
    return found


def parse(option: str, text: str, first: str = "") -> Options:
    """The pairs in *text*. Raises ConfigError that names *option*.

    Args:
        first: the key of a first part without one.
    """
    if len(text) > MOST:
        raise ConfigError("expected less than 1 MiB of text", file=option)
    if text.startswith("{"):
        return Options(option, text, list(_of_json(option, text)))
    pairs = []
    for at, part in enumerate(split(text)):
        key, equals, value = part.partition("=")
        if equals:
            pairs.append((key, value))
        elif not at and first:
            pairs.append((first, part))
        elif part:
            pairs.append((part[2:], "off") if part.startswith("no") and len(part) > 2 else (part, "on"))
        elif at:
            raise ConfigError("expected key=value between its commas", file=f"{option} {text}")
    return Options(option, text, pairs)


def of_table(option: str, table: dict[str, Any]) -> Options:
    """The pairs of a table as JSON has them. Raises ConfigError that names *option*."""
    return Options(option, "", list(_flat(option, "", table, DEEPEST)))


def _of_json(option: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", file=f"{option} {text:.60}") from error
    yield from _flat(option, "", found, DEEPEST)


def _flat(option: str, path: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Tables and lists as dotted keys, which is what QEMU has outside of JSON."""
    if depth == 0:
        raise ConfigError(f"expected at most {DEEPEST} tables in one another", file=option)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(option, f"{path}.{key}" if path else key, inner, depth - 1)
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _flat(option, f"{path}.{at}", inner, depth - 1)
    elif value is None:
        yield path, ""
    elif isinstance(value, bool):
        yield path, "on" if value else "off"
    else:
        yield path, str(value)


class Options:
    """The pairs of one option of the command line. Each is taken once; :meth:`end` refuses what nobody took.

    Attributes:
        option: the option's word, ``-device``. text: what was said.
    """

    def __init__(self, option: str, text: str, pairs: list[tuple[str, str]]) -> None:
        self.option, self.text, self.pairs = option, text, pairs

    def error(self, problem: str) -> ConfigError:
        """An error that names the option."""
        return ConfigError(problem, file=f"{self.option} {self.text}".rstrip() if len(self.text) < 200 else self.option)

    def all(self, key: str) -> list[str]:
        """All values of *key*, in order."""
        found = [value for name, value in self.pairs if name == key]
        self.pairs = [pair for pair in self.pairs if pair[0] != key]
        return found

    def take(self, *keys: str) -> str | None:
        """The last value of the first of *keys* that is there; None without one."""
        values = [self.all(key) for key in keys]
        return next((one[-1] for one in values if one), None)

    def first(self) -> str:
        """The part before the first comma as it stands, an equals sign and all. Takes it."""
        del self.pairs[:1]
        return split(self.text)[0]

    def need(self, *keys: str) -> str:
        """The same. Raises ConfigError where there is none."""
        found = self.take(*keys)
        if not found:
            raise self.error(f"expected {keys[0]}=...")
        return found

    def truth(self, *keys: str) -> bool | None:
        """A truth value; None where it is not given."""
        found = self.take(*keys)
        if found is None:
            return None
        if found.lower() in ("on", "yes", "true", "y"):
            return True
        if found.lower() in ("off", "no", "false", "n"):
            return False
        raise self.error(f'{keys[0]}: expected on or off, got "{found}"')

    def number(self, *keys: str) -> int | None:
        """A whole number."""
        found = self.take(*keys)
        if found is None:
            return None
        try:
            if len(found) > 32:
                raise ValueError
            return int(found, 0)
        except ValueError as error:
            raise self.error(f'{keys[0]}: expected a whole number, got "{found:.40}"') from error

    def size(self, key: str, unit: str = "b") -> int | None:
        """A size in bytes."""
        found = self.take(key)
        try:
            return None if found is None else size_of(found, unit)
        except ValueError as error:
            raise self.error(f"{key}: {error}") from error

    def harmless(self, **known: str) -> None:
        """Take keys that change nothing here at these values (by spaces; empty for any). A ``_`` is a dash too."""
        for word, values in known.items():
            for key in {word, word.replace("_", "-"), word.replace("__", ".")}:
                for value in self.all(key):
                    if values and value not in values.split():
                        raise self.error(f"{key}={value}: cardcage has {' or '.join(values.split())} alone")

    def end(self) -> None:
        """Raises ConfigError for a pair that nobody took."""
        if self.pairs:
            key, value = self.pairs[0]
            raise self.error(f"{key}={value}: cardcage has no such thing")

"""Values with a unit, as configurations write them: ``memory = "512M"``, ``timeout = "1.5s"``."""

from __future__ import annotations

import re

__all__ = ["Duration", "Size", "say_size"]

_SIZE = re.compile(r"(\d{1,40})(?:\.(\d{1,40}))?\s*([kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d{1,40}(?:\.\d{1,40})?)\s*(ns|us|ms|s|m|h|)", re.ASCII)
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


class Size(int):
    """Bytes: an integer, or text with a binary suffix (``"512M"``, ``"1.5G"``, ``"64k"``, ``"2GiB"``).

    Raises :exc:`ValueError` for anything else, below 0, or not a whole number of bytes.
    """

    def __new__(cls, value: int | str) -> Size:
        if isinstance(value, str):
            found = _SIZE.fullmatch(value.strip())
            if found is None:
                raise ValueError(f'expected a size such as "512M" or a number of bytes, got "{value}"')
            digits, unit = found[1] + (found[2] or ""), 1024 ** " kmgt".index(found[3].lower() or " ")
            size, rest = divmod(int(digits) * unit, 10 ** len(found[2] or ""))
            if rest:
                raise ValueError(f'"{found[0]}" is not a whole number of bytes')
        elif isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f'expected a size such as "512M" or a number of bytes, got {value!r}')
        else:
            size = value
        if size < 0:
            raise ValueError(f"a size cannot be below 0, got {size}")
        return super().__new__(cls, size)

    def __str__(self) -> str:
        """The shortest exact form: ``512 MiB``."""
        for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
            if self and self % 1024**power == 0:
                return f"{int(self) // 1024**power} {unit}"
        return f"{int(self)} bytes"


class Duration(float):
    """Seconds: a number, or text with a unit out of ``ns us ms s m h`` (``"250ms"``, ``"2m"``).

    Raises :exc:`ValueError` for anything else, or below 0.
    """

    def __new__(cls, value: float | str) -> Duration:
        if isinstance(value, str):
            found = _DURATION.fullmatch(value.strip())
            if found is None:
                raise ValueError(f'expected a time such as "250ms" or a number of seconds, got "{value}"')
            value = float(found[1]) * _SECONDS[found[2]]
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f'expected a time such as "250ms" or a number of seconds, got {value!r}')
        if not 0 <= value < float("inf"):
            raise ValueError(f"a time is a finite number of seconds, 0 or more, got {value}")
        return super().__new__(cls, value)


def say_size(size: int) -> str:
    """Bytes for a person, rounded: ``1.5 GiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(size) >= 1024**power:
            return f"{size / 1024**power:.4g} {unit}"
    return f"{size} bytes"

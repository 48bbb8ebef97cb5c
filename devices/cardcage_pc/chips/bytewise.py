"""Wide accesses to chips with an eight-bit data bus: done byte by byte at rising addresses, low byte first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["read_bytes", "write_bytes"]


def read_bytes(get: Callable[[int], int], offset: int, size: int, /) -> int:
    """Read *size* bytes from *offset*; ``get(offset)`` reads a byte."""
    if size == 1:
        return get(offset)
    value = 0
    for at in range(size):
        value |= get(offset + at) << 8 * at
    return value


def write_bytes(put: Callable[[int, int], None], offset: int, size: int, value: int, /) -> None:
    """Write *size* bytes of *value* from *offset*; ``put(offset, byte)`` writes a byte."""
    for at in range(size):
        put(offset + at, value >> 8 * at & 0xFF)

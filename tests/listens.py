"""When a server can be connected to: its socket's name is there a moment before it listens."""

from __future__ import annotations

from pathlib import Path

__all__ = ["listens"]

LISTENS = 0x10000
"""``__SO_ACCEPTCON``, the flag of proc(5), /proc/net/unix."""


def listens(path: Path | str) -> bool:
    """True once somebody of this network namespace listens at *path*, which nobody has to connect to for that."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7] == str(path) and int(words[3], 16) & LISTENS:
            return True
    return False

"""Which pages of RAM have not come yet: a byte for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.ram import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

__all__ = ["Missing"]


class Missing:
    """Pages of *size* bytes of RAM, none of them missing so far; or as *table* has it. Attribute ``count``."""

    def __init__(self, size: int, table: Buffer | None = None) -> None:
        self.size = size
        self.table = bytearray(-(-size // PAGE)) if table is None else bytearray(table)
        self.count = self.table.count(1)

    def add(self, runs: Iterable[tuple[int, int]]) -> None:
        """These are missing."""
        for offset, length in runs:
            first, last = offset // PAGE, (offset + length) // PAGE
            self.count += last - first - self.table.count(1, first, last)
            self.table[first:last] = b"\1" * (last - first)

    def has_all(self, offset: int, size: int) -> bool:
        """All of these are missing."""
        first, last = offset // PAGE, (offset + size) // PAGE
        return self.table.count(1, first, last) == last - first

    def remove(self, offset: int, size: int) -> None:
        """These, all of which were missing, are not any more."""
        first, last = offset // PAGE, (offset + size) // PAGE
        self.table[first:last] = bytes(last - first)
        self.count -= last - first

    def next_run(self, offset: int, most: int) -> tuple[int, int] | None:
        """The next run from *offset* on, round the end, of *most* bytes at most; None when nothing is missing."""
        first = self.table.find(1, offset // PAGE)
        if first < 0:
            first = self.table.find(1)
            if first < 0:
                return None
        last = self.table.find(0, first, first + most // PAGE)
        last = min(first + most // PAGE, len(self.table)) if last < 0 else last
        return first * PAGE, (last - first) * PAGE

    def runs(self) -> Iterator[tuple[int, int]]:
        """All of them, in order."""
        at, end = 0, len(self.table)
        while (first := self.table.find(1, at)) >= 0:
            at = self.table.find(0, first)
            at = end if at < 0 else at
            yield first * PAGE, (at - first) * PAGE

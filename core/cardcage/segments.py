"""Many parts of guest RAM at once, without an object for each.

A transfer of 1 MiB is some 250 pages, anywhere in RAM. A view of each costs more than the kernel's whole copy of it; so
long requests carry :class:`Segments`, which makes views when it is asked for them and else hands out what the kernel
wants: an array of addresses and lengths (struct iovec, readv(2)). Ask ``type(parts) is Segments``: :func:`isinstance`
takes as long as several views where abstract base classes are involved.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from operator import add
from typing import TYPE_CHECKING, final, overload

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Areas", "Segments", "total"]


def _pairs(firsts: Sequence[int], seconds: Sequence[int]) -> array[int]:
    """The two, by turns, as 64-bit words."""
    found = array("Q", bytes(16 * len(firsts)))
    found[::2], found[1::2] = array("Q", firsts), array("Q", seconds)
    return found


@final
class Areas(Sequence[tuple[int, int]]):
    """(guest-physical address, length) ranges.

    Attributes:
        size: bytes of all.
    """

    __slots__ = ("_addresses", "_lengths", "size")

    def __init__(self, addresses: list[int], lengths: list[int]) -> None:
        self._addresses, self._lengths, self.size = addresses, lengths, sum(lengths)

    def __len__(self) -> int:
        return len(self._addresses)

    @overload
    def __getitem__(self, at: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, at: slice) -> Areas: ...

    def __getitem__(self, at: int | slice) -> tuple[int, int] | Areas:
        if isinstance(at, slice):
            return Areas(self._addresses[at], self._lengths[at])
        return self._addresses[at], self._lengths[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._addresses, self._lengths, strict=True)

    def words(self) -> array[int]:
        """Addresses and lengths by turns."""
        return _pairs(self._addresses, self._lengths)


@final
class Segments(Sequence[memoryview]):
    """Views of parts of RAM, one after another.

    Args:
        ram: the stretch that they lie in; kept from going away as any view of it keeps it.
        starts, lengths: in *ram*, in bytes. All of them lie inside: the caller has checked.

    Attributes:
        size: bytes of all.
    """

    __slots__ = ("_lengths", "_ram", "_starts", "size")

    def __init__(self, ram: memoryview, starts: list[int], lengths: list[int]) -> None:
        self._ram, self._starts, self._lengths, self.size = ram[:], starts, lengths, sum(lengths)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, at: int) -> memoryview: ...

    @overload
    def __getitem__(self, at: slice) -> Segments: ...

    def __getitem__(self, at: int | slice) -> memoryview | Segments:
        if isinstance(at, slice):
            return Segments(self._ram, self._starts[at], self._lengths[at])
        start = self._starts[at]
        return self._ram[start : start + self._lengths[at]]

    def __iter__(self) -> Iterator[memoryview]:
        return map(self._ram.__getitem__, map(slice, self._starts, map(add, self._starts, self._lengths)))

    def iovec(self) -> array[int]:
        """An array of struct iovec in this process; good for as long as this object is."""
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        return _pairs([base + start for start in self._starts], self._lengths)


def total(parts: Sequence[memoryview]) -> int:
    """Bytes of all *parts*."""
    return parts.size if type(parts) is Segments else sum(map(len, parts))

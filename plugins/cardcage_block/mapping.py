"""The L2 tables of a qcow2 image: where guest bytes lie. Looks only; the image itself changes the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_block.layout import COMPRESSED, COPIED, OFFSET, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_block.header import Header
    from cardcage_block.layout import Tables

__all__ = ["DATA", "PACKED", "UNALLOCATED", "ZEROS", "Mapping"]

UNALLOCATED, DATA, ZEROS, PACKED = range(4)


class Mapping:
    """The guest's view of an image.

    Args:
        corrupt: marks the image as corrupt and gives the error to raise.

    Attributes:
        zero: the bit of an entry whose cluster reads as zeros; 0 for version 2, which has none.
        offset: the bits of an entry that say where its cluster lies. flags: all others.
    """

    def __init__(self, header: Header, tables: Tables, corrupt: Callable[[str], OSError]) -> None:
        self._bits, self._size, self._mask = header.cluster_bits, header.cluster_size, header.cluster_size - 1
        self.offset = OFFSET & ~self._mask
        self.flags = ~self.offset & ((1 << 64) - 1)
        self.zero = ZERO if header.version >= 3 else 0
        self._tables, self._l2, self._metadata, self._corrupt = tables, tables.l2, tables.metadata, corrupt
        self._slices, self._slice_bits, self._slice_mask = self._l2.slices, self._l2.bits, self._l2.mask

    def _run(self, offset: int, length: int) -> int:
        """The first L2 entry of a range that lies in the file as one run with the same flags, by one slice in memory;
        0 when it does not, or no slice can say so."""
        first, last = offset >> self._bits, (offset + length - 1) >> self._bits
        table, at = self._slices.get(first >> self._slice_bits), first & self._slice_mask
        if table is None:
            return 0
        entry, count = table[at], last - first + 1
        run = range(entry, entry + count * self._size, self._size)
        return entry if count < 2 or table[at : at + count].tolist() == list(run) else 0

    def readable(self, offset: int, length: int) -> int:
        """Where a range lies in the file as one run of plain data, 0 when it does not or no slice can say so."""
        entry = self._run(offset, length)
        host = entry & self.offset
        return host + (offset & self._mask) if host and not entry & (COMPRESSED | self.zero) else 0

    def overwritable(self, offset: int, length: int) -> int:
        """As :meth:`readable`, of a run that is the disk's own."""
        entry = self._run(offset, length)
        if entry & self.flags != COPIED:
            return 0
        host = (entry ^ COPIED) + (offset & self._mask)
        first, last = host >> self._bits, host + length - 1 >> self._bits
        fine = self._metadata.isdisjoint(range(first, last + 1)) and last << self._bits < self._tables.end
        return host if fine else 0

    def kind(self, entry: int) -> int:
        if entry & COMPRESSED:
            return PACKED
        if entry & self.zero:
            return ZEROS
        return DATA if entry & self.offset else UNALLOCATED

    def extent(self, offset: int, limit: int) -> tuple[int, int, int]:
        """(kind, offset in the file or compressed entry, length) of the run at guest *offset*, at most *limit*."""
        cluster, inside = offset >> self._bits, offset & self._mask
        entry = self._l2.get(cluster)
        kind, length, host = self.kind(entry), self._size - inside, entry & self.offset
        if kind == PACKED:
            return kind, entry, min(length, limit)
        follow = host
        while length < limit:
            cluster, follow = cluster + 1, follow + self._size
            entry = self._l2.get(cluster)
            if self.kind(entry) != kind or (kind == DATA and entry & self.offset != follow):
                break
            length += self._size
        return kind, host + inside, min(length, limit)

    def whole(self, offset: int, length: int, size: int) -> tuple[int, int]:
        """The first guest cluster wholly inside the range and the first behind; one cut by the disk's *size* counts."""
        end = offset + length
        last = -(-end >> self._bits) if end >= size else end >> self._bits
        return -(-offset >> self._bits), last

    def in_place(self, entry: int) -> int:
        """Where the cluster of *entry* may be overwritten, 0 when it has to be allocated."""
        if entry & self.flags & ~self.zero != COPIED or not entry & self.offset:
            if entry & self.flags & ~(COPIED | self.zero) and not entry & COMPRESSED:
                raise self._corrupt(f"L2 entry {entry:#x}: reserved bits are set")
            return 0
        host = entry & self.offset
        if host >> self._bits in self._metadata or host >= self._tables.end:
            raise self._corrupt(f"L2 entry {entry:#x}: names metadata, or lies past the end")
        return host

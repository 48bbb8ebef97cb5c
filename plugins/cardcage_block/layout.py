"""Where an open qcow2 image has its tables: header, L1, L2, reference counts, and which clusters hold metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import ConfigError

from cardcage_block.hostfile import zeros
from cardcage_block.tables import Refcounts, SliceCache, read_array, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_block.header import Header
    from cardcage_block.hostfile import File

__all__ = ["COMPRESSED", "COPIED", "OFFSET", "ZERO", "Tables"]

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET = 0x00FFFFFFFFFFFE00
L2_CACHE = 8192
"""Slices of 4 KiB, each for 512 clusters: 32 MiB for 256 GiB of disk at the usual cluster size."""
MAX_SNAPSHOT_ENTRIES = 1 << 27
MAX_METADATA = 1 << 23
"""Clusters of tables that an image may have; an L1 table of QEMU's largest size names half as many."""


class Tables:
    """The tables of an open image: header, L1, L2 slices, reference counts, and which clusters hold metadata."""

    def __init__(self, file: File, header: Header, corrupt: Callable[[str], OSError]) -> None:
        self.file, self.header = file, header
        self._corrupt = corrupt
        bits = header.cluster_bits
        self.end = (file.size() + header.cluster_size - 1) >> bits << bits
        self.l2_bits = bits - 3

        def fits(what: str, offset: int, length: int) -> None:
            if offset + length > self.end:
                raise ConfigError(f"truncated qcow2 image: its {what} at {offset:#x} lies past the end", file=file.path)

        fits("L1 table", header.l1_offset, header.l1_size * 8)
        fits("refcount table", header.reftable_offset, header.reftable_clusters << bits)
        self.snapshots, length = header.read_snapshots(lambda at, size: read_bytes(file, at, size), file.path)
        self.l1 = read_array(file, header.l1_offset, header.l1_size)
        self.dirty_l1: set[int] = set()
        reftable = read_array(file, header.reftable_offset, header.reftable_clusters << bits >> 3)
        self.metadata = {0}
        self._note(header.l1_offset, header.l1_size * 8)
        self._note(header.reftable_offset, header.reftable_clusters << bits)
        self._note(header.snapshots_offset, length)
        self.metadata.update((entry & OFFSET) >> bits for entry in self.l1 if entry)
        self.metadata.update(entry >> bits for entry in reftable if entry)
        places = {(one.l1_offset, one.l1_size) for one in self.snapshots}
        if sum(size for _, size in places) > MAX_SNAPSHOT_ENTRIES:
            raise ConfigError("qcow2 image whose snapshots have more than 1 GiB of L1 tables", file=file.path)
        for offset, size in places:
            fits("L1 table of a snapshot", offset, size * 8)
            self._note(offset, size * 8)
            self.metadata.update((entry & OFFSET) >> bits for entry in read_array(file, offset, size) if entry)
            if len(self.metadata) > MAX_METADATA:
                raise ConfigError(f"qcow2 image with more than {MAX_METADATA} clusters of tables", file=file.path)
        self._table_slices = 0
        self.l2 = SliceCache(file, "Q", header.cluster_size, self._locate, L2_CACHE)
        self._table_slices = self.l2_bits - self.l2.bits
        order = header.refcount_order
        self.refcounts = Refcounts(file, reftable, header.reftable_offset, order, bits, self.metadata, corrupt)

    def _note(self, offset: int, length: int) -> None:
        bits = self.header.cluster_bits
        self.metadata.update(range(offset >> bits, -(-(offset + length) >> bits)))

    def _locate(self, key: int) -> int:
        number = key >> self._table_slices
        table = self.l1[number] & OFFSET if number < len(self.l1) else 0
        if not table:
            return 0
        if table & (self.header.cluster_size - 1) or table >= self.end:
            raise self._corrupt(f"L2 table at {table:#x}: not at a cluster's start, or past the end")
        return table + (key & ((1 << self._table_slices) - 1)) * self.l2.count * 8

    def own_table(self, cluster: int) -> int:
        """Give guest *cluster* an L2 table that only the active disk uses; returns the table given up, 0 for none."""
        number = cluster >> self.l2_bits
        entry = self.l1[number]
        if entry & COPIED:
            return 0
        size = self.header.cluster_size
        first, _ = self.refcounts.allocate(1)
        offset, old = first << self.header.cluster_bits, entry & OFFSET
        # Nothing names the new table yet, so its order against everything else does not matter before step 3.
        try:
            content = memoryview(read_bytes(self.file, old, size)) if old else zeros(size)
            self.file.write(offset, [content], size)
        except OSError:
            self.refcounts.drop(first)
            raise
        self.end = max(self.end, offset + size)
        self.metadata.add(first)
        self.l1[number] = offset | COPIED
        self.dirty_l1.add(number)
        return old

    def write_header(self) -> None:
        """Write the fixed fields, which lie in one sector."""
        packed = self.header.pack()
        self.file.write(0, [memoryview(packed)], len(packed))

"""qcow2's tables in memory: a cache of slices with their dirty state, and reference counts with the allocator.

A table (an L2 table, a refcount block) is kept in slices of at most 4 KiB, so that a random read of a large image costs
one small read. A dirty slice stays until it has been written; the order of writes is the image's business.
"""

from __future__ import annotations

import errno
import threading
from array import array
from typing import TYPE_CHECKING

from cardcage_block.hostfile import zeros

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_block.hostfile import File

__all__ = ["Refcounts", "SliceCache", "Writes", "read_array", "read_bytes", "sectors"]

SLICE = 4096

Writes = list[tuple[int, bytes]]
"""Writes: (offset, data)."""


def read_bytes(file: File, offset: int, length: int) -> bytes:
    """*length* bytes at *offset*, zeros past the end."""
    data = bytearray(length)
    with memoryview(data) as view:
        file.read(offset, [view], length)
    return bytes(data)


def read_array(file: File, offset: int, count: int, typecode: str = "Q") -> array[int]:
    """*count* big-endian numbers at *offset*."""
    table = array(typecode)
    table.frombytes(read_bytes(file, offset, count * table.itemsize))
    table.byteswap()
    return table


class SliceCache:
    """Slices of tables, by their number in the sequence of all entries.

    Args:
        file: where the tables are.
        typecode: of the entries, as for :class:`array.array`; single bytes hold narrower entries.
        table_bytes: size of one table.
        locate: ``locate(key)`` gives the offset of a slice in the file, 0 where no table exists (all zeros).
        limit: clean slices are dropped, oldest first, beyond this many.
    """

    def __init__(self, file: File, typecode: str, table_bytes: int, locate: Callable[[int], int], limit: int) -> None:
        self._file, self._typecode, self._locate, self._limit = file, typecode, locate, limit
        self.count = min(table_bytes, SLICE) // array(typecode).itemsize
        self.bits = self.count.bit_length() - 1
        self.mask = self.count - 1
        self.slices: dict[int, array[int]] = {}
        self.dirty: set[int] = set()
        self._writing: set[int] = set()
        self.lock = threading.Lock()

    def load(self, key: int) -> array[int]:
        """The slice *key*, read when it is not here yet."""
        found = self.slices.get(key)
        if found is not None:
            return found
        with self.lock:
            return self._load(key)

    def _load(self, key: int) -> array[int]:
        found = self.slices.get(key)
        if found is None:
            where = self._locate(key)
            if where:
                found = read_array(self._file, where, self.count, self._typecode)
            else:
                found = array(self._typecode, bytes(self.count * array(self._typecode).itemsize))
            if len(self.slices) >= self._limit:
                self._drop_one()
            self.slices[key] = found
        return found

    def _drop_one(self) -> None:
        for old in self.slices:
            if old not in self.dirty and old not in self._writing:
                del self.slices[old]
                return

    def get(self, index: int) -> int:
        """Entry *index*."""
        return self.load(index >> self.bits)[index & self.mask]

    def set(self, index: int, value: int) -> None:
        """Change entry *index*; its table must exist before the slice is written."""
        key = index >> self.bits
        with self.lock:
            self._load(key)[index & self.mask] = value
            self.dirty.add(key)

    def begin(self) -> Writes:
        """Take what is dirty as it is now. One of :meth:`done` and :meth:`undo` has to follow before the next."""
        with self.lock:
            self._writing, self.dirty = self.dirty, set()
            writes = []
            for key in sorted(self._writing):
                table = self.slices[key][:]
                table.byteswap()
                writes.append((self._locate(key), table.tobytes()))
        return writes

    def done(self) -> None:
        """The writes that :meth:`begin` gave are in the file."""
        with self.lock:
            self._writing = set()

    def undo(self) -> None:
        """The writes that :meth:`begin` gave may not be in the file."""
        with self.lock:
            self.dirty |= self._writing
            self._writing = set()

    def forget(self) -> None:
        """Drop all that is clean, because the file was changed beneath."""
        with self.lock:
            kept = self.dirty | self._writing
            for key in [key for key in self.slices if key not in kept]:
                del self.slices[key]


class Refcounts:
    """Reference counts of host clusters. Not thread-safe: the image calls it under its allocation lock.

    Args:
        file: the image file. table: its refcount table, entries as in the file. table_offset: where that is.
        order: width of a count, as a power of two bits. cluster_bits: log2 of the cluster size.
        metadata: numbers of clusters that hold tables; new refcount blocks are added.
        corrupt: called with a sentence when the tables contradict themselves; it raises.
    """

    def __init__(
        self,
        file: File,
        table: array[int],
        table_offset: int,
        order: int,
        cluster_bits: int,
        metadata: set[int],
        corrupt: Callable[[str], OSError],
    ) -> None:
        self._file, self.table, self.table_offset = file, table, table_offset
        self._order, self._cluster_bits, self._metadata, self._corrupt = order, cluster_bits, metadata, corrupt
        self.block_bits = cluster_bits + 3 - order
        self.maximum = (1 << (1 << order)) - 1
        self._packed = 3 - order if order < 3 else 0  # log2 of the counts in a byte
        typecode = "BBBBHIQ"[order]
        self.cache = SliceCache(file, typecode, 1 << cluster_bits, self._locate, 1024)
        self.slice_bits = self.cache.bits + self._packed
        self.dirty_table: set[int] = set()
        self._writing_table: set[int] = set()
        self.moved = self._writing_moved = False
        self.hint = 0
        self.outgrown: list[int] = []

    def _locate(self, key: int) -> int:
        per_block = self.block_bits - self.slice_bits
        block = key >> per_block
        if block >= len(self.table):
            return 0
        offset = self.table[block]
        if not offset:
            return 0
        if offset & ((1 << self._cluster_bits) - 1) or offset >> 56:
            raise self._corrupt(f"refcount block at {offset:#x}: not at a cluster's start")
        return offset + (key & ((1 << per_block) - 1)) * self.cache.count * (1 << max(self._order - 3, 0))

    def get(self, cluster: int) -> int:
        """How often host cluster *cluster* is used."""
        if not self._packed:
            return self.cache.get(cluster)
        byte = self.cache.get(cluster >> self._packed)
        return byte >> ((cluster & ((1 << self._packed) - 1)) << self._order) & self.maximum

    def set(self, cluster: int, value: int) -> None:
        """Set the count; its refcount block must exist (:meth:`cover`)."""
        if self._packed:
            shift = (cluster & ((1 << self._packed) - 1)) << self._order
            byte = self.cache.get(cluster >> self._packed)
            self.cache.set(cluster >> self._packed, byte & ~(self.maximum << shift) | value << shift)
        else:
            self.cache.set(cluster, value)

    def drop(self, cluster: int) -> bool:
        """Count one user less; True when nobody uses the cluster any more."""
        value = self.get(cluster)
        if not value:
            raise self._corrupt(f"cluster {cluster:#x} is used and has no reference count")
        self.set(cluster, value - 1)
        if value == 1:
            self.hint = min(self.hint, cluster)
        return value == 1

    def cover(self, cluster: int) -> bool:
        """Make sure that a refcount block covers *cluster*; True when that took *cluster* itself for the block."""
        block = cluster >> self.block_bits
        if block >= len(self.table):
            self._grow(block)
        if self.table[block]:
            return False
        # A range without a block holds nothing, so the block may be the first cluster that is asked for in it.
        self._fresh(cluster)
        self._adopt(cluster, cluster)
        self.set(cluster, 1)
        return True

    def _adopt(self, cluster: int, place: int) -> None:
        """Make the free cluster *place*, still to be counted, the refcount block that covers *cluster*."""
        block = cluster >> self.block_bits
        size = 1 << self._cluster_bits
        self._file.write(place << self._cluster_bits, [zeros(size)], size)
        self._metadata.add(place)
        self.table[block] = place << self._cluster_bits
        self.dirty_table.add(block)

    def _fresh(self, cluster: int) -> None:
        if cluster in self._metadata:
            raise self._corrupt(f"cluster {cluster:#x} holds metadata and has no reference count")
        if cluster >> (56 - self._cluster_bits):
            raise OSError(errno.EFBIG, "qcow2: the image cannot grow any further")

    def _behind(self) -> int:
        """The first cluster behind everything."""
        end = -(-self._file.size() >> self._cluster_bits)
        if self.moved:  # the new place may not have been written yet
            end = max(end, (self.table_offset >> self._cluster_bits) + (len(self.table) * 8 >> self._cluster_bits))
        return end

    def _grow(self, block: int) -> None:
        """Move the table to a larger place behind everything, for *block* and half as many again."""
        limit = max(8 << 20, 1 << self._cluster_bits) // 8
        per_cluster = (1 << self._cluster_bits) // 8
        old_clusters = len(self.table) // per_cluster
        first = max(self._behind(), (block + 1) << self.block_bits)
        entries = clusters = 0
        while entries < ((first + clusters + len(self._missing(first, clusters))) >> self.block_bits) + 1:
            entries = (((first + clusters * 2) >> self.block_bits) + 2) * 3 // 2
            clusters = -(-entries // per_cluster)
        if clusters * per_cluster > limit:
            raise OSError(errno.EFBIG, "qcow2: the refcount table cannot grow any further")
        old = self.table_offset >> self._cluster_bits
        self.outgrown += range(old, old + old_clusters)
        self.table.extend([0] * (clusters * per_cluster - len(self.table)))
        at = self._place(first, clusters)
        self._metadata.update(range(at, at + clusters))
        self.table_offset = at << self._cluster_bits
        self.moved = True

    def _missing(self, first: int, count: int) -> list[int]:
        """Numbers of the refcount blocks to make for *count* clusters behind themselves from *first* on."""
        blocks: list[int] = []
        while True:
            last = max(first + len(blocks) + count - 1, first)
            need = range(first >> self.block_bits, (last >> self.block_bits) + 1)
            found = [one for one in need if one >= len(self.table) or not self.table[one]]
            if len(found) == len(blocks):
                return found
            blocks = found

    def _place(self, first: int, count: int) -> int:
        """Use *count* consecutive clusters, of those that are all free from *first* on; the first of them."""
        blocks = self._missing(first, count)
        for cluster in range(first, first + len(blocks) + count):
            self._fresh(cluster)
        for at, block in enumerate(blocks):
            self._adopt(block << self.block_bits, first + at)
        for cluster in range(first, first + len(blocks) + count):
            self.set(cluster, 1)
        return first + len(blocks)

    def reserve(self, count: int) -> int:
        """Take *count* consecutive clusters behind everything; the first of them."""
        first = self._behind()
        while (first + count + len(self._missing(first, count))) >> self.block_bits >= len(self.table):
            self._grow((first + count) >> self.block_bits)
            first = self._behind()
        return self._place(first, count)

    def cover_apart(self, cluster: int) -> None:
        """Make sure that a refcount block covers *cluster*, which is in use: a new block goes behind everything."""
        block = cluster >> self.block_bits
        if block >= len(self.table):
            self._grow(block)
        if not self.table[block]:
            place = self.reserve(1)
            if self.table[block]:  # the place itself needed that block
                self.drop(place)
            else:
                self._adopt(cluster, place)

    def allocate(self, count: int) -> tuple[int, int]:
        """Take up to *count* consecutive free clusters: (the first, how many)."""
        first, run = self._free_from(self.hint), 0
        while run < count:
            if self.cover(first + run) or self.get(first + run):
                if run:
                    break
                first = self._free_from(first + 1)
            else:
                self._fresh(first + run)
                run += 1
        for cluster in range(first, first + run):
            self.set(cluster, 1)
        self.hint = first + run
        return first, run

    def _free_from(self, cluster: int) -> int:
        """The next free cluster inside the slice of *cluster*, else where the next slice begins."""
        if self._packed:
            return cluster
        table = self.cache.load(cluster >> self.cache.bits)
        try:
            return (cluster & ~self.cache.mask) + table.index(0, cluster & self.cache.mask)
        except ValueError:
            return (cluster | self.cache.mask) + 1

    def begin(self) -> tuple[Writes, Writes, bool]:
        """Return the first writes; the second, once those are stable; True if the table moved, for the header.

        One of :meth:`done` and :meth:`undo` has to follow before the next.
        """
        blocks = self.cache.begin()
        self._writing_table, self.dirty_table = self.dirty_table, set()
        self._writing_moved, self.moved = self.moved, False
        if self._writing_moved:
            whole = self.table[:]
            whole.byteswap()
            return blocks, [(self.table_offset, whole.tobytes())], True
        return blocks, sectors(self.table, self.table_offset, self._writing_table), False

    def done(self) -> None:
        """The writes that :meth:`begin` gave are in the file."""
        self.cache.done()
        self._writing_table, self._writing_moved = set(), False

    def undo(self) -> None:
        """The writes that :meth:`begin` gave may not be in the file."""
        self.cache.undo()
        self.dirty_table |= self._writing_table
        self.moved |= self._writing_moved
        self._writing_table, self._writing_moved = set(), False

    def take_outgrown(self) -> list[int]:
        """Clusters that earlier places of the table took."""
        taken, self.outgrown = self.outgrown, []
        return taken

    def is_dirty(self) -> bool:
        """True if :meth:`begin` would give anything."""
        return bool(self.cache.dirty or self.dirty_table or self.moved)


def sectors(table: array[int], offset: int, changed: set[int]) -> Writes:
    """The sectors of a *table* at *offset* that hold the *changed* entries."""
    writes = []
    for start in sorted({entry & ~63 for entry in changed}):
        part = table[start : start + 64]
        part.byteswap()
        writes.append((offset + start * 8, part.tobytes()))
    return writes

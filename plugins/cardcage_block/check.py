"""Checking a qcow2 image: each cluster's users are counted anew and compared with its reference count.

The file must not be in use by a writer. Words as in qemu-img: a *leak* is a cluster counted more often than it is used,
which wastes room; a *corruption* is anything that can destroy data.
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.errors import ConfigError

from cardcage_block.compressed import host_range
from cardcage_block.header import AUTOCLEAR_BITMAPS, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, Header
from cardcage_block.layout import COMPRESSED, COPIED, OFFSET, ZERO, Tables
from cardcage_block.tables import read_array, read_bytes, sectors

if TYPE_CHECKING:
    from cardcage_block.hostfile import File

__all__ = ["Report", "check", "repair_counts"]

MAX_CLUSTERS = 1 << 30
SHOWN = 20
_BITMAP = Struct(">QIIBBHI")


@define
class Report:
    """The findings of a check.

    Attributes:
        leaks, corruptions: how many.
        problems: the first few of them, in words.
        allocated: clusters that hold guest data. total: clusters of the guest's disk. compressed: how many are that.
        end: bytes up to the end of the last used cluster.
    """

    leaks: int = 0
    corruptions: int = 0
    problems: list[str] = field(factory=list)
    allocated: int = 0
    total: int = 0
    compressed: int = 0
    end: int = 0
    leaks_fixed: int = 0
    corruptions_fixed: int = 0

    def say(self, problem: str) -> None:
        """Keep *problem* while there are few."""
        if len(self.problems) < SHOWN:
            self.problems.append(problem)


class Counting:
    """Counts how often each host cluster is used."""

    def __init__(self, file: File, header: Header) -> None:
        self.file, self.header, self.report = file, header, Report()
        self.tables = Tables(file, header, self._damaged)
        self.bits, self.size = header.cluster_bits, header.cluster_size
        self.clusters = self.tables.end >> self.bits
        if self.clusters > MAX_CLUSTERS:
            raise ConfigError(f"too large to check: {self.clusters} clusters", file=file.path)
        self.users = array("I", bytes(4 * self.clusters))
        self.report.total = -(-header.size >> self.bits)

    def _damaged(self, problem: str) -> OSError:
        return OSError(problem)

    def corrupt(self, problem: str) -> None:
        """Note a corruption."""
        self.report.corruptions += 1
        self.report.say(f"corrupt: {problem}")

    def use(self, offset: int, length: int, what: str) -> bool:
        """Count one use of the clusters of a range; False when it lies past the end."""
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if last >= self.clusters:
            self.corrupt(f"{what} at {offset:#x}: past the end of the file")
            return False
        for cluster in range(first, last + 1):
            self.users[cluster] += 1
        return True

    def run(self) -> None:
        """Walk everything that the header leads to."""
        header = self.header
        self.use(0, self.size, "header")
        self.use(header.reftable_offset, header.reftable_clusters << self.bits, "refcount table")
        if header.snapshots:
            length = header.read_snapshots(lambda at, size: read_bytes(self.file, at, size), self.file.path)[1]
            self.use(header.snapshots_offset, length, "snapshot table")
        self._walk_l1(self.tables.l1, header.l1_offset, "active", active=True)
        for one in self.tables.snapshots:
            l1 = read_array(self.file, one.l1_offset, one.l1_size)
            self._walk_l1(l1, one.l1_offset, f"snapshot {one.id}", active=False)
        if header.bitmaps is not None and header.autoclear & AUTOCLEAR_BITMAPS:
            self._walk_bitmaps()
        seen = set()
        table = self.tables.refcounts.table
        for number, offset in enumerate(table):
            if not offset:
                continue
            if offset & (self.size - 1) or offset in seen or not self.use(offset, self.size, "refcount block"):
                self.corrupt(f"refcount block {number} at {offset:#x}: unaligned, twice, or past the end")
                table[number] = 0
            seen.add(offset)

    def _walk_l1(self, l1: array[int], offset: int, name: str, *, active: bool) -> None:
        if len(l1):
            self.use(offset, len(l1) * 8, f"{name} L1 table")
        for number, entry in enumerate(l1):
            where = entry & OFFSET
            if not where:
                continue
            if where & (self.size - 1):
                self.corrupt(f"{name} L1 entry {number}: {entry:#x} is not at a cluster's start")
            elif self.use(where, self.size, "L2 table"):
                for at, one in enumerate(read_array(self.file, where, self.size // 8)):
                    if one:
                        self._use_entry(one, (number << self.bits - 3) + at, active=active)

    def _use_entry(self, entry: int, cluster: int, *, active: bool) -> None:
        report = self.report
        if entry & COMPRESSED:
            offset, length = host_range(entry, self.bits)
            # The last sector may reach past the end of a file that was cut to its data.
            length = min(length, max((self.clusters << self.bits) - offset, 1))
            self.use(offset, length, f"compressed cluster {cluster:#x}")
            report.compressed += active
            report.allocated += active
            if entry & COPIED:
                self.corrupt(f"cluster {cluster:#x}: compressed and marked as copied")
            return
        offset = entry & OFFSET
        if offset & (self.size - 1) or entry & ~(COPIED | OFFSET | (ZERO if self.header.version > 2 else 0)):
            self.corrupt(f"cluster {cluster:#x}: entry {entry:#x} is unaligned or has reserved bits set")
        elif offset and self.use(offset, self.size, f"cluster {cluster:#x}"):
            report.allocated += active

    def _walk_bitmaps(self) -> None:
        directory = self.header.bitmaps
        assert directory is not None
        if directory.count > 65535 or directory.size > 64 << 20 or directory.offset & (self.size - 1):
            self.corrupt("the bitmap directory is out of bounds")
            return
        if not self.use(directory.offset, max(directory.size, 1), "bitmap directory"):
            return
        data, at = read_bytes(self.file, directory.offset, directory.size), 0
        for _ in range(directory.count):
            if at + _BITMAP.size > len(data):
                self.corrupt("the bitmap directory is cut short")
                return
            offset, entries, _, _, _, name, extra = _BITMAP.unpack_from(data, at)
            at += (_BITMAP.size + extra + name + 7) & ~7
            if (
                offset & (self.size - 1)
                or entries * 8 > 64 << 20
                or not self.use(offset, max(entries * 8, 1), "bitmap table")
            ):
                self.corrupt(f"a bitmap table at {offset:#x} is out of bounds")
                continue
            for entry in read_array(self.file, offset, entries):
                if entry & OFFSET:
                    self.use(entry & OFFSET, self.size, "bitmap")

    def compare(self, *, fix_leaks: bool, fix_all: bool) -> None:
        """Compare with the reference counts, and put them right in memory where asked."""
        report, refcounts = self.report, self.tables.refcounts
        last = next((one for one in range(self.clusters - 1, -1, -1) if self.users[one]), 0)
        report.end = (last + 1) << self.bits
        for first in self._counted_behind():
            report.leaks += 1
            report.say(f"leaked: cluster {first:#x} has a reference count, and lies past the end")
            if fix_leaks or fix_all:
                refcounts.set(first, 0)
                report.leaks_fixed += 1
        for cluster, users in enumerate(self.users):
            count = refcounts.get(cluster)
            if count == users:
                continue
            if count > users:
                report.leaks += 1
                report.say(f"leaked: cluster {cluster:#x} has reference count {count} and {users} users")
                fix = fix_leaks or fix_all
                report.leaks_fixed += fix
            else:
                self.corrupt(f"cluster {cluster:#x} has reference count {count} and {users} users")
                fix = fix_all and users <= refcounts.maximum
                report.corruptions_fixed += fix
            if fix:
                refcounts.cover_apart(cluster)
                refcounts.set(cluster, users)
        self._compare_copied(fix=fix_all)

    def _counted_behind(self) -> list[int]:
        """Clusters past the end of the file that are counted: allocated before a crash, and never written."""
        refcounts, found = self.tables.refcounts, []
        per_block, per_slice = 1 << refcounts.block_bits, 1 << refcounts.slice_bits
        for block, offset in enumerate(refcounts.table):
            for start in range(block * per_block, (block + 1) * per_block, per_slice) if offset else ():
                if start + per_slice > self.clusters and any(refcounts.cache.load(start >> refcounts.slice_bits)):
                    clusters = range(max(start, self.clusters), start + per_slice)
                    found += [cluster for cluster in clusters if refcounts.get(cluster)]
        return found

    def _compare_copied(self, *, fix: bool) -> None:
        """The COPIED flag of the active tables has to say whether the count is 1."""
        l1, l2, refcounts = self.tables.l1, self.tables.l2, self.tables.refcounts
        for number, entry in enumerate(l1):
            where = entry & OFFSET
            if not where or where & (self.size - 1) or where >> self.bits >= self.clusters:
                continue
            if self._flag_is_wrong(entry, refcounts.get(where >> self.bits), f"L1 entry {number}") and fix:
                l1[number] = entry ^ COPIED
                self.tables.dirty_l1.add(number)
            first = number << self.bits - 3
            for at, one in enumerate(read_array(self.file, where, self.size // 8)):
                if not one & OFFSET or one & COMPRESSED or (one & OFFSET) >> self.bits >= self.clusters:
                    continue
                if (
                    self._flag_is_wrong(one, refcounts.get((one & OFFSET) >> self.bits), f"cluster {first + at:#x}")
                    and fix
                ):
                    l2.set(first + at, one ^ COPIED)

    def _flag_is_wrong(self, entry: int, count: int, what: str) -> bool:
        if bool(entry & COPIED) == (count == 1):
            return False
        self.corrupt(f"{what}: marked as {'' if entry & COPIED else 'not '}copied, reference count {count}")
        return True

    def write(self) -> None:
        """Write what was put right: counts first, then what depends on them."""
        refcounts, tables = self.tables.refcounts, self.tables
        blocks, entries, moved = refcounts.begin()
        mapping = tables.l2.begin() + sectors(tables.l1, self.header.l1_offset, tables.dirty_l1)
        for writes in (blocks, entries):
            for offset, data in writes:
                self.file.write(offset, [memoryview(data)], len(data))
            self.file.sync()
        if moved:
            self.header.reftable_offset = refcounts.table_offset
            self.header.reftable_clusters = len(refcounts.table) * 8 >> self.bits
            tables.write_header()
            self.file.sync()
        for offset, data in mapping:
            self.file.write(offset, [memoryview(data)], len(data))
        self.file.sync()
        self.header.incompatible &= ~INCOMPAT_DIRTY
        tables.write_header()
        self.file.sync()


def check(file: File, header: Header, *, fix: str = "") -> Report:
    """Check an image that nobody writes.

    Args:
        fix: ``"leaks"`` lowers counts that are too high, ``"all"`` also raises those too low and puts flags right.

    Raises :exc:`~cardcage.errors.ConfigError` when there is no image to speak of.
    """
    counting = Counting(file, header)
    counting.run()
    counting.compare(fix_leaks=fix == "leaks" and not counting.report.corruptions, fix_all=fix == "all")
    report = counting.report
    if fix and not header.incompatible & INCOMPAT_CORRUPT and (report.leaks_fixed or report.corruptions):
        counting.write()
    return report


def repair_counts(file: File, header: Header) -> None:
    """Count anew in an image that was not closed (dirty bit). Raises ConfigError for a damaged image."""
    counting = Counting(file, header)
    counting.run()
    if counting.report.corruptions:
        raise ConfigError(f"not closed, and damaged: {counting.report.problems[0]}", file=file.path)
    counting.compare(fix_leaks=True, fix_all=True)
    counting.write()

"""qcow2 images, versions 2 and 3: read, write, discard, and a commit order in which no crash loses or damages anything.

Data goes to its place at once; changed tables stay in memory until a commit (a flush, the close, or many dirty slices):

1. reference counts that grew are written, and made stable together with all data written before;
2. refcount table entries that name new blocks are written and made stable;
3. L2 and L1 entries are written and made stable: now what they name is there, and a flush may return;
4. only then do clusters that nothing names any more lose their count, once no request is under way that could still
   use them; the lower counts go out with the next commit.

So a crash leaves at worst clusters that are counted and unused (leaks). With ``lazy_refcounts`` the image carries the
dirty bit instead, and the counts and steps 1 and 2 wait for the close.

Locks, outermost first: ``_committing``, ``_alloc`` (changes of the mapping), the slice caches' own. Reads, and writes
to clusters that are in place, take none.
"""

from __future__ import annotations

import errno
import threading
from threading import get_ident
from typing import TYPE_CHECKING

from cardcage.abilities import has
from cardcage.backends import BlockInfo
from cardcage.errors import ConfigError
from cardcage.segments import total

from cardcage_block import compressed
from cardcage_block.growing import grow_qcow2
from cardcage_block.handing import HandedImage
from cardcage_block.header import COMPAT_LAZY, INCOMPAT_CORRUPT, INCOMPAT_DIRTY
from cardcage_block.health import Health
from cardcage_block.hostfile import TryFile, clear, scatter, take, zeros
from cardcage_block.layers import LayeredImage
from cardcage_block.layout import COMPRESSED, COPIED, OFFSET, Tables
from cardcage_block.limbo import Limbo
from cardcage_block.mapping import DATA, PACKED, UNALLOCATED, ZEROS, Mapping
from cardcage_block.plain import PlacedImage, own_place
from cardcage_block.private import CopiedImage
from cardcage_block.tables import sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage_block.header import Header
    from cardcage_block.health import Health
from cardcage_block.hostfile import File, Image

__all__ = ["Qcow2Image"]


COMMIT_AT = 1024
"""Dirty slices that a commit without a flush is worth."""


class Qcow2Image(CopiedImage, HandedImage, LayeredImage, PlacedImage):
    """A qcow2 disk. Thread-safe; satisfies :class:`cardcage.backends.BlockBackend`.

    Args:
        file: the image file. header: its header, parsed.
        backing: what unallocated clusters show, ``None`` for zeros; closed with the image.
        readonly: refuse to change anything.
        discard: free clusters on the guest's discard and give them back to the host.
        warn: called with one sentence about the image's health.

    Raises :exc:`~cardcage.errors.ConfigError` for an image that is not sound.
    """

    def __init__(
        self,
        file: File,
        header: Header,
        *,
        backing: Image | None = None,
        readonly: bool = False,
        discard: bool = True,
        warn: Callable[[str], object],
    ) -> None:
        self._file, self._header, self._backing, self._warn = file, header, backing, warn
        self._bits, self._size = header.cluster_bits, header.cluster_size
        self._mask = self._size - 1
        quick = file if has(file, TryFile) else None
        self._try_read = quick.try_read if quick is not None else None
        self._try_write = quick.try_write if quick is not None else None
        self._readonly, self._punch = readonly, discard
        self._health = Health(file, header, readonly, warn)
        if header.incompatible & INCOMPAT_CORRUPT:
            if not readonly:
                raise ConfigError("qcow2 image marked as corrupt: repair it with qemu-img check -r all", file=file.path)
            warn(f"{file.path}: qcow2 image marked as corrupt; opened readonly")
        self.tables = Tables(file, header, self._health.corrupt)
        self._metadata = self.tables.metadata
        self._l2 = self.tables.l2
        self._map = Mapping(header, self.tables, self._health.corrupt)
        self._inflater = compressed.Inflater(file, self._bits, header.compression)
        self.info = BlockInfo(header.size & ~511, 512, readonly, discard and not readonly, not readonly)
        self._alloc, self._committing = threading.Lock(), threading.Lock()
        self._limbo = Limbo()
        self._inflight = self._limbo.inflight
        self._started = self._completed = 0
        self._lazy = bool(header.compatible & COMPAT_LAZY) and header.version >= 3 and not readonly
        self._closed = False
        if header.autoclear and not readonly:
            header.autoclear = 0  # what they vouch for (dirty bitmaps) is no longer kept up to date
            self.tables.write_header()

    # reading

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Fill the writable *buffers* one after another."""
        length = total(buffers)
        me = get_ident()
        self._inflight[me] = self._limbo.epoch  # from here on no cluster that we look up is given to somebody else
        try:
            host = self._map.readable(offset, length)
            if host:
                self._file.read(host, buffers, length)
            else:
                _read_chain(self, offset, buffers, length)
        finally:
            self._inflight.pop(me, None)

    def try_readv(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Fill the *buffers* if that takes no waiting: one run of data, its table entries and bytes both in memory."""
        length = total(buffers)
        me = get_ident()
        self._inflight[me] = self._limbo.epoch  # as in readv
        try:
            host = self._map.readable(offset, length)
            return bool(host and self._try_read is not None and self._try_read(host, buffers, length))
        finally:
            self._inflight.pop(me, None)

    def _read_own(
        self,
        offset: int,
        buffers: Sequence[memoryview],
        length: int,
        left: list[tuple[Image, int, Sequence[memoryview], int]],
    ) -> None:
        """Read what this image has, and add to *left* what is to be read from its backing file."""
        done = 0
        while done < length:
            kind, where, run = self._map.extent(offset + done, length - done)
            part = buffers if run == length else take(buffers, done, run)
            if kind == DATA:
                self._file.read(where, part, run)
            elif kind == PACKED:
                inside = (offset + done) & self._mask
                scatter(memoryview(self._inflater.get(where))[inside : inside + run], part)
            elif kind == UNALLOCATED and self._backing is not None:
                here = min(max(self._backing.info.size - offset - done, 0), run)
                if here:
                    left.append((self._backing, offset + done, take(part, 0, here), here))
                clear(take(part, here, run - here))
            else:
                clear(part)
            done += run

    def data(self, offset: int, end: int, /) -> tuple[bool, int]:
        """Tell if there may be data at *offset* (else zeros), and where that stretch ends, at most *end*."""
        image: Image = self
        while isinstance(image, Qcow2Image):
            kind, _, length = image._map.extent(offset, min(end - offset, 1 << 30))
            end = offset + length
            below = image._backing
            if kind != UNALLOCATED or below is None or offset >= below.info.size:
                return kind in (DATA, PACKED), end
            image, end = below, min(end, below.info.size)
        return image.data(offset, end)

    # writing

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Write *buffers* one after another."""
        length = total(buffers)
        me = get_ident()
        self._inflight[me] = self._limbo.epoch
        try:
            host = own_place(self, offset, length)
            if host:
                self._file.write(host, buffers, length)
                return
            with self._alloc:
                self._prepare()
                done = 0
                while done < length:
                    done += self._write_run(offset + done, take(buffers, done, length - done), length - done)
        finally:
            self._inflight.pop(me, None)
        if len(self._l2.dirty) >= COMMIT_AT:
            self.flush()

    def try_writev(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Write *buffers* if that takes no waiting: over one run of data whose table entries are in memory."""
        length = total(buffers)
        me = get_ident()
        self._inflight[me] = self._limbo.epoch
        try:
            host = own_place(self, offset, length)
            return bool(host and self._try_write is not None and self._try_write(host, buffers, length))
        finally:
            self._inflight.pop(me, None)

    def _prepare(self) -> None:
        """Before any change of the mapping."""
        if self._readonly:
            raise OSError(errno.EROFS, f"{self._file.path}: opened readonly")
        self._health.check()
        if self._lazy and not self._header.incompatible & INCOMPAT_DIRTY:
            self._header.incompatible |= INCOMPAT_DIRTY
            try:
                self.tables.write_header()
                self._health.sync()
            except OSError:
                self._header.incompatible &= ~INCOMPAT_DIRTY
                raise

    def _write_run(self, offset: int, buffers: Sequence[memoryview], length: int) -> int:
        """Write a first part of *buffers* that needs one kind of treatment; its length."""
        cluster, inside = offset >> self._bits, offset & self._mask
        last = (offset + length - 1) >> self._bits
        entry = self._l2.get(cluster)
        host, run = self._map.in_place(entry), 1
        if host and not entry & self._map.zero:
            while cluster + run <= last and self._l2.get(cluster + run) == entry + (run << self._bits):
                if not self._map.in_place(entry + (run << self._bits)):
                    break
                run += 1
            length = min(length, (run << self._bits) - inside)
            self._file.write(host + inside, take(buffers, 0, length), length)
            return length
        if host:  # it holds a place and reads as zeros
            self._own(cluster, cluster)
            length = min(length, self._size - inside)
            self._write_filled(cluster, 1, host, offset, take(buffers, 0, length), length)
            self._l2.set(cluster, host | COPIED)
            return length
        while cluster + run <= last and not self._map.in_place(self._l2.get(cluster + run)):
            run += 1
        self._own(cluster, cluster + run - 1)
        first, run = self.tables.refcounts.allocate(run)
        length = min(length, (run << self._bits) - inside)
        try:
            self._write_filled(cluster, run, first << self._bits, offset, take(buffers, 0, length), length)
        except OSError:
            for one in range(first, first + run):
                self.tables.refcounts.drop(one)
            raise
        for at in range(run):
            self._change(cluster + at, (first + at) << self._bits | COPIED)
        return length

    def _own(self, first: int, last: int) -> None:
        """Make the L2 tables of these guest clusters the disk's own."""
        for number in range(first >> self.tables.l2_bits, (last >> self.tables.l2_bits) + 1):
            old = self.tables.own_table(number << self.tables.l2_bits)
            if old:
                self._limbo.given_up.append(old >> self._bits)

    def _change(self, cluster: int, entry: int) -> None:
        """Set an L2 entry whose table is the disk's own, and let go of what it named unless *entry* names the same."""
        old = self._l2.get(cluster)
        gone = []
        if old & COMPRESSED:
            offset, length = compressed.host_range(old, self._bits)
            gone = list(range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1))
        elif old & self._map.offset and old & self._map.offset != entry & self._map.offset:
            gone = [(old & self._map.offset) >> self._bits]
        if not self._metadata.isdisjoint(gone):
            raise self._health.corrupt(f"L2 entry {old:#x}: names metadata")
        self._l2.set(cluster, entry)
        self._limbo.given_up += gone

    def _write_filled(
        self, cluster: int, run: int, host: int, offset: int, buffers: Sequence[memoryview], length: int
    ) -> None:
        """Write whole clusters at *host*: *buffers*, and around them what guest clusters *cluster*... show now."""
        head = offset & self._mask
        tail = (run << self._bits) - head - length
        before = self._old(cluster, 0, head) if head else None
        after = self._old(cluster + run - 1, self._size - tail, tail) if tail else None
        end = host + (run << self._bits)
        fresh = host >= self.tables.end  # behind the end of the file, where zeros need no writing
        if end > self._file.size():
            self._file.truncate(end)
        self.tables.end = max(self.tables.end, end)
        parts = buffers
        if head and not (fresh and before is None):
            parts, host = [before or zeros(head), *parts], host - head
            length += head
        if tail and not (fresh and after is None):
            parts = [*parts, after or zeros(tail)]
            length += tail
        self._file.write(host + head, parts, length)

    def _old(self, cluster: int, start: int, length: int) -> memoryview | None:
        """Part of what guest *cluster* shows now, None for zeros."""
        kind, offset = self._map.kind(self._l2.get(cluster)), cluster << self._bits
        below = self._backing.info.size if self._backing is not None else 0
        if kind == ZEROS or (kind == UNALLOCATED and offset + start >= below):
            return None
        view = memoryview(bytearray(length))
        _read_chain(self, offset + start, [view], length)
        return view

    # discarding

    def discard(self, offset: int, length: int, /) -> None:
        """Free the clusters that lie wholly inside the range; they read as zeros."""
        if self._punch:
            first, last = self._map.whole(offset, length, self.info.size)
            if first < last and (self._map.zero or self._backing is None):
                self._release_clusters(first, last, keep=False)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* lets its clusters go."""
        end = offset + length
        first, last = self._map.whole(offset, length, self.info.size)
        if first >= last or not (self._map.zero or (unmap and self._punch and self._backing is None)):
            self._write_zeros(offset, end)
            return
        self._write_zeros(offset, first << self._bits)
        self._release_clusters(first, last, keep=not (unmap and self._punch))
        self._write_zeros(last << self._bits, end)

    def _write_zeros(self, offset: int, end: int) -> None:
        while offset < end:
            has_data, stop = self.data(offset, end)
            size = min(stop - offset, len(zeros(1 << 21)))
            if has_data:
                self.writev(offset, [zeros(size)])
            offset += size

    def _release_clusters(self, first: int, last: int, *, keep: bool) -> None:
        cluster, zero = first, self._map.zero if (self._backing is not None or keep) else 0
        while cluster < last:
            with self._alloc:  # a table at a time, for the sake of others
                self._prepare()
                stop = min(last, (cluster >> self.tables.l2_bits) + 1 << self.tables.l2_bits)
                if self._backing is not None or self.tables.l1[cluster >> self.tables.l2_bits] & OFFSET:
                    self._own(cluster, cluster)
                    for one in range(cluster, stop):
                        entry = self._l2.get(one)
                        if keep and self._map.in_place(entry):
                            new = entry | zero
                        elif zero and (self._backing is not None or entry):
                            new = zero
                        else:
                            new = 0
                        if new != entry:
                            self._change(one, new)
                cluster = stop
            if len(self._l2.dirty) >= COMMIT_AT:
                self.flush()

    def grow(self, size: int, /) -> None:
        """Make the disk *size* bytes long, more than now; what is added reads as zeros. Raises OSError."""
        grow_qcow2(self, size)

    # committing

    def flush(self) -> None:
        """Return once all earlier completed writes, and the tables that lead to them, are on stable storage."""
        if self._readonly:
            return
        seen = self._started
        with self._committing:
            if self._completed > seen:  # one that began after we came has done it for us
                return
            self._started += 1
            self._commit()
            self._completed = self._started

    def _commit(self) -> None:
        tables, header, refcounts = self.tables, self._header, self.tables.refcounts
        with self._alloc:
            self._health.check()
            blocks, entries, moved = ([], [], False) if self._lazy else refcounts.begin()
            place = (refcounts.table_offset, len(refcounts.table) * 8 >> self._bits)
            changed_l1, tables.dirty_l1 = tables.dirty_l1, set()
            mapping = self._l2.begin() + sectors(tables.l1, header.l1_offset, changed_l1)
            if moved:
                self._limbo.given_up += refcounts.take_outgrown()
            batch = self._limbo.begin()
        try:
            self._write_all(blocks)
            if entries:
                self._write_all(entries)
            if moved:
                header.reftable_offset, header.reftable_clusters = place
                tables.write_header()
                self._health.sync()
            if mapping:
                self._write_all(mapping)
        except OSError:
            with self._alloc:
                refcounts.undo()
                self._l2.undo()
                tables.dirty_l1 |= changed_l1
                self._limbo.undo(batch)
            raise
        with self._alloc:
            refcounts.done()
            self._l2.done()
            self._limbo.done(batch)
            self._let_go()

    def _write_all(self, writes: list[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            self._file.write(offset, [memoryview(data)], len(data))
        self._health.sync()

    def _let_go(self) -> None:
        """Lower the counts of clusters that nothing on disk names and no request under way can have looked up."""
        ready = self._limbo.ready()
        if not ready:
            return
        self._inflater.forget()
        free = sorted(one for one in ready if self.tables.refcounts.drop(one))
        self._metadata.difference_update(free)
        at = 0
        while self._punch and at < len(free):
            run = 1
            while at + run < len(free) and free[at + run] == free[at] + run:
                run += 1
            self._file.punch(free[at] << self._bits, run << self._bits)
            at += run

    def close(self) -> None:
        """Commit and close. Idempotent. What cannot be committed is said by a warning: no flush has promised it."""
        below: Image | None = self
        while isinstance(below, Qcow2Image):
            below._close_own()
            below = below._backing
        if below is not None:
            below.close()

    def _close_own(self) -> None:
        with self._committing:
            if self._closed:
                return
            self._closed = True
            try:
                if not self._readonly and self._health.broken is None:
                    self.settle()
            except OSError as error:
                self._warn(f"{self._file.path}: unflushed writes are lost: {error}")
            finally:
                self._file.close()

    def settle(self) -> None:
        """Commit, and count what ``lazy_refcounts`` left for the end. No request is under way. Raises OSError."""
        self._commit()
        self._lazy = False
        while self._limbo or self._l2.dirty or self.tables.dirty_l1 or self.tables.refcounts.is_dirty():
            self._commit()
        if self._header.incompatible & INCOMPAT_DIRTY:
            self._header.incompatible &= ~INCOMPAT_DIRTY
            self.tables.write_header()
            self._health.sync()


def _read_chain(image: Image, offset: int, buffers: Sequence[memoryview], length: int) -> None:
    """Read from *image* and what it stands on: a chain may be longer than Python's stack."""
    left: list[tuple[Image, int, Sequence[memoryview], int]] = [(image, offset, buffers, length)]
    while left:
        image, offset, buffers, length = left.pop()
        if isinstance(image, Qcow2Image):
            image._read_own(offset, buffers, length, left)
        else:
            image.readv(offset, buffers)

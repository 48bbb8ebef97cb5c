"""The dirty log: which pages of RAM were written, by vCPUs and whoever reports it, kept by native code."""

from __future__ import annotations

from array import array
from struct import pack, unpack_from
from typing import TYPE_CHECKING

from cardcage.errors import StateError

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.accelerator import ForeignWriter, MemorySlot

    from cardcage_tcg.vm import TcgVm

__all__ = ["DirtyPages"]

PAGE = 4096
UNKNOWN = (1 << 64) - 1


class DirtyPages:
    """Dirty tracking of one VM; see :class:`cardcage.accelerator.DirtyLog`. It is by host addresses, so that a page
    which shows at several places is written at all of them."""

    def __init__(self, vm: TcgVm) -> None:
        self._vm = vm
        self._writers: list[ForeignWriter] = []
        self._stretches: list[tuple[int, int]] = []
        self._bases: Sequence[tuple[int, int, int]] = ()
        self._log: Area | None = None
        self._list: Area | None = None
        self._maps: list[Area] = []

    def add_writer(self, writer: ForeignWriter) -> None:
        """Ask *writer* too."""
        self._writers.append(writer)
        if self._log is not None:
            writer.log_writes(True)

    def remove_writer(self, writer: ForeignWriter) -> None:
        """Ask it no more."""
        self._writers.remove(writer)

    def start(self) -> None:
        """Begin, with every page clean. Raises StateError while there is a log: it is one reader's."""
        if self._log is not None:
            raise StateError("the dirty log is in use already: by a checkpoint, a snapshot or a migration")
        with self._vm.quiesce():
            self._make(())
        for writer in self._writers:
            writer.log_writes(True)

    def stop(self) -> None:
        """End."""
        with self._vm.quiesce():
            self._drop()
        for writer in self._writers:
            writer.log_writes(False)

    def fetch(self, slot: MemorySlot) -> bytes:
        """A bitmap of the slot's pages that were written, which it clears. Raises StateError without a log."""
        if self._log is None:
            raise StateError("the dirty log was not started")
        self._collect()
        pages = -(-slot.size // PAGE)
        size = -(-pages // 8)
        target = Area(size)
        try:
            with self._vm.quiesce():
                self._vm.native.dirty_take(self._vm.pointer, slot.host_address, slot.size, target.address)
            return bytes(target.view[:size])
        finally:
            target.close()

    def _collect(self) -> None:
        for writer in self._writers:
            for address, size in writer.collect_writes():
                self._vm.memory_written(address, size)

    def pages(self) -> list[int]:
        """Host addresses of the pages in the log, in the order in which they were found out."""
        if self._log is None or self._list is None:
            return []
        (count,) = unpack_from("<Q", self._log.view, L.DIRTY_LOG_COUNT)
        found = array("Q")
        found.frombytes(self._list.view[: 8 * count])
        return list(found)

    def set_bases(self, bases: Sequence[tuple[int, int, int]]) -> None:
        """Where a revert finds the bytes of each stretch of RAM: (host address, size, host address of the bytes)."""
        self._bases = bases
        with self._vm.quiesce():
            self._make(tuple(self.pages()))

    def revert(self) -> int:
        """Put the pages in the log back as they were, and forget what was derived of them; returns how many. The
        machine stands still. Raises StateError, and puts none back, where one has no base."""
        self._collect()
        with self._vm.quiesce():
            count: int = self._vm.native.dirty_revert(self._vm.pointer)
        if count == UNKNOWN:
            raise StateError("RAM that came since has no bytes to go back to")
        return count

    def slots_changed(self, slots: Sequence[MemorySlot]) -> None:
        """Other RAM shows; the world is stopped."""
        if self._log is not None and self._stretches != joined(slots):
            self._make(tuple(self.pages()))

    def _make(self, dirty: Sequence[int]) -> None:
        self._drop()
        self._stretches = joined(self._vm.memory.slots)
        self._list = Area(8 * sum(size // PAGE for _, size in self._stretches) or PAGE)
        self._log = Area(L.SIZEOF_DIRTY_LOG + L.SIZEOF_DIRTY_AREA * len(self._stretches))
        kept = []
        for at, (host, size) in enumerate(self._stretches):
            marks = Area(size // PAGE)
            self._maps.append(marks)
            base = next((to + host - low for low, length, to in self._bases if low <= host < low + length), 0)
            row = L.SIZEOF_DIRTY_LOG + L.SIZEOF_DIRTY_AREA * at
            self._log.view[row : row + L.SIZEOF_DIRTY_AREA] = pack("<QQQQ", host, size, marks.address, base)
            for page in dirty:
                if host <= page < host + size:
                    marks.view[(page - host) // PAGE] = 1
                    kept.append(page)
        self._list.view[: 8 * len(kept)] = array("Q", kept).tobytes()
        head = pack("<QQQ", len(self._stretches), self._list.address, len(kept))
        self._log.view[: L.SIZEOF_DIRTY_LOG] = head
        self._vm.native.dirty_log(self._vm.pointer, self._log.address)

    def _drop(self) -> None:
        if self._log is None or self._list is None:
            return
        self._vm.native.dirty_log(self._vm.pointer, 0)
        for area in (self._log, self._list, *self._maps):
            area.close()
        self._log, self._list, self._maps = None, None, []

    def close(self) -> None:
        """The VM is gone."""
        self._drop()


def joined(slots: Sequence[MemorySlot]) -> list[tuple[int, int]]:
    """The stretches of host memory, (address, size), that slots show: in order, none twice, and each in one block."""
    found: list[tuple[int, int]] = []
    for host, size in sorted((one.host_address, one.size) for one in slots):
        if found and host < sum(found[-1]):
            found[-1] = found[-1][0], max(sum(found[-1]), host + size) - found[-1][0]
        else:
            found.append((host, size))
    return found

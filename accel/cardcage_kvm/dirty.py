"""Which pages were written: by a guest, in KVM's dirty log (a bitmap a slot) or dirty rings (one a vCPU); by others, as
they say."""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, StateError, UsageError

from cardcage_kvm import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.accelerator import ForeignWriter, MemorySlot

    from cardcage_kvm.vcpu import KvmVCpu
    from cardcage_kvm.vm import KvmVm


class DirtyPages:
    """Dirty tracking of one VM.

    Args:
        entries: size of each ring, a power of two from 1024; 0 uses the log.
    """

    def __init__(self, vm: KvmVm, entries: int) -> None:
        self._vm, self._entries = vm, entries
        self._rings: list[tuple[mmap.mmap, ctypes.Array[abi.DirtyGfn], list[int]]] = []
        self._pages: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._writers: list[ForeignWriter] = []
        self._reported: dict[int, bytearray] = {}

    def enable(self) -> None:
        """Switch the rings on, before the first vCPU. Raises :exc:`~cardcage.errors.AcceleratorError` without them."""
        if not self._entries:
            return
        size = self._entries * ctypes.sizeof(abi.DirtyGfn)
        if self._entries < 1024 or self._entries & self._entries - 1:
            raise UsageError(f"dirty ring of {self._entries} entries: expected a power of two from 1024")
        for cap in (abi.Cap.DIRTY_LOG_RING_ACQ_REL, abi.Cap.DIRTY_LOG_RING):
            limit = abi.ioctl(self._vm.fd, abi.CHECK_EXTENSION, int(cap))
            if limit:
                if size > limit:
                    raise AcceleratorError(f"dirty ring of {self._entries} entries: KVM here has at most {limit // 16}")
                enable = abi.EnableCap(cap=int(cap))
                enable.args[0] = size
                abi.ioctl(self._vm.fd, abi.ENABLE_CAP, enable)
                return
        raise AcceleratorError("this host's KVM has no dirty rings")

    def attach(self, vcpu: KvmVCpu) -> None:
        """Map the ring of a new vCPU."""
        if self._entries:
            size = self._entries * ctypes.sizeof(abi.DirtyGfn)
            ring = mmap.mmap(vcpu.fd, size, offset=abi.DIRTY_RING_PAGE_OFFSET * abi.PAGE)
            self._rings.append((ring, (abi.DirtyGfn * self._entries).from_buffer(ring), [0]))

    def start(self) -> None:
        """Begin, with every page clean. Raises StateError while there is a log: it is one reader's."""
        if self._vm.slots.logging:
            raise StateError("the dirty log is in use already: by a checkpoint, a snapshot or a migration")
        self._vm.slots.logging = True
        self._pages, self._reported = {}, {}
        self._vm.slots.refresh()
        for writer in self._writers:
            writer.log_writes(True)

    def stop(self) -> None:
        """End."""
        self._vm.slots.logging = False
        self._vm.slots.refresh()
        for writer in self._writers:
            writer.log_writes(False)

    def add_writer(self, writer: ForeignWriter) -> None:
        """Another process that writes guest memory."""
        self._writers.append(writer)
        if self._vm.slots.logging:
            writer.log_writes(True)

    def remove_writer(self, writer: ForeignWriter) -> None:
        """It does no more."""
        if self._vm.slots.logging:
            self.written(writer.collect_writes())
        self._writers.remove(writer)

    def written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Not the guest wrote these."""
        if not self._vm.slots.logging:
            return
        with self._lock:
            for address, size in ranges:
                for number, slot in list(self._vm.slots.known.items()):
                    first = max(address, slot.address) - slot.address >> 12
                    last = min(address + size, slot.address + slot.size) - 1 - slot.address >> 12
                    if first <= last:
                        self._set(self._reported, number, slot, first, last)

    @staticmethod
    def _set(bitmaps: dict[int, bytearray], number: int, slot: MemorySlot, first: int, last: int) -> None:
        bitmap = bitmaps.setdefault(number, bytearray(-(-slot.size // abi.PAGE // 8)))
        for page in range(first, last + 1):
            bitmap[page >> 3] |= 1 << (page & 7)

    def fetch(self, slot: MemorySlot) -> bytes:
        """Bitmap of pages written since the last fetch, little-endian bit order, one bit for each 4 KiB page."""
        if not self._vm.slots.logging:
            raise StateError("the dirty log was not started")
        number = self._vm.slots.number(slot)
        for writer in self._writers:
            self.written(writer.collect_writes())
        found = self._fetch(number, slot)
        with self._lock:
            reported = self._reported.pop(number, None)
        if reported is None:
            return found
        return (int.from_bytes(found, "little") | int.from_bytes(reported, "little")).to_bytes(len(found), "little")

    def _fetch(self, number: int, slot: MemorySlot) -> bytes:
        length = -(-slot.size // abi.PAGE // 8)
        if self._entries:
            self.collect()
            with self._lock:
                return bytes(self._pages.pop(number, bytearray(length)))
        bitmap = (ctypes.c_uint8 * (-(-slot.size // abi.PAGE // 64) * 8))()
        log = abi.DirtyLogStruct(slot=number, dirty_bitmap=ctypes.addressof(bitmap))
        abi.ioctl(self._vm.fd, abi.GET_DIRTY_LOG, log)
        return bytes(bitmap)[:length]

    def keep(self) -> None:
        """Take what KVM has of the log into this process's memory, which a forked one has too."""
        if self._entries:
            self.collect()
        elif self._vm.slots.logging:
            for number, slot in self._vm.slots.known.items():
                found = int.from_bytes(self._fetch(number, slot), "little")
                with self._lock:
                    before = self._reported.get(number, b"")
                    both = found | int.from_bytes(before, "little")
                    self._reported[number] = bytearray(both.to_bytes(-(-slot.size // abi.PAGE // 8), "little"))

    def collect(self) -> None:
        """Take all entries out of the rings and give them back to KVM."""
        with self._lock:
            found = False
            for _, ring, at in self._rings:
                while True:
                    entry = ring[at[0] % self._entries]
                    if not entry.flags & abi.DIRTY_GFN_DIRTY:
                        break
                    found = True
                    self._mark(entry.slot & 0xFFFF, entry.offset)
                    entry.flags = abi.DIRTY_GFN_RESET
                    at[0] += 1
            if found:
                abi.ioctl(self._vm.fd, abi.RESET_DIRTY_RINGS)

    def _mark(self, number: int, page: int) -> None:
        slot = self._vm.slots.known.get(number)
        if slot is None or page >= slot.size // abi.PAGE:
            return
        self._set(self._pages, number, slot, page, page)

    def close(self) -> None:
        """Unmap the rings."""
        while self._rings:
            ring, entries, _ = self._rings.pop()
            del entries
            ring.close()

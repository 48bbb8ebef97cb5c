"""Guest-physical memory of a VM: its slots, and accesses that Python does."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from contextlib import contextmanager
from itertools import chain
from struct import pack_into, unpack_from
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, UsageError
from cardcage.segments import Areas

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.accelerator import MemorySlot

    from cardcage_tcg.vm import TcgVm

__all__ = ["GuestMemory"]


class GuestMemory:
    """The slots of one VM.

    Args:
        view: of its ``struct vm``.
    """

    def __init__(self, vm: TcgVm, view: memoryview) -> None:
        self._vm, self._native, self._view = vm, vm.native, view
        self._slots: list[MemorySlot] = []
        self._ordered: list[MemorySlot] = []
        self._starts: list[int] = []
        self._pages: dict[MemorySlot, Area] = {}

    @property
    def slots(self) -> list[MemorySlot]:
        """The slots that there are."""
        return list(self._slots)

    def map(self, slot: MemorySlot) -> None:
        """Add a slot. Raises AcceleratorError when there are too many."""
        if len(self._slots) >= L.MAX_SLOTS:
            raise AcceleratorError(f"tcg: more than {L.MAX_SLOTS} memory slots")
        with self._changed():
            self._slots.append(slot)
            self._pages[slot] = Area(slot.size // 4096 * L.SIZEOF_PAGE)

    def unmap(self, slot: MemorySlot) -> None:
        """Take a slot away. Raises UsageError when it is not there."""
        if slot not in self._slots:
            raise UsageError(f"tcg: no memory slot at {slot.address:#x}")
        with self._changed():
            self._slots.remove(slot)
        self._pages.pop(slot).close()

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """Blocks and translations derive from the slots: both go when the slots change."""
        with self._vm.quiesce():
            # not while a machine is built, which would touch all of an empty hash
            if unpack_from("<Q", self._view, L.VM_CODE_USED)[0]:
                self._vm.blocks.flush()
            yield
            self._slots.sort(key=lambda one: -one.size)  # look-ups go through them in order: main memory first
            ordered = sorted(self._slots, key=lambda one: one.address)
            table = bytearray(L.VM_NSLOTS + 4 - L.VM_SLOTS)
            for i, slot in enumerate(self._slots):
                pack_into(
                    "<QQQQII", table, L.SIZEOF_SLOT * i,
                    slot.address, slot.size, slot.host_address, self._pages[slot].address, slot.readonly, 1,
                )  # fmt: skip
            pack_into("<I", table, L.VM_NSLOTS - L.VM_SLOTS, len(self._slots))
            self._view[L.VM_SLOTS : L.VM_NSLOTS + 4] = table  # in one step: see library.py
            self._starts, self._ordered = [one.address for one in ordered], ordered
            self._vm.flush_translations()
            self._vm.dirty.slots_changed(self._slots)

    def written(self, address: int, size: int) -> None:
        """Somebody else wrote there: code of it is forgotten."""
        self._native.memory_written(self._vm.pointer, address, size)

    def written_many(self, ranges: Sequence[tuple[int, int]]) -> None:
        """:meth:`written` for each (address, size)."""
        flat = ranges.words() if type(ranges) is Areas else array("Q", chain.from_iterable(ranges))
        self._native.memory_written_many(self._vm.pointer, flat.buffer_info()[0], len(flat) // 2)

    def host(self, phys: int) -> tuple[int, MemorySlot] | None:
        """(host address, slot) of a guest-physical address, None where there is no RAM."""
        at = bisect_right(self._starts, phys) - 1
        if at < 0:
            return None
        slot = self._ordered[at]
        offset = phys - slot.address
        return (slot.host_address + offset, slot) if offset < slot.size else None

    def peek(self, phys: int, size: int) -> bytes | None:
        """Bytes inside one page, None where there is no RAM."""
        found = self.host(phys)
        return None if found is None else ctypes.string_at(found[0], size)

    def poke(self, phys: int, data: bytes) -> bool:
        """Write bytes inside one page; False where there is no writable RAM."""
        found = self.host(phys)
        if found is None or found[1].readonly:
            return False
        ctypes.memmove(found[0], data, len(data))
        self._native.memory_written(self._vm.pointer, phys, len(data))
        return True

    def poke_physical(self, phys: int, data: bytes) -> None:
        """Write bytes that may cross a page; what is not RAM is dropped."""
        first = 4096 - (phys & 0xFFF)
        with self._vm.lock:
            for at, part in ((phys, data[:first]), (phys + first, data[first:])):
                if part:
                    self.poke(at, part)

    def close(self) -> None:
        """Give back what was kept of each page."""
        for area in self._pages.values():
            area.close()

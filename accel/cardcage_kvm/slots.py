"""A VM's memory slots, as KVM numbers them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage.errors import UsageError

from cardcage_kvm import abi, report

if TYPE_CHECKING:
    from cardcage.accelerator import MemorySlot

__all__ = ["Slots"]


class Slots:
    """The slots of one VM.

    Attributes:
        known: by KVM's number. logging: whether KVM is to log which of their pages are written.
    """

    def __init__(self) -> None:
        self._fd = -1
        self.known: dict[int, MemorySlot] = {}
        self.logging = False
        self._lock = threading.Lock()

    def open(self, fd: int) -> None:
        """Slots are the VM's whose descriptor this is; so are those that there are already."""
        self._fd = fd
        self.refresh()

    def map(self, slot: MemorySlot) -> None:
        """Add a slot of guest memory."""
        if (slot.address | slot.size | slot.host_address) % abi.PAGE or slot.size <= 0 or slot.address < 0:
            raise UsageError(f"memory slot {slot.address:#x}+{slot.size:#x}: not made of whole pages")
        with self._lock:
            number = next(one for one in range(len(self.known) + 1) if one not in self.known)
            self._set_region(number, slot, slot.size)
            self.known[number] = slot

    def unmap(self, slot: MemorySlot) -> None:
        """Remove exactly this slot."""
        with self._lock:
            number = self.number(slot)
            self._set_region(number, slot, 0)
            del self.known[number]

    def number(self, slot: MemorySlot) -> int:
        """KVM's number of a mapped slot. Raises :exc:`~cardcage.errors.UsageError` when it is not mapped."""
        for number, known in self.known.items():
            if known == slot:
                return number
        raise UsageError(f"memory slot {slot.address:#x}+{slot.size:#x}: not mapped")

    def _set_region(self, number: int, slot: MemorySlot, size: int) -> None:
        flags = (abi.MEM_READONLY if slot.readonly else 0) | (abi.MEM_LOG_DIRTY_PAGES if self.logging else 0)
        region = abi.UserspaceMemoryRegion(
            slot=number,
            flags=flags if size else 0,
            guest_phys_addr=slot.address,
            memory_size=size,
            userspace_addr=slot.host_address,
        )
        abi.ioctl(self._fd, abi.SET_USER_MEMORY_REGION, region)

    def refresh(self) -> None:
        """Tell KVM all slots again, after their flags changed."""
        with self._lock:
            for number, slot in self.known.items():
                self._set_region(number, slot, slot.size)

    def peek(self, address: int, size: int) -> bytes:
        """Guest-physical bytes for a report: as many of *size* as lie in one slot."""
        for slot in self.known.values():
            if slot.address <= address < slot.address + slot.size:
                offset = address - slot.address
                return report.read_host(slot.host_address + offset, min(size, slot.size - offset))
        return b""

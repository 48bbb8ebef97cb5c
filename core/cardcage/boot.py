"""What a boot protocol finds and leaves: the concrete :class:`~cardcage.device.BootContext`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.device import E820Entry
from cardcage.errors import UsageError
from cardcage.memory import GIB, split_ram

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.memory import GuestMemory

__all__ = ["MachineBoot", "carve"]

LOW_HOLE = (0xA0000, 0x60000)
"""Video memory, option ROMs and the BIOS: never free RAM on a PC."""


def carve(entries: list[E820Entry], address: int, size: int, type: int) -> list[E820Entry]:
    """Cut ``[address, address+size)`` out of *entries*, put it in as *type*; sorted, touching equals joined."""
    end = address + size
    left = [E820Entry(address, size, type)]
    for one in entries:
        if one.address < address:
            left.append(E820Entry(one.address, min(one.address + one.size, address) - one.address, one.type))
        if one.address + one.size > end:
            start = max(one.address, end)
            left.append(E820Entry(start, one.address + one.size - start, one.type))
    left.sort(key=lambda one: one.address)
    joined: list[E820Entry] = []
    for one in left:
        last = joined[-1] if joined else None
        if last is not None and last.type == one.type and last.address + last.size == one.address:
            joined[-1] = E820Entry(last.address, last.size + one.size, one.type)
        else:
            joined.append(one)
    return joined


class MachineBoot:
    """Made anew at each boot or reset. ``machine`` is there for platform cards."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory: GuestMemory = machine.memory
        self.cpus = len(machine.vcpus)
        self.ram_below_4g, self.ram_above_4g = split_ram(machine.config.machine.memory)
        self.e820 = [E820Entry(0, self.ram_below_4g)]
        if self.ram_above_4g:
            self.e820.append(E820Entry(4 * GIB, self.ram_above_4g))
        self.rsdp: int | None = None
        self.reserve(*LOW_HOLE)

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        """Carve a range out of the memory map as *type* (2 reserved, 3 ACPI reclaimable, 4 ACPI NVS)."""
        if size <= 0 or address < 0:
            raise UsageError(f"e820: {address:#x}+{size:#x} is no range")
        self.e820 = carve(self.e820, address, size, type)

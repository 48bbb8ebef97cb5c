"""The memory map and registers that a boot protocol finds: the concrete :class:`~cardcage.boot.BootContext`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.abilities import has
from cardcage.boot import E820Entry, Firmware
from cardcage.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.boot import BootImage
    from cardcage.device import RamSpan
    from cardcage.memory import GuestMemory

GIB = 1 << 30


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
    """Made anew at each boot or reset.

    Args:
        spans: where RAM shows. reserved: ``(address, size)`` of ranges that are never free RAM.
        image: the boot image, which may be firmware.
    """

    def __init__(
        self,
        memory: GuestMemory,
        spans: Sequence[RamSpan],
        reserved: Sequence[tuple[int, int]],
        cpus: int,
        image: BootImage | None,
    ) -> None:
        self.memory, self.cpus = memory, cpus
        self.ram_below_4g = max((one.address + one.size for one in spans if one.address < 4 * GIB), default=0)
        self.ram_above_4g = sum(one.size for one in spans if one.address >= 4 * GIB)
        self.e820: list[E820Entry] = []
        for one in spans:
            self.e820 = carve(self.e820, one.address, one.size, 1)
        self.rsdp: int | None = None
        self.firmware = has(image, Firmware) and image.firmware
        self.msrs: dict[int, int] = {}
        for address, size in reserved:
            self.reserve(address, size)

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        """Carve a range out of the memory map as *type* (2 reserved, 3 ACPI reclaimable, 4 ACPI NVS)."""
        if size <= 0 or address < 0:
            raise UsageError(f"e820: {address:#x}+{size:#x} is no range")
        self.e820 = carve(self.e820, address, size, type)

"""Linear to physical addresses, as a processor's page tables have them (Intel SDM vol. 3, chapter 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.memory import GuestMemoryError
from cardcage.x86 import CR0_PG, CR4_PAE, EFER_LMA

if TYPE_CHECKING:
    from cardcage.memory import GuestMemory
    from cardcage.x86 import VCpuState

__all__ = ["translate"]

CR4_PSE, CR4_LA57 = 1 << 4, 1 << 12
PRESENT, LARGE = 1, 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000


def translate(memory: GuestMemory, state: VCpuState, address: int) -> int | None:
    """The guest-physical address of linear *address*, None where no page is present. Nothing is marked as accessed."""
    system = state.system
    if not system.cr0 & CR0_PG:
        return address & 0xFFFF_FFFF
    try:
        if system.efer & EFER_LMA:
            levels = 5 if system.cr4 & CR4_LA57 else 4
            bits = 12 + 9 * levels
            top = address >> (bits - 1)
            if top not in (0, (1 << (65 - bits)) - 1):  # not canonical
                return None
            return _walk(memory, system.cr3 & ADDRESS, address, levels)
        address &= 0xFFFF_FFFF
        if system.cr4 & CR4_PAE:
            entry = int.from_bytes(memory.read((system.cr3 & 0xFFFF_FFE0) + (address >> 30) * 8, 8), "little")
            return _walk(memory, entry & ADDRESS, address, 2) if entry & PRESENT else None
        return _walk_32(memory, system.cr3 & 0xFFFF_F000, address, large=bool(system.cr4 & CR4_PSE))
    except GuestMemoryError:  # a table outside of RAM
        return None


def _walk(memory: GuestMemory, table: int, address: int, levels: int) -> int | None:
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        index = address >> shift & 511
        entry = int.from_bytes(memory.read(table + index * 8, 8), "little")
        if not entry & PRESENT:
            return None
        if level == 1 or (level <= 3 and entry & LARGE):
            inside = (1 << shift) - 1
            return entry & ADDRESS & ~inside | address & inside
        table = entry & ADDRESS
    return None


def _walk_32(memory: GuestMemory, table: int, address: int, *, large: bool) -> int | None:
    entry = int.from_bytes(memory.read(table + (address >> 22) * 4, 4), "little")
    if not entry & PRESENT:
        return None
    if large and entry & LARGE:
        high = (entry >> 13 & 0xFF) << 32  # PSE-36
        return high | entry & 0xFFC0_0000 | address & 0x3F_FFFF
    entry = int.from_bytes(memory.read((entry & 0xFFFF_F000) + (address >> 12 & 0x3FF) * 4, 4), "little")
    return entry & 0xFFFF_F000 | address & 0xFFF if entry & PRESENT else None

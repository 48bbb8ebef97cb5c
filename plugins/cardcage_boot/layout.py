"""Where boot protocols put things: free ranges of the memory map, and the tables for 64-bit entry."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.x86 import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    DescriptorTable,
    Segment,
    SystemRegisters,
    VCpuState,
    reset_state,
)

if TYPE_CHECKING:
    from cardcage.boot import BootContext, E820Entry

    from cardcage_boot.elf import Elf
    from cardcage_boot.files import BootFile

__all__ = [
    "PAGE",
    "TABLES_END",
    "Room",
    "flat32",
    "linux32",
    "load_elf",
    "long64",
    "write_long_mode_tables",
    "zero_fill",
]

PAGE = 4096
GDT = 0x1000
PML4 = 0x2000
LOW_MAX = 0xE0000000
"""The most RAM that a PC has below 4 GiB, bytes."""
TABLES_END = 0x8000
"""First address past the GDT (0x1000) and the six page-table pages (0x2000 to 0x7FFF) of 64-bit entry."""


class Room:
    """Free guest RAM, from which ranges are taken.

    Args:
        entries: the memory map; ranges of type 1 (RAM) that no other entry covers are free.

    Address 0 to 0xFFF (interrupt vectors and BIOS data) is never given.
    """

    def __init__(self, entries: list[E820Entry]) -> None:
        self._free = [(one.address, one.address + one.size) for one in entries if one.type == 1 and one.size > 0]
        self._free.sort()
        self._end = max((high for _, high in self._free if high <= LOW_MAX), default=0)
        for one in entries:
            if one.type != 1:
                self.remove(one.address, one.size)
        self.remove(0, PAGE)

    def remove(self, address: int, size: int) -> None:
        """Take a range away, whether it was free or not."""
        end, left = address + size, []
        for low, high in self._free:
            if low < min(high, address):
                left.append((low, min(high, address)))
            if max(low, end) < high:
                left.append((max(low, end), high))
        self._free = left

    def holds(self, address: int, size: int) -> bool:
        """True if the whole range is free."""
        return any(low <= address and address + size <= high for low, high in self._free)

    def take(self, address: int, size: int, what: str, file: str | None = None, *, until: int = 0) -> None:
        """Take exactly this range. Raises ConfigError when it is not all free RAM.

        *until* is the end of all that is to be taken, where that is known: the error says how much memory is needed.
        """
        if not self.holds(address, size):
            short = address + size > self._end
            why = self._more(max(until, address + size)) if short else ": it is not free in the machine's memory map"
            raise ConfigError(f"{what} needs guest RAM at {address:#x}-{address + size - 1:#x}{why}", file=file)
        self.remove(address, size)

    def _more(self, end: int) -> str:
        """The advice for what needs RAM up to *end*."""
        return f": give more memory, at least {-(-end >> 20)}M" if end <= LOW_MAX else ", above all RAM below 4 GiB"

    def find(
        self, size: int, *, low: int = PAGE, high: int = 1 << 52, align: int = PAGE, top: bool = False
    ) -> int | None:
        """Take *size* bytes inside [low, high), from the bottom or the *top*; ``None`` when there is no such range.

        *align* is a power of two.
        """
        for start, stop in reversed(self._free) if top else self._free:
            start, stop = max(start, low), min(stop, high)
            at = (stop - size) & -align if top else (start + align - 1) & -align
            if at >= start and at + size <= stop:
                self.remove(at, size)
                return at
        return None

    def need(
        self,
        size: int,
        what: str,
        *,
        file: str | None = None,
        low: int = PAGE,
        high: int = 1 << 52,
        align: int = PAGE,
        top: bool = False,
    ) -> int:
        """As :meth:`find`, but raises ConfigError when there is no such range."""
        at = self.find(size, low=low, high=high, align=align, top=top)
        if at is None:
            # More memory lengthens the last free range.
            above = next((start for start, stop in self._free if stop == self._end), self._end)
            end = ((max(above, low) + align - 1) & -align) + size
            limit = "" if high >= 1 << 32 else f" below {high:#x}"
            advice = "" if end > high else self._more(end)
            raise ConfigError(
                f"{what} of {size / 1048576:.1f} MiB does not fit in the guest's free RAM{limit}{advice}", file=file
            )
        return at


def flat32(entry: int) -> VCpuState:
    """Protected mode without paging, flat 4 GiB segments, interrupts off: how Multiboot and PVH enter.

    (Multiboot 0.6.96, 3.2; Xen, docs/misc/pvh.pandoc.) The descriptor tables are empty: the guest brings its own.
    """
    state = reset_state()
    data = Segment.flat(0x18)
    state.system = SystemRegisters(
        cs=Segment.flat(0x10, code=True),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(limit=0x67, type=11, s=0),
        gdt=DescriptorTable(0, 0),
        idt=DescriptorTable(0, 0),
        cr0=CR0_PE | CR0_ET,
    )
    state.registers.rip, state.registers.rdx = entry, 0
    return state


def linux32(context: BootContext, entry: int) -> VCpuState:
    """Protected mode as :func:`flat32`, over a GDT at 0x1000 with Linux's selectors 0x10 and 0x18, RSI to be set.

    (Linux, Documentation/x86/boot.rst, "32-bit Boot Protocol".)
    """
    context.memory.write(GDT, struct.pack("<4Q", 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
    state = flat32(entry)
    state.system.gdt = DescriptorTable(GDT, 31)
    return state


def write_long_mode_tables(context: BootContext) -> None:
    """Write a GDT at 0x1000 and page tables at 0x2000 that map the first 4 GiB to themselves in 2 MiB pages."""
    code, data, tss = 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067
    context.memory.write(GDT, struct.pack("<6Q", 0, 0, code, data, tss, 0))
    flags = 0x23  # present, writable, accessed
    pdpt, directories = PML4 + PAGE, PML4 + 2 * PAGE
    context.memory.write(PML4, struct.pack("<Q", pdpt | flags).ljust(PAGE, b"\0"))
    pointers = struct.pack("<4Q", *(directories + at * PAGE | flags for at in range(4)))
    context.memory.write(pdpt, pointers.ljust(PAGE, b"\0"))
    context.memory.write(directories, struct.pack("<2048Q", *(at << 21 | 0xE3 for at in range(2048))))  # + dirty, large


def long64(entry: int) -> VCpuState:
    """64-bit mode over the tables of :func:`write_long_mode_tables`, with Linux's selectors 0x10 and 0x18.

    (Linux, Documentation/x86/boot.rst, "64-bit Boot Protocol".)
    """
    state = reset_state()
    data = Segment.flat(0x18)
    state.system = SystemRegisters(
        cs=Segment.flat(0x10, code=True, bits=64),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(selector=0x20, limit=0x67, type=11, s=0),
        gdt=DescriptorTable(GDT, 6 * 8 - 1),
        idt=DescriptorTable(0, 0),
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=PML4,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
    )
    state.registers.rip, state.registers.rdx = entry, 0
    return state


def load_elf(context: BootContext, room: Room, elf: Elf, file: BootFile) -> int:
    """:func:`take_elf`, then :func:`write_elf`; returns the first address past the last segment."""
    until = take_elf(room, elf, file)
    write_elf(context, elf)
    return until


def take_elf(room: Room, elf: Elf, file: BootFile) -> int:
    """Take the places of an ELF file's segments; returns the first address past the last.

    Raises ConfigError when a segment does not lie in free RAM below 4 GiB, or two overlap.
    """
    until = max((one.address + one.size for one in elf.segments), default=0)
    for one in elf.segments:
        if one.address + one.size > 1 << 32:
            raise file.error(f"ELF segment at {one.address:#x}: expected all of it below 4 GiB")
        room.take(one.address, one.size, "an ELF segment", file.path, until=until)
    return until


def write_elf(context: BootContext, elf: Elf) -> None:
    """Write an ELF file's segments at their physical addresses."""
    for one in elf.segments:
        context.memory.write(one.address, one.data)
        zero_fill(context, one.address + len(one.data), one.size - len(one.data))


def zero_fill(context: BootContext, address: int, size: int) -> None:
    """Write zeros, a mebibyte at a time: a file may ask for gigabytes."""
    while size > 0:
        take = min(size, 1 << 20)
        context.memory.write(address, bytes(take))
        address, size = address + take, size - take

"""The tables of the MultiProcessor Specification 1.4 (Intel 242016, chapter 4), for kernels that do not read ACPI."""

from __future__ import annotations

import struct
from typing import Any

from cardcage_pc.acpi import pm as acpi_pm
from cardcage_pc.chips import ioapic

__all__ = ["OFFSET", "render", "size"]

OFFSET = 0x10
"""Where in the extended BIOS data area the floating pointer lies: anywhere in its first KiB, aligned to 16."""
POINTER, HEADER = 16, 44
LOCAL_APIC, SIGNATURE, FEATURES = 0xFEE00000, 0x600, 1 << 9 | 1
"""Of each processor: what EDX holds after reset, and the two features that the specification names, FPU and APIC."""
PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
PCI, ISA = 0, 1
INT, NMI, EXTINT = 0, 1, 3
LEVEL_HIGH = 0x0D


def _entries(board: Any, cpus: int) -> list[bytes]:
    host = next((one.device for one in board.devices.values() if getattr(one.device, "bus_type", "") == "pci"), None)
    made = [
        struct.pack("<BBBBII8x", PROCESSOR, cpu, 0x14, 1 | (2 if cpu == 0 else 0), SIGNATURE, FEATURES)
        for cpu in range(cpus)
    ]
    if host is not None:
        made.append(struct.pack("<BB6s", BUS, PCI, b"PCI   "))
    made.append(struct.pack("<BB6s", BUS, ISA, b"ISA   "))
    made.append(struct.pack("<BBBBI", IO_APIC, 0, ioapic.VERSION, 1, ioapic.ADDRESS))
    taken = set()
    if host is not None:
        there = {where >> 3 for where in host.functions}
        for slot, pin, gsi in host.routing:
            taken.add(gsi)
            if slot in there:
                made.append(struct.pack("<BBHBBBB", IO_INTERRUPT, INT, LEVEL_HIGH, PCI, slot << 2 | pin, 0, gsi))
    level = {acpi_pm.SCI}
    for plugged in board.devices.values():  # what a kernel is told of on its command line
        level |= {gsi for one in plugged.slot.ranges.resources if one.level for gsi in one.irqs}
    for irq in range(16):
        if irq not in taken and irq != 2:
            flags = LEVEL_HIGH if irq in level else 0
            made.append(struct.pack("<BBHBBBB", IO_INTERRUPT, INT, flags, ISA, irq, 0, irq or 2))
    made.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, EXTINT, 0, ISA, 0, 0, 0))
    made.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, ISA, 0, 0xFF, 1))
    return made


def size(board: Any, cpus: int, irqchip: str) -> int:
    """Bytes that :func:`render` gives; 0 without local APICs, of which the tables would tell."""
    if irqchip == "none":
        return 0
    return POINTER + HEADER + sum(map(len, _entries(board, cpus)))


def render(board: Any, cpus: int, address: int) -> bytes:
    """The floating pointer structure, to be written at *address*, and the configuration table right behind it."""
    entries = _entries(board, cpus)
    body = b"".join(entries)
    header = struct.pack(
        "<4sHBB8s12sIHHIHBB",
        *(b"PCMP", HEADER + len(body), 4, 0, b"CARDCAGE", b"PC          ", 0, 0),
        *(len(entries), LOCAL_APIC, 0, 0, 0),
    )
    table = bytearray(header + body)
    table[7] = -sum(table) & 0xFF
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", address + POINTER, 1, 4, 0))
    pointer[10] = -sum(pointer) & 0xFF
    return bytes(pointer + table)

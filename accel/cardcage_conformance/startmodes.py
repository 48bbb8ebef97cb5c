"""The states in which conformance programs start: tables in guest memory and a vCPU's registers, built here."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from cardcage.x86 import (
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    DescriptorTable,
    Registers,
    Segment,
)

if TYPE_CHECKING:
    from cardcage.memory import GuestMemory
    from cardcage.x86 import VCpuState

GDT, IDT, TSS, LIBRARY, LOAD = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
TABLES, STACKS, STACK_STEP = 0x50000, 0x28000, 0x10000
TSS_SELECTOR, TSS_BITMAP, TSS_LIMIT = 0x48, 0x100, 0x301
PRESENT, WRITE, USER, LARGE = 1, 2, 4, 0x80
OPEN_PORTS = range(0xE0, 0x100)  # what ring 3 may use: the harness's ports
GATES_FOR_USERS = (3, 4, 0x80)


def descriptor(base: int, limit: int, access: int, flags: int) -> bytes:
    """A segment descriptor (Intel SDM vol. 3, 3.4.5): *access* is its byte 5, *flags* the upper half of byte 6."""
    return struct.pack(
        "<HHBBBB",
        limit & 0xFFFF,
        base & 0xFFFF,
        base >> 16 & 0xFF,
        access,
        flags << 4 | limit >> 16 & 0xF,
        base >> 24 & 0xFF,
    )


def write_tables(memory: GuestMemory, start: str) -> None:
    """Write descriptor tables, TSS, page tables and interrupt vectors of a start mode."""
    if start == "real16":
        for vector in range(256):
            memory.write(vector * 4, struct.pack("<HH", LIBRARY + vector * 16, 0))
        return
    flat = 0xFFFFF
    entries = [
        bytes(8),
        descriptor(0, flat, 0x9B, 0xA),  # 0x08 code, 64-bit
        descriptor(0, flat, 0x93, 0xC),  # 0x10 data
        descriptor(0, flat, 0x9B, 0xC),  # 0x18 code, 32-bit
        descriptor(0, flat, 0xFB, 0xC),  # 0x20 user code, 32-bit
        descriptor(0, flat, 0xF3, 0xC),  # 0x28 user data
        descriptor(0, flat, 0xFB, 0xA),  # 0x30 user code, 64-bit
        descriptor(0, 0xFFFF, 0x9B, 0),  # 0x38 code, 16-bit
        descriptor(0, 0xFFFF, 0x93, 0),  # 0x40 data, 16-bit
        descriptor(TSS, TSS_LIMIT, 0x8B, 0),  # 0x48 task state, busy
    ]
    memory.write(GDT, b"".join(entries))
    long = start == "long64"
    for vector in range(256):
        handler, dpl = LIBRARY + vector * 16, 3 if vector in GATES_FOR_USERS else 0
        low, attributes = handler & 0xFFFF, 0x8E | dpl << 5
        if long:
            gate = struct.pack("<HHBBHQ", low, 0x08, int(vector == 8), attributes, handler >> 16, 0)
            memory.write(IDT + vector * 16, gate)
        else:
            memory.write(IDT + vector * 8, struct.pack("<HHBBH", low, 0x18, 0, attributes, handler >> 16))
    task = bytearray(TSS_LIMIT + 1)
    if long:
        struct.pack_into("<Q", task, 4, 0x2C000)  # RSP0
        struct.pack_into("<Q", task, 36, 0x2E000)  # IST1
    else:
        struct.pack_into("<II", task, 4, 0x2C000, 0x10)  # ESP0, SS0
    struct.pack_into("<H", task, 102, TSS_BITMAP)
    task[TSS_BITMAP:] = b"\xff" * (len(task) - TSS_BITMAP)
    for port in OPEN_PORTS:
        task[TSS_BITMAP + port // 8] &= ~(1 << port % 8)
    memory.write(TSS, bytes(task))
    if long:
        _write_long_tables(memory)
    elif start == "paging32":
        _write_32bit_tables(memory)


def _write_long_tables(memory: GuestMemory) -> None:
    base = PRESENT | WRITE | USER
    pml4, pdpt, low, high, pt = (TABLES + at * 0x1000 for at in (0, 1, 2, 3, 5))
    for at in (0, 256):
        memory.write(pml4 + at * 8, struct.pack("<Q", pdpt | base))
    memory.write(pdpt, struct.pack("<4Q", low | base, 0, 0, high | base))
    memory.write(low, struct.pack("<512Q", pt | base, *(at << 21 | base | LARGE for at in range(1, 512))))
    memory.write(high, struct.pack("<512Q", *(3 << 30 | at << 21 | base | LARGE for at in range(512))))
    memory.write(pt, struct.pack("<512Q", *(at << 12 | base for at in range(512))))


def _write_32bit_tables(memory: GuestMemory) -> None:
    base = PRESENT | WRITE | USER
    pt = TABLES + 0x1000
    memory.write(TABLES, struct.pack("<1024I", pt | base, *(at << 22 | base | LARGE for at in range(1, 1024))))
    memory.write(pt, struct.pack("<1024I", *(at << 12 | base for at in range(1024))))


def enter(state: VCpuState, start: str, index: int) -> VCpuState:
    """Change the state after reset into that of a start mode; returns *state*."""
    registers, system = Registers(rip=LOAD, rdi=index, rsp=STACKS + index * STACK_STEP), state.system
    state.registers = registers
    if start == "real16":
        registers.rsp = 0x6FF0 - index * 0x400
        system.cs = Segment(selector=0, base=0, type=11)
        system.ds = system.es = system.fs = system.gs = system.ss = Segment(selector=0, base=0)
        system.idt, system.cr0 = DescriptorTable(0, 0x3FF), CR0_ET
        return state
    system.gdt, system.idt = DescriptorTable(GDT, 0xFFF), DescriptorTable(IDT, 0xFFF)
    system.ds = system.es = system.fs = system.gs = system.ss = Segment.flat(0x10)
    system.cs = Segment.flat(0x08, code=True, bits=64) if start == "long64" else Segment.flat(0x18, code=True)
    system.tr = Segment(selector=TSS_SELECTOR, base=TSS, limit=TSS_LIMIT, type=11, s=0)
    system.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE
    system.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT
    if start == "long64":
        system.cr0 |= CR0_PG | CR0_WP
        system.cr3, system.cr4 = TABLES, system.cr4 | CR4_PAE | CR4_PGE
        system.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE
    elif start == "paging32":
        system.cr0 |= CR0_PG | CR0_WP
        system.cr3, system.cr4 = TABLES, system.cr4 | CR4_PSE
    return state

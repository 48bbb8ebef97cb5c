"""Where things lie in a hostile guest's memory, and its tables: descriptors, gates, pages, dispatchers."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

from cardcage_conformance.startmodes import descriptor

from hostile.encode import Asm

if TYPE_CHECKING:
    from cardcage.memory import PhysicalMemory

__all__ = [
    "ALIASES", "APIC", "BIG", "CODE", "CODE_SIZE", "DATA", "DATA_SIZE", "DEVICE", "DISPATCH", "FRAMES", "GDT",
    "HOST_PORT", "IDT32", "IDT64", "LDT", "MAPS", "ORACLE_PORT", "OWN", "PAM", "PAM_SIZE", "REAL_FRAMES", "ROM",
    "ROM_SIZE", "SEGMENT", "TSS", "stack_of", "write_tables",
]  # fmt: skip

IVT, GDT, LDT, IDT32, IDT64, TSS, DISPATCH = 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x6000, 0x7000
COUNTER, REAL_FRAMES, STACKS = 0x7800, 0x7900, 0x9000
FRAMES = 0xA000
"""Frames for IRET, 64 of each width: where the dispatcher goes on after an exception."""
OWN = 0x10000
"""Pages of each vCPU's own, 0x8000 bytes apart: code and data that no other program here is told of."""
CODE, CODE_SIZE = 0x40000, 0x20000
"""Shared code, patched by everybody."""
DATA, DATA_SIZE = 0x60000, 0x10000
PAM, PAM_SIZE = 0xC0000, 0x30000
ROM, ROM_SIZE = 0xF0000, 0x10000
MAPS = 0x100000
"""Page tables: three roots of 64 KiB."""
BIG = 0x200000
ALIASES = 1 << 39
"""Linear: a gigabyte and more that shows one page again and again."""
DEVICE, APIC = 0xD0000000, 0xFEE00000
ORACLE_PORT, HOST_PORT = 0xF0, 0xE0
SEGMENT = {
    "code64": 0x08, "data": 0x10, "code32": 0x18, "user32": 0x23, "userdata": 0x2B, "user64": 0x33, "code16": 0x38,
    "data16": 0x40, "small": 0x48, "down": 0x50, "readonly": 0x58, "conforming": 0x60, "absent": 0x68, "user16": 0x73,
    "gate32": 0x78, "gate64": 0x80, "high": 0x90, "low4g": 0x98, "tss": 0x100,
}  # fmt: skip
FLAT = 0xFFFFF


def _descriptors(r: random.Random) -> bytes:
    entries = {
        "code64": descriptor(0, FLAT, 0x9B, 0xA), "data": descriptor(0, FLAT, 0x93, 0xC),
        "code32": descriptor(0, FLAT, 0x9B, 0xC), "user32": descriptor(0, FLAT, 0xFB, 0xC),
        "userdata": descriptor(0, FLAT, 0xF3, 0xC), "user64": descriptor(0, FLAT, 0xFB, 0xA),
        "code16": descriptor(0, 0xFFFF, 0x9B, 0), "data16": descriptor(0, 0xFFFF, 0x93, 0),
        "small": descriptor(r.randrange(0x70000), r.randrange(0x2000), 0xF3, r.choice((0, 4))),
        "down": descriptor(0, r.choice((0xFFF, 0x0FFF, 0x70, 0)), 0xF7, r.choice((4, 12, 0))),
        "readonly": descriptor(0, FLAT, 0xF1, 0xC), "conforming": descriptor(0, FLAT, 0xFF, 0xC),
        "absent": descriptor(0, FLAT, 0x73, 0xC), "user16": descriptor(r.choice((0, CODE)), 0xFFFF, 0xFB, 0),
        "high": descriptor(r.choice((0xFFFFFFFF, 0xFFFFF000, 0xFFFF0FF0, 0x80000000)), FLAT, 0xF3, 0xC),
        "low4g": descriptor(r.randrange(1 << 32), r.randrange(1 << 20), r.choice((0xF3, 0x93, 0xFB, 0x9B)), 0xC),
    }  # fmt: skip
    table = bytearray(r.randbytes(0x200) if r.random() < 0.3 else bytes(0x200))
    table[0:8] = bytes(8)
    for name, entry in entries.items():
        at = SEGMENT[name] & ~7
        table[at : at + 8] = entry
    target = DISPATCH + r.choice((0, 0x100))
    table[0x78:0x80] = struct.pack("<HHBBH", target, 0x18, r.randrange(4), 0xEC, 0)
    table[0x80:0x90] = struct.pack("<HHBBHII", target, r.choice((8, 8, 0x18)), 0, 0xEC, 0, 0, 0)
    for cpu in range(4):
        at, base = SEGMENT["tss"] + 16 * cpu, TSS + 0x400 * cpu
        table[at : at + 16] = descriptor(base, r.choice((0x67, 0x200, 0x3FF)), 0x89, 0) + bytes(8)
    return bytes(table)


def _dispatchers() -> dict[int, bytes]:
    """At DISPATCH + 0x000 for 64-bit code, 0x100 for 32, 0x200 for 16: go to the next frame."""
    wide = Asm(64, DISPATCH)
    wide.mov(0, 1).absolute(b"\x0f\xc1", 0, COUNTER, prefix=b"\xf0")
    wide.raw(b"\x45\x31\xdb")  # R11: the token of an oracle that did fault
    wide.raw(b"\x83\xe0\x3f", b"\x6b\xc0\x28", b"\x48\x8d\xa0", struct.pack("<i", FRAMES), b"\x48\xcf")
    flat = Asm(32, DISPATCH + 0x100)
    flat.raw(b"\x66\xb8\x10\x00\x8e\xd8\x8e\xd0").mov(0, 1).absolute(b"\x0f\xc1", 0, COUNTER, prefix=b"\xf0")
    flat.raw(b"\x83\xe0\x3f", b"\x6b\xc0\x24", b"\x8d\xa0", struct.pack("<i", FRAMES + 0xA00), b"\xcf")
    real = Asm(16, DISPATCH + 0x200)
    real.raw(b"\x31\xc0\x8e\xd8\x8e\xd0\xfe\x06", struct.pack("<H", COUNTER), b"\xa0", struct.pack("<H", COUNTER))
    real.raw(b"\x83\xe0\x1f\x6b\xc0\x06\x05", struct.pack("<H", REAL_FRAMES), b"\x89\xc4\xcf")
    again64, again32 = b"\x48\xcf", b"\xcf"  # interrupts that go on where they came from
    return {0: bytes(wide.out), 0x100: bytes(flat.out), 0x200: bytes(real.out), 0x80: again64, 0x180: again32}


def _gates(memory: PhysicalMemory, r: random.Random) -> None:
    for vector in range(256):
        back = vector == 2 or (vector >= 32 and vector % 2)
        dpl, kind = 3 if vector in (3, 4) or r.random() < 0.2 else 0, r.choice((0xE, 0xE, 0xF))
        attributes = (0x80 if r.random() < 0.99 or back else 0) | dpl << 5 | kind
        at = DISPATCH + (0x80 if back else 0)
        ist = r.choice((0, 0, 0, 1)) if not back else int(vector != 2)
        memory.write(IDT64 + 16 * vector, struct.pack("<HHBBHQ", at, 8, ist, attributes, 0, 0))
        at = DISPATCH + (0x180 if back else 0x100)
        if r.random() < 0.02 and not back:
            attributes = 0x85  # a task gate
        memory.write(IDT32 + 8 * vector, struct.pack("<HHBBH", at, 0x18, 0, attributes, 0))
        memory.write(IVT + 4 * vector, struct.pack("<HH", DISPATCH + 0x200, 0))


def stack_of(cpu: int) -> int:
    """Where a vCPU's stack for ring 0 begins."""
    return STACKS + 0x200 * cpu + 0x100


def write_tables(memory: PhysicalMemory, r: random.Random) -> None:
    """Descriptor tables, gates, task states and dispatchers; frames come with the programs."""
    memory.write(GDT, _descriptors(r))
    memory.write(LDT, _descriptors(r))
    _gates(memory, r)
    for at, code in _dispatchers().items():
        memory.write(DISPATCH + at, code)
    for cpu in range(4):
        task = bytearray(r.randbytes(0x400) if r.random() < 0.3 else bytes(0x400))
        stack = stack_of(cpu)
        if r.random() < 0.5:
            struct.pack_into("<Q", task, 4, stack)
        else:
            struct.pack_into("<IH", task, 4, stack, 0x10)
        struct.pack_into("<Q", task, 36, stack + 0xF0)
        struct.pack_into("<H", task, 102, r.choice((0x68, 0x80, 0xFFFF)))
        memory.write(TSS + 0x400 * cpu, bytes(task))

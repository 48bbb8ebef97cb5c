"""Where vCPUs start: one of the modes, mostly as an operating system would have it, now and then askew."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from cardcage.x86 import DescriptorTable, Events, Registers, Segment

from hostile.grammar import address
from hostile.places import CODE, DATA, GDT, IDT32, IDT64, LDT, SEGMENT, TSS

if TYPE_CHECKING:
    from cardcage.x86 import VCpuState

    from hostile.pages import Maps

__all__ = ["BITS", "start"]

BITS = {
    "real": 16, "vm86": 16, "code16": 16, "flat32": 32, "paged32": 32, "pae32": 32, "user32": 32, "compat": 32,
    "compat_user": 32, "long": 64, "long_user": 64,
}  # fmt: skip
PE, PG = 0x80010033, 0x80000000


def _segments(state: VCpuState, mode: str, r: random.Random) -> None:
    system, bits = state.system, BITS[mode]
    user = mode in ("user32", "compat_user", "long_user") or (mode in ("paged32", "pae32") and r.random() < 0.3)
    dpl = 3 if user else 0
    names = ("ds", "es", "fs", "gs", "ss")
    if mode in ("real", "vm86"):
        system.cs = Segment(selector=CODE >> 4, base=CODE, type=11 if mode == "real" else 3, dpl=3 * (mode == "vm86"))
        for name in names:
            selector = r.choice((DATA >> 4, CODE >> 4, 0, 0xFFFF, 0xF000)) if name != "ss" else DATA >> 4
            setattr(system, name, Segment(selector=selector, base=selector << 4, dpl=3 * (mode == "vm86")))
        return
    if bits == 64:
        system.cs = Segment.flat(SEGMENT["user64"] if user else SEGMENT["code64"], code=True, bits=64, dpl=dpl)
    elif bits == 32:
        system.cs = Segment.flat(SEGMENT["user32"] if user else SEGMENT["code32"], code=True, dpl=dpl)
    else:
        system.cs = Segment(selector=SEGMENT["code16"], base=CODE, type=11)
    for name in names:
        setattr(system, name, Segment.flat(SEGMENT["userdata"] if user else SEGMENT["data"], dpl=dpl))
    if bits != 64 and r.random() < 0.4:  # limits and bases that accesses cross
        base, limit = r.choice((0, DATA, 0xFFFFFFF0, 0xFFFFF000, 0x80000000)), r.choice((0xFFFF, 0xFFFFFFFF, 0xFFF, 0))
        kind = r.choice((3, 3, 1, 7))
        name = r.choice(names[:4])
        setattr(
            system,
            name,
            Segment(selector=SEGMENT["small"], base=base, limit=limit, type=kind, dpl=3, db=1, g=limit >> 31),
        )
    if bits == 64 and r.random() < 0.2:
        system.fs = Segment(selector=0, base=address(r, _NONE, 64), type=3, dpl=3, db=1)


class _Nowhere:
    ram = 4 << 20


_NONE: Maps = _Nowhere()  # type: ignore[assignment]  # only its RAM is asked for


def start(
    state: VCpuState, mode: str, entry: int, index: int, maps: Maps, r: random.Random, *, avx: bool = False
) -> VCpuState:
    """Change *state* so that the vCPU begins at linear *entry* in *mode*; *avx* switches XSAVE and AVX on."""
    bits = BITS[mode]
    system = state.system
    names = "rax rcx rdx rbx rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
    state.registers = Registers(
        **{name: address(r, maps, bits) if r.random() < 0.5 else r.getrandbits(bits) for name in names}
    )
    state.registers.rip = entry - (CODE if bits == 16 else 0)
    state.registers.rsp = 0x8000 if bits == 16 else DATA + 0x8000 + 0x200 * index
    flags = 0x3002 if r.random() < 0.5 else 2
    flags |= r.choice((0, 0, 0x200, 0x200, 0x600, 0x40202 if r.random() < 0.3 else 0, 0x102 if r.random() < 0.3 else 0))
    state.registers.rflags = flags | (0x20000 if mode == "vm86" else 0)
    _segments(state, mode, r)
    system.gdt, system.ldt = (
        DescriptorTable(GDT, r.choice((0x1FF, 0x1FF, 0xFFFF))),
        Segment(selector=0, base=LDT, limit=0x1FF, type=2, s=0),
    )
    wide = bits == 64 or mode.startswith("compat")
    system.idt = DescriptorTable(IDT64 if wide else IDT32, 0xFFF if wide else 0x7FF)
    system.tr = Segment(selector=SEGMENT["tss"] + 16 * index, base=TSS + 0x400 * index, limit=0x3FF, type=11, s=0)
    system.cr4 = 0x620 | r.choice((0, 0x80, 0x80, 0x10)) if r.random() < 0.9 else r.choice((0, 0x20, 0x10))
    system.cr3 = r.choice(maps.long)
    system.efer = r.choice((1, 0x801, 0x801))
    system.cr0 = 0x10033 | (0 if r.random() < 0.8 else r.choice((8, 4, 1 << 18)))
    if mode == "real":
        system.idt, system.cr0 = DescriptorTable(0, 0x3FF), 0x10
    elif wide:
        system.cr0 |= PG
        system.cr4, system.efer = system.cr4 | 0x20, system.efer | 0x500
    elif mode == "pae32" or (mode in ("user32", "vm86") and r.random() < 0.5):
        system.cr0, system.cr4, system.cr3 = system.cr0 | PG, system.cr4 | 0x20, maps.pae
    elif mode in ("paged32", "user32", "vm86"):
        system.cr0, system.cr4, system.cr3 = system.cr0 | PG, system.cr4 & ~0x20 | 0x10, maps.narrow
    if r.random() < 0.3:
        system.cr4 |= r.choice((1 << 11, 1 << 16, 1 << 20, 1 << 21, 1 << 22))  # UMIP FSGSBASE SMEP SMAP PKE
    if avx:
        system.cr4, state.fpu.xcr0 = system.cr4 | 1 << 18, 7
    state.events = Events()
    state.debug = (0, 0, 0, 0, 0xFFFF0FF0, 0x400)
    return state

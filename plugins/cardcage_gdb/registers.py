"""Registers as gdb has them: those of QEMU's stub for x86-64, in its order and widths."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.values import frozen
from cardcage.x86 import CR0_PE, EFER_LMA, Segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.x86 import VCpuState

__all__ = ["REGISTERS", "SIZE", "Register", "read", "read_all", "said_along", "target_xml", "write"]

GENERAL = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15".split()
SEGMENTS = "cs ss ds es fs gs".split()
CONTROL = "cr0 cr2 cr3 cr4 cr8 efer".split()
FLOATING = "fctrl fstat ftag fiseg fioff foseg fooff fop".split()
KERNEL_GS_BASE = 0xC0000102
FLAG_VM = 1 << 17
FIELDS = {
    "eflags_bits": (
        4,
        "CF=0 PF=2 AF=4 ZF=6 SF=7 TF=8 IF=9 DF=10 OF=11 IOPL=12-13 NT=14 RF=16 VM=17 AC=18 VIF=19 VIP=20 ID=21",
    ),
    "cr0_bits": (8, "PE=0 MP=1 EM=2 TS=3 ET=4 NE=5 WP=16 AM=18 NW=29 CD=30 PG=31"),
    "cr3_bits": (8, "PCID=0-11 PDBR=12-63"),
    "cr4_bits": (
        8,
        "VME=0 PVI=1 TSD=2 DE=3 PSE=4 PAE=5 MCE=6 PGE=7 PCE=8 OSFXSR=9 OSXMMEXCPT=10 UMIP=11 LA57=12 VMXE=13 SMXE=14 "
        "FSGSBASE=16 PCIDE=17 OSXSAVE=18 SMEP=20 SMAP=21 PKE=22",
    ),
    "efer_bits": (8, "SCE=0 LME=8 LMA=10 NXE=11 SVME=12 LMSLE=13 FFXSR=14 TCE=15"),
    "mxcsr_bits": (4, "IE=0 DE=1 ZE=2 OE=3 UE=4 PE=5 DAZ=6 IM=7 DM=8 ZM=9 OM=10 UM=11 PM=12 FZ=15"),
}
"""Types of registers: bytes, and bits by name (Intel SDM vol. 1, 3.4.3 and 10.2.3; vol. 3, 2.5 and 2.2.1)."""
VECTOR = (
    '<vector id="f4" type="ieee_single" count="4"/><vector id="f2" type="ieee_double" count="2"/>'
    '<vector id="b16" type="int8" count="16"/><vector id="w8" type="int16" count="8"/>'
    '<vector id="d4" type="int32" count="4"/><vector id="q2" type="int64" count="2"/>'
    '<union id="xmm"><field name="v4_float" type="f4"/><field name="v2_double" type="f2"/>'
    '<field name="v16_int8" type="b16"/><field name="v8_int16" type="w8"/><field name="v4_int32" type="d4"/>'
    '<field name="v2_int64" type="q2"/><field name="uint128" type="uint128"/></union>'
)


@frozen
class Register:
    """A register: its name, its size in bytes, gdb's type of it, and its group where gdb does not know it."""

    name: str
    size: int
    type: str
    group: str = ""


def _table() -> tuple[Register, ...]:
    pointers = {"rbp": "data_ptr", "rsp": "data_ptr"}
    kinds = {name: f"{name}_bits" for name in ("cr0", "cr3", "cr4", "efer")}
    return (
        *(Register(name, 8, pointers.get(name, "int64")) for name in GENERAL),
        Register("rip", 8, "code_ptr"),
        Register("eflags", 4, "eflags_bits"),
        *(Register(name, 4, "int32") for name in SEGMENTS),
        *(Register(name, 8, "int64") for name in ("fs_base", "gs_base", "k_gs_base")),
        *(Register(name, 8, kinds.get(name, "int64")) for name in CONTROL),
        *(Register(f"st{at}", 10, "i387_ext") for at in range(8)),
        *(Register(name, 4, "int", "float") for name in FLOATING),
        *(Register(f"xmm{at}", 16, "xmm") for at in range(16)),
        Register("mxcsr", 4, "mxcsr_bits", "vector"),
    )


REGISTERS = _table()
"""By gdb's number."""
SIZE = sum(one.size for one in REGISTERS)
PLACES = {one.name: sum(other.size for other in REGISTERS[:at]) for at, one in enumerate(REGISTERS)}
ALONG = [
    (at, 2 * PLACES[one.name], 2 * (PLACES[one.name] + one.size))
    for at, one in enumerate(REGISTERS)
    if one.name in ("rbp", "rsp", "rip")
]
"""Registers that gdb looks at after each step, as gdbserver has them: number, place in digits of :func:`read_all`."""
_general, _control = attrgetter(*GENERAL, "rip"), attrgetter(*CONTROL)


def _field(text: str) -> str:
    name, _, bits = text.partition("=")
    first, _, last = bits.partition("-")
    return f'<field name="{name}" start="{first}" end="{last or first}"/>'


@cache
def target_xml() -> bytes:
    """The target description (GDB manual, appendix G)."""
    types = "".join(
        f'<flags id="{name}" size="{size}">{"".join(map(_field, bits.split()))}</flags>'
        for name, (size, bits) in FIELDS.items()
    )
    rows = "".join(
        f'<reg name="{one.name}" bitsize="{8 * one.size}" type="{one.type}" regnum="{at}"'
        + (f' group="{one.group}"/>' if one.group else "/>")
        for at, one in enumerate(REGISTERS)
    )
    return (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target>'
        "<architecture>i386:x86-64</architecture>"
        f'<feature name="org.gnu.gdb.i386.core">{types}{VECTOR}{rows}</feature></target>'
    ).encode()


def _wide(state: VCpuState) -> bool:
    """Whether it is in 64-bit mode: else the registers have 32 bits, and there are eight of them."""
    return bool(state.system.cs.l and state.system.efer & EFER_LMA)


def read_all(state: VCpuState) -> bytes:
    """The bytes of all registers, one after another, the lowest first."""
    registers, system, xsave = state.registers, state.system, state.fpu.xsave
    general = _general(registers)
    if not _wide(state):
        narrow = [value & 0xFFFF_FFFF for value in general]
        general = (*narrow[:8], *[0] * 8, narrow[16])
    head = pack(
        "<17Q7I9Q",
        *general,
        registers.rflags & 0xFFFF_FFFF,
        *(getattr(system, name).selector for name in SEGMENTS),
        *(system.fs.base, system.gs.base, state.msrs.get(KERNEL_GS_BASE, 0)),
        *_control(system),
    )
    stack = b"".join(xsave[at : at + 10] for at in range(32, 160, 16))
    return head + stack + pack("<8I", *_floating(xsave)) + xsave[160:416] + xsave[24:28]


def read(state: VCpuState, register: Register) -> bytes:
    """Its bytes."""
    at = PLACES[register.name]
    return read_all(state)[at : at + register.size]


def said_along(state: VCpuState) -> bytes:
    """The registers :data:`ALONG` in a stop's words: numbers and bytes in hexadecimal."""
    whole = read_all(state).hex().encode()
    return b"".join(b"%x:%b;" % (number, whole[at:end]) for number, at, end in ALONG)


def _floating(xsave: bytes) -> tuple[int, ...]:
    """The values of :data:`FLOATING`."""
    control, status, present, _, code, place, operand = unpack_from("<HHBBHQQ", xsave)
    tags, top, low = 0xFFFF, status >> 11 & 7, 0xFFFF_FFFF
    for physical in range(8) if present else ():
        if present >> physical & 1:
            tags &= ~((3 ^ _tag(xsave, (physical - top) & 7)) << 2 * physical)
    return control, status, tags, place >> 32, place & low, operand >> 32, operand & low, code


def _tag(xsave: bytes, at: int) -> int:
    """The tag of ST(at) as FSAVE has it: valid, zero or special (Intel SDM vol. 1, 8.1.7)."""
    fraction, exponent = unpack_from("<QH", xsave, 32 + 16 * at)
    if exponent & 0x7FFF == 0 and not fraction:
        return 1
    return 0 if exponent & 0x7FFF not in (0, 0x7FFF) and fraction >> 63 else 2


def write(state: VCpuState, register: Register, data: bytes, memory: Callable[[int, int], bytes]) -> None:
    """Change *state*. *memory(linear address, size)* is looked at for the descriptor of a segment.

    Raises ValueError for a selector that has none.
    """
    name, system, value = register.name, state.system, int.from_bytes(data, "little")
    if name.startswith(("st", "xmm")) or name in FLOATING or name == "mxcsr":
        state.fpu = evolve(state.fpu, xsave=_changed(state.fpu.xsave, name, data))
    elif name in GENERAL or name == "rip":
        setattr(state.registers, name, value)
    elif name == "eflags":
        state.registers.rflags = value | 2
    elif name in SEGMENTS:
        if value != getattr(system, name).selector:
            setattr(system, name, _segment(state, name, value & 0xFFFF, memory))
    elif name in ("fs_base", "gs_base"):
        setattr(system, name[:2], evolve(getattr(system, name[:2]), base=value))
    elif name == "k_gs_base":
        state.msrs = {**state.msrs, KERNEL_GS_BASE: value}
    else:
        setattr(system, name, value)


def _changed(xsave: bytes, name: str, data: bytes) -> bytes:
    area, value = bytearray(xsave), int.from_bytes(data, "little")
    places = {"fctrl": (0, "<H"), "fstat": (2, "<H"), "fop": (6, "<H"), "fioff": (8, "<I"), "fiseg": (12, "<I")}
    places |= {"fooff": (16, "<I"), "foseg": (20, "<I"), "mxcsr": (24, "<I")}
    if name.startswith("st"):
        at = 32 + 16 * int(name[2:])
        area[at : at + 10] = data
    elif name.startswith("xmm"):
        at = 160 + 16 * int(name[3:])
        area[at : at + 16] = data
    elif name == "ftag":
        area[4] = sum(1 << one for one in range(8) if value >> 2 * one & 3 != 3)
    else:
        at, form = places[name]
        pack_into(form, area, at, value & (0xFFFF if form == "<H" else 0xFFFF_FFFF))
    area[512] |= 3  # x87 and SSE are there
    return bytes(area)


def _segment(state: VCpuState, name: str, selector: int, memory: Callable[[int, int], bytes]) -> Segment:
    """What a load of *selector* gives, without its checks of privilege (Intel SDM vol. 3, 3.4.5)."""
    system = state.system
    if not system.cr0 & CR0_PE or state.registers.rflags & FLAG_VM:
        old: Segment = getattr(system, name)
        return evolve(old, selector=selector, base=selector << 4)
    if not selector & ~3:
        return Segment(selector=selector, limit=0, type=0, present=0, unusable=1)
    table = system.ldt if selector & 4 else system.gdt
    if selector | 7 > table.limit:
        raise ValueError(f"selector {selector:#x} is beyond its table")
    word = int.from_bytes(memory(table.base + (selector & ~7), 8), "little")
    limit = word & 0xFFFF | word >> 32 & 0xF0000
    large = word >> 55 & 1
    return Segment(
        selector=selector,
        base=word >> 16 & 0xFF_FFFF | word >> 32 & 0xFF00_0000,
        limit=limit << 12 | 0xFFF if large else limit,
        type=word >> 40 & 15,
        s=word >> 44 & 1,
        dpl=word >> 45 & 3,
        present=word >> 47 & 1,
        avl=word >> 52 & 1,
        l=word >> 53 & 1,
        db=word >> 54 & 1,
        g=large,
    )

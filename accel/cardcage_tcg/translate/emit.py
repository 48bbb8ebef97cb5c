"""Host code as bytes: the few shapes that translated blocks are made of (Intel SDM vol. 2 for the encodings).

In translated code host RSP points at ``struct cpu``; RSI and RDI are scratch; guest RSP, RSI and RDI live in R9, R10
and R11, guest R9, R10 and R11 in ``cpu.gpr``; the other registers keep their numbers.
"""

from __future__ import annotations

from struct import pack
from typing import Any

from iced_x86 import Register

from cardcage_tcg import layout as L

__all__ = [
    "HOST",
    "NUMBER",
    "SPILLED",
    "add",
    "alu_flags",
    "call_state",
    "flags_load",
    "flags_save",
    "jmp_state",
    "lea_disp",
    "load",
    "load16",
    "load32",
    "mov",
    "mov32",
    "named",
    "payload_nop",
    "store",
    "store32",
]

SCRATCH_A, SCRATCH_B = 6, 7  # host RSI, RDI
HOST = {4: 9, 6: 10, 7: 11}
"""Guest register number to host register number, where they differ."""
SPILLED = frozenset({9, 10, 11})
"""Guest registers that live in memory."""

_NAMES = {
    8: "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15",
    4: "EAX ECX EDX EBX ESP EBP ESI EDI R8D R9D R10D R11D R12D R13D R14D R15D",
    2: "AX CX DX BX SP BP SI DI R8W R9W R10W R11W R12W R13W R14W R15W",
    1: "AL CL DL BL SPL BPL SIL DIL R8L R9L R10L R11L R12L R13L R14L R15L",
}
NUMBER: dict[int, tuple[int, int]] = {}
"""iced register to (number, size in bytes), without AH, CH, DH, BH."""
named: dict[tuple[int, int], Any] = {}
"""(number, size) to iced register."""
for _size, _list in _NAMES.items():
    for _number, _name in enumerate(_list.split()):
        _register = getattr(Register, _name)
        NUMBER[_register] = (_number, _size)
        named[_number, _size] = _register


def _state(opcode: bytes, register: int, offset: int, wide: int) -> bytes:
    """``opcode register, [rsp + offset]``; REX.W where *wide* is 8."""
    rex = (0x48 if wide == 8 else 0x40) | register >> 3 << 2
    head = (bytes((rex,)) if rex != 0x40 else b"") + opcode
    if 0 <= offset < 128:
        return head + bytes((0x44 | (register & 7) << 3, 0x24, offset))
    return head + bytes((0x84 | (register & 7) << 3, 0x24)) + pack("<i", offset)


def load(register: int, offset: int) -> bytes:
    """``mov r64, [state + offset]``."""
    return _state(b"\x8b", register, offset, 8)


def load32(register: int, offset: int) -> bytes:
    """``mov r32, [state + offset]``."""
    return _state(b"\x8b", register, offset, 4)


def load16(register: int, offset: int) -> bytes:
    """``movzx r32, word [state + offset]``."""
    return _state(b"\x0f\xb7", register, offset, 4)


def store(register: int, offset: int) -> bytes:
    """``mov [state + offset], r64``."""
    return _state(b"\x89", register, offset, 8)


def store32(register: int, offset: int) -> bytes:
    """``mov [state + offset], r32``."""
    return _state(b"\x89", register, offset, 4)


def add(register: int, offset: int) -> bytes:
    """The register += a word of ``struct cpu``; arithmetic flags change."""
    return _state(b"\x03", register, offset, 8)


def mov(to: int, source: int) -> bytes:
    """``mov r64, r64``."""
    return bytes((0x48 | source >> 3 << 2 | to >> 3, 0x89, 0xC0 | (source & 7) << 3 | (to & 7)))


def mov32(to: int, source: int) -> bytes:
    """``mov r32, r32``: clears the upper half."""
    rex = 0x40 | source >> 3 << 2 | to >> 3
    return (bytes((rex,)) if rex != 0x40 else b"") + bytes((0x89, 0xC0 | (source & 7) << 3 | (to & 7)))


def lea_disp(to: int, base: int, disp: int, wide: int = 8) -> bytes:
    """``lea to, [base + disp]``, 64 or 32 bits wide; *base* is not RSP or R12."""
    rex = (0x48 if wide == 8 else 0x40) | to >> 3 << 2 | base >> 3
    head = (bytes((rex,)) if rex != 0x40 else b"") + b"\x8d"
    if -128 <= disp < 128:
        return head + pack("<Bb", 0x40 | (to & 7) << 3 | (base & 7), disp)
    return head + pack("<Bi", 0x80 | (to & 7) << 3 | (base & 7), disp)


def call_state(offset: int) -> bytes:
    """``call [state + offset]``: seven bytes."""
    return b"\xff\x94\x24" + pack("<i", offset)


def jmp_state(offset: int) -> bytes:
    """``jmp [state + offset]``."""
    return b"\xff\xa4\x24" + pack("<i", offset)


def alu_flags(mask_and: int | None, mask_or: int) -> bytes:
    """``and``/``or`` on the system flags word: clobbers the host's flags."""
    if mask_and is not None:
        return b"\x81\xa4\x24" + pack("<iI", L.EFLAGS, mask_and)
    return b"\x81\x8c\x24" + pack("<iI", L.EFLAGS, mask_or)


payload_nop = b"\x0f\x1f\x84\x00\0\0\0\0"
"""``nop [rax + rax + disp32]``: its displacement tells a stub which instruction of which block called it."""

flags_save = mov(7, 0) + b"\x9f\x0f\x90\xc0" + store(0, L.FL) + mov(0, 7)
"""Arithmetic flags to ``cpu.fl``; clobbers RDI, and the flags stay."""
flags_load = mov(7, 0) + load(0, L.FL) + b"\x04\x7f\x9e" + mov(0, 7)
"""``cpu.fl`` to the arithmetic flags; clobbers RDI."""

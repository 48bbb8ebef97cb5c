"""Machine code out of its parts: just enough of an assembler for programs that are made at random."""

from __future__ import annotations

import struct

__all__ = ["Asm"]

RSP, RBP = 4, 5


class Asm:
    """Code of one width (16, 32 or 64) that grows; offsets are from its start.

    Args:
        bits: the code segment's width.
        at: offset in CS of the first byte.
    """

    def __init__(self, bits: int, at: int) -> None:
        self.bits, self.at, self.out = bits, at, bytearray()

    @property
    def here(self) -> int:
        """Where the next byte goes, as an offset in CS."""
        return self.at + len(self.out)

    def raw(self, *parts: bytes | int) -> Asm:
        """Bytes as they are."""
        for part in parts:
            self.out += bytes((part,)) if isinstance(part, int) else part
        return self

    def mov(self, register: int, value: int) -> Asm:
        """Load a constant: all 64 bits in 64-bit code, 32 else."""
        if self.bits == 64:
            value &= 0xFFFFFFFFFFFFFFFF
            rex = 0x40 | register >> 3
            if value >> 32:
                return self.raw(rex | 8, 0xB8 | register & 7, struct.pack("<Q", value))
            return self.raw(b"" if rex == 0x40 else rex, 0xB8 | register & 7, struct.pack("<I", value))
        prefix = b"\x66" if self.bits == 16 else b""
        return self.raw(prefix, 0xB8 | register & 7, struct.pack("<I", value & 0xFFFFFFFF))

    def mem(
        self, opcode: bytes, register: int, base: int, disp: int = 0, *, prefix: bytes = b"", wide: bool = False
    ) -> Asm:
        """*opcode* with ModRM for [base+disp], 32- or 64-bit addressing; *wide* is REX.W."""
        rex = 0x40 | wide << 3 | register >> 3 << 2 | base >> 3
        address = b"\x67" if self.bits == 16 else b""
        self.raw(address, prefix, rex if self.bits == 64 and rex != 0x40 else b"", opcode)
        mod = 0 if disp == 0 and base & 7 != RBP else 1 if -128 <= disp < 128 else 2
        self.raw(mod << 6 | (register & 7) << 3 | base & 7)
        if base & 7 == RSP:
            self.raw(0x24)
        if mod:
            self.raw(struct.pack("<b" if mod == 1 else "<i", disp))
        return self

    def absolute(self, opcode: bytes, register: int, address: int, *, prefix: bytes = b"", wide: bool = False) -> Asm:
        """*opcode* with ModRM for [address], 32 bits (sign-extended in 64-bit code)."""
        rex = 0x40 | wide << 3 | register >> 3 << 2
        self.raw(b"\x67" if self.bits == 16 else b"", prefix, rex if self.bits == 64 and rex != 0x40 else b"", opcode)
        self.raw((register & 7) << 3 | (4 if self.bits == 64 else 5))
        return self.raw(b"\x25" if self.bits == 64 else b"", struct.pack("<I", address & 0xFFFFFFFF))

    def jump(self, target: int, opcode: bytes = b"\xe9") -> Asm:
        """A near relative jump (or call, or 0F 8x) to an offset in CS."""
        size = 2 if self.bits == 16 else 4
        distance = target - (self.here + len(opcode) + size)
        return self.raw(opcode, (distance & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def back(self, target: int, opcode: int = 0xEB) -> Asm:
        """A short jump to an offset in CS."""
        return self.raw(opcode, (target - self.here - 2) & 0xFF)

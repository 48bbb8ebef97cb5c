"""The registers of one vCPU, where native code has them."""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING

from cardcage_tcg import layout as L

if TYPE_CHECKING:
    from cardcage_tcg.library import Native

__all__ = ["RegisterFile"]


class RegisterFile:
    """General, segment and control registers of one vCPU, in its ``struct cpu``.

    Args:
        native: the library. pointer: of the structure. raw: its bytes.
    """

    def __init__(self, native: Native, pointer: int, raw: memoryview) -> None:
        self.native, self.pointer, self.raw = native, pointer, raw
        self.words, self.halves = raw.cast("Q"), raw.cast("I")

    def field(self, offset: int) -> int:
        """A 64-bit field of ``struct cpu``."""
        return self.words[offset // 8]

    def set_field(self, offset: int, value: int) -> None:
        self.words[offset // 8] = value

    @property
    def mode(self) -> int:
        """``MODE_*`` bits."""
        return self.halves[L.MODE // 4]

    @property
    def rip(self) -> int:
        """Instruction pointer, an offset in CS."""
        return self.words[L.RIP // 8]

    @rip.setter
    def rip(self, value: int) -> None:
        self.words[L.RIP // 8] = value

    @property
    def cs_base(self) -> int:
        """Base of CS; 0 in 64-bit mode."""
        return 0 if self.mode & L.MODE_64 else self.segment_base(1)

    @property
    def eflags(self) -> int:
        """System flags, without the arithmetic ones."""
        return self.words[L.EFLAGS // 8]

    def arithmetic_flags(self) -> int:
        """CF PF AF ZF SF OF."""
        word = self.words[L.FL // 8]
        return word >> 8 & 0xD5 | (word & 1) << 11

    def gpr(self, number: int) -> int:
        """General register *number*, 64 bits."""
        return self.words[L.GPR // 8 + number]

    def set_gpr(self, number: int, value: int) -> None:
        self.words[L.GPR // 8 + number] = value

    def segment_base(self, number: int) -> int:
        return self.words[(L.SEG + L.SIZEOF_SEG * number + L.SEG_BASE) // 8]

    def selector(self, number: int) -> int:
        found: int = unpack_from("<H", self.raw, L.SEG + L.SIZEOF_SEG * number + L.SEG_SEL)[0]
        return found

    @property
    def xcr0(self) -> int:
        """Extended control register 0."""
        return self.halves[L.GUEST_XCR0 // 4]

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        if value & 4 and not self.xcr0 & 4:
            self.raw[L.FX + 512] |= 3  # until now FXSAVE kept the state, which has no header
        self.halves[L.GUEST_XCR0 // 4] = value
        self.native.update_mode(self.pointer)

    def osxsave(self) -> bool:
        """CR4.OSXSAVE."""
        return bool(self.words[L.CR4 // 8] & 1 << 18)

    def linear_after(self, linear: int, by: int) -> int:
        """The linear address *by* bytes behind another, for a program's access: 32 bits wide outside 64-bit mode."""
        return linear + by & (0xFFFFFFFFFFFFFFFF if self.mode & L.MODE_64 else 0xFFFFFFFF)

    def goes_on(self) -> None:
        """The instruction at RIP is in the midst of its iterations: its restart hits no code breakpoint."""
        self.halves[L.DEBUG // 4] |= L.DEBUG_RF

    def release(self) -> None:
        """Nothing is reached here any more."""
        for view in (self.words, self.halves, self.raw):
            view.release()

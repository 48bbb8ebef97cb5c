"""Code for PUSH, POP, LEAVE and the operands of near branches."""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    Instruction,
    Mnemonic,
    OpKind,
    Register,
)

from cardcage_tcg import layout as L
from cardcage_tcg.translate.emit import (
    HOST,
    NUMBER,
    SPILLED,
    lea_disp,
    load,
    load16,
    mov,
    mov32,
    store,
)

if TYPE_CHECKING:
    pass
from cardcage_tcg.translate.allowed import (
    NEAR_MEMORY,
)
from cardcage_tcg.translate.operands import Emulate, Operands, Template

__all__ = ["Stack"]

M, R, K = Mnemonic, Register, OpKind


class Stack(Operands):
    """Movements of the stack pointer."""

    # ---- stack ----

    def stack_pointer(self, delta: int, out: bytearray, t: Template, size: int, write: bool) -> None:
        """RSI = linear address of *size* bytes at the stack pointer plus *delta*; flags as with :meth:`address`."""
        if self.long:
            out += lea_disp(6, 9, delta)
        elif self.mode & L.MODE_SS32:
            out += lea_disp(6, 9, delta, 4)
        else:
            out += lea_disp(6, 9, delta, 4) + b"\x0f\xb7\xf6"
        self.stack_segment(out, t, size, write)

    def stack_commit(self, delta: int, out: bytearray) -> None:
        """The stack pointer moves by *delta*; flags are kept."""
        if self.long:
            out += lea_disp(9, 9, delta)
        elif self.mode & L.MODE_SS32:
            out += lea_disp(9, 9, delta, 4)
        else:
            out += lea_disp(7, 9, delta, 4) + b"\x66" + mov32(9, 7)

    def operand_width(self, ins: Instruction) -> int:
        """Bytes that a push or pop moves."""
        return abs(ins.stack_pointer_increment)

    def operand_width_of_return(self, ins: Instruction) -> int:
        """Bytes of return address that a near RET takes off the stack."""
        return ins.stack_pointer_increment - (ins.immediate16 if ins.op_count else 0)

    def branch_operand(self, ins: Instruction, out: bytearray, t: Template) -> bool:
        """Code for RSI = target of a near indirect JMP or CALL; False if it does not have the mode's width."""
        size = self.width
        if ins.op0_kind == K.REGISTER and NUMBER.get(ins.op0_register, (0, 0))[1] == size:
            number = NUMBER[ins.op0_register][0]
            if number in SPILLED:
                out += load(6, L.GPR + 8 * number)
            else:
                host = HOST.get(number, number)
                if size == 2:
                    out += bytes((0x40 | host >> 3, 0x0F, 0xB7, 0xF0 | (host & 7)))
                else:
                    out += mov(6, host) if size == 8 else mov32(6, host)
            return True
        if ins.op0_kind == K.MEMORY and self.size_of(ins) == size and ins.code in NEAR_MEMORY:
            start = len(out)
            self.address(ins, out, t, size, False)
            at = self.access(out, t, size, False, False, stack=ins.memory_segment == R.SS)
            out += {2: b"\x0f\xb7\x36", 4: b"\x8b\x36", 8: b"\x48\x8b\x36"}[size]
            self.near_operand(ins, t, at, start, len(out) - 1)
            return True
        return False

    def _push(self, ins: Instruction, t: Template, restore: bool) -> Template:
        size = self.operand_width(ins)
        if size not in (2, 4, 8):
            raise Emulate("push")
        out = bytearray()
        kind = ins.op0_kind
        if kind == K.MEMORY:
            if self.bounce:
                raise Emulate("push of memory")
            self.address(ins, out, t, size, False)
            self.access(out, t, size, False, False, stack=ins.memory_segment == R.SS)
            out += {2: b"\x0f\xb7\x3e", 4: b"\x8b\x3e", 8: b"\x48\x8b\x3e"}[size] + store(7, L.SCRATCH + 24)
        self.stack_pointer(-size, out, t, size, True)
        self.access(out, t, size, True, restore, stack=True)
        prefix = {2: b"\x66", 4: b"", 8: b""}[size]
        wide = 0x48 if size == 8 else 0x40
        if kind == K.REGISTER:
            register = ins.op0_register
            if R.ES <= register <= R.GS:
                out += load16(7, L.SEG + L.SIZEOF_SEG * (register - R.ES) + L.SEG_SEL)
                host = 7
            else:
                number = NUMBER[register][0]
                if number in SPILLED:
                    out += load(7, L.GPR + 8 * number)
                    host = 7
                else:
                    host = HOST.get(number, number)
            out += prefix + bytes((wide | host >> 3 << 2, 0x89, 0x06 | (host & 7) << 3))
            self.near(t, 0, 0, len(out) - 1, 4, -size)
        elif kind == K.MEMORY:
            out += load(7, L.SCRATCH + 24) + prefix + bytes((wide, 0x89, 0x3E))
        else:
            value = ins.immediate(0)
            value -= 1 << 64 if value >> 63 else 0
            if size == 2:
                out += b"\x66\xc7\x06" + pack("<H", value & 0xFFFF)
            else:
                out += bytes((wide, 0xC7, 0x06)) + pack("<I", value & 0xFFFFFFFF)
                self.near(t, 0, 0, len(out) - 5, 4, -size)
        self.stack_commit(-size, out)
        t.moves = -size
        t.code = bytes(out)
        return t

    def _pop_memory(self, ins: Instruction, t: Template, restore: bool) -> Template:
        size = self.operand_width(ins)
        if self.bounce or size not in (2, 4, 8):
            raise Emulate("pop to memory")
        out = bytearray()
        self.stack_pointer(0, out, t, size, False)
        self.access(out, t, size, False, False, stack=True)
        out += {2: b"\x0f\xb7\x3e", 4: b"\x8b\x3e", 8: b"\x48\x8b\x3e"}[size] + store(7, L.SCRATCH + 24)
        to = ins.copy()
        if ins.memory_base in (R.RSP, R.ESP):  # the address is computed with the incremented pointer
            if not self.long:
                raise Emulate("pop to the stack")
            to.memory_displacement = ins.memory_displacement + size & 0xFFFFFFFFFFFFFFFF
            to.memory_displ_size = 8
        self.address(to, out, t, size, True)
        self.access(out, t, size, True, restore, stack=ins.memory_segment == R.SS)
        out += load(7, L.SCRATCH + 24) + {2: b"\x66\x89\x3e", 4: b"\x89\x3e", 8: b"\x48\x89\x3e"}[size]
        self.stack_commit(size, out)
        t.code = bytes(out)
        return t

    def _pop(self, ins: Instruction, t: Template, restore: bool) -> Template:
        if ins.op0_kind == K.MEMORY:
            return self._pop_memory(ins, t, restore)
        size = self.operand_width(ins)
        if ins.op0_kind != K.REGISTER or ins.op0_register not in NUMBER or size not in (2, 4, 8):
            raise Emulate("pop")
        number = NUMBER[ins.op0_register][0]
        out = bytearray()
        self.stack_pointer(0, out, t, size, False)
        self.access(out, t, size, False, restore, stack=True)
        if number == 4:  # POP SP: the popped value wins
            if size == 2:
                out += b"\x0f\xb7\x36"
                self.stack_commit(size, out)
                out += b"\x66" + mov32(9, 6)
            else:
                out += b"\x4c\x8b\x0e" if size == 8 else b"\x44\x8b\x0e"
                self.near(t, 0, 0, len(out) - 1, 4, 0)
        else:
            if size == 2:
                if number in SPILLED:
                    out += b"\x0f\xb7\x3e\x66\x89\xbc\x24" + pack("<i", L.GPR + 8 * number)
                else:
                    host = HOST.get(number, number)
                    out += b"\x66" + bytes((0x40 | host >> 3 << 2, 0x8B, 0x06 | (host & 7) << 3))
            elif number in SPILLED:
                out += b"\x48\x8b\x3e"
                self.near(t, 0, 0, len(out) - 1, 4, 0)
                out += store(7, L.GPR + 8 * number)
            else:
                host = HOST.get(number, number)
                out += bytes(((0x48 if size == 8 else 0x40) | host >> 3 << 2, 0x8B, 0x06 | (host & 7) << 3))
                self.near(t, 0, 0, len(out) - 1, 4, 0)
            self.stack_commit(size, out)
            t.moves = size
        t.code = bytes(out)
        return t

    def _leave(self, ins: Instruction, t: Template, restore: bool) -> Template:
        size = self.operand_width(ins) or self.width
        out = bytearray()
        if self.long and ins.code == Code.LEAVEQ:
            out += mov(6, 5)
            self.access(out, t, 8, False, restore, stack=True)
            out += b"\x4c\x8d\x4d\x08\x48\x8b\x2e"  # lea r9, [rbp+8]; mov rbp, [rsi]
            self.near(t, 0, 0, len(out) - 1, 5, 0)
        elif not self.long and ins.code == Code.LEAVED and self.mode & L.MODE_SS32:
            out += mov32(6, 5)
            self.stack_segment(out, t, 4, False)
            self.access(out, t, 4, False, restore, stack=True)
            out += b"\x44\x8d\x4d\x04\x8b\x2e"
        else:
            raise Emulate(f"leave {size}")
        t.code = bytes(out)
        return t

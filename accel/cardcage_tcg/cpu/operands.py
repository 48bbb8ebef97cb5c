"""Parts of the instructions that Python does: registers, addresses, memory operands, the stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, Register

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.translate.emit import NUMBER

if TYPE_CHECKING:
    from cardcage.vcpu import Ops

    from cardcage_tcg.cpu.linear import LinearMemory
    from cardcage_tcg.cpu.registers import RegisterFile

__all__ = ["Operands"]

R = Register
AC = 17
HIGH: dict[int, int] = {R.AH: 0, R.CH: 1, R.DH: 2, R.BH: 3}


class Operands:
    """The operands of one vCPU's instructions.

    Attributes:
        pushed: what the PUSH or POP of memory that is being done has already read from memory, if it has.
    """

    def __init__(self, registers: RegisterFile, linear: LinearMemory) -> None:
        self._registers, self._linear = registers, linear
        self.pushed: int | None = None

    def wrap(self, rip: int) -> int:
        mode = self._registers.mode
        return rip & (0xFFFFFFFFFFFFFFFF if mode & L.MODE_64 else 0xFFFFFFFF if mode & L.MODE_32 else 0xFFFF)

    def get(self, register: int) -> int:
        high = HIGH.get(register)
        if high is not None:
            return self._registers.gpr(high) >> 8 & 0xFF
        if R.ES <= register <= R.GS:
            return self._registers.selector(register - R.ES)
        number, size = NUMBER[register]
        return self._registers.gpr(number) & ((1 << size * 8) - 1)

    def set(self, register: int, value: int) -> None:
        high = HIGH.get(register)
        if high is not None:
            self._registers.set_gpr(high, self._registers.gpr(high) & ~0xFF00 | (value & 0xFF) << 8)
            return
        number, size = NUMBER[register]
        self.set_number(number, size, value)

    def set_number(self, number: int, size: int, value: int) -> None:
        if size == 8 or size == 4:
            self._registers.set_gpr(number, value & ((1 << size * 8) - 1))
        else:
            mask = (1 << size * 8) - 1
            self._registers.set_gpr(number, self._registers.gpr(number) & ~mask | value & mask)

    def address(self, ins: Instruction) -> int:
        """Linear address of the memory operand."""
        base, index, disp = ins.memory_base, ins.memory_index, ins.memory_displacement
        if base in (R.RIP, R.EIP):
            offset = disp
        else:
            offset = disp
            size = 8 if self._registers.mode & L.MODE_64 else ins.memory_displ_size or 4
            for register, scale in ((base, 1), (index, ins.memory_index_scale)):
                if register in NUMBER:
                    size = NUMBER[register][1]
                    offset += self.get(register) * scale
            offset &= (1 << size * 8) - 1
        return self.linear(ins.memory_segment, offset)

    def linear(self, segment: int, offset: int) -> int:
        if self._registers.mode & L.MODE_64:
            if segment in (R.FS, R.GS):
                offset += self._registers.segment_base(segment - R.ES)
            return offset & 0xFFFFFFFFFFFFFFFF
        return offset + self._registers.segment_base(segment - R.ES) & 0xFFFFFFFF

    def load(self, linear: int, size: int, ops: Ops) -> int:
        self._aligned(linear, size)
        return int.from_bytes(self._linear.read(linear, size, ops), "little")

    def store(self, linear: int, size: int, value: int, ops: Ops) -> None:
        self._aligned(linear, size)
        self._linear.write(linear, (value & ((1 << size * 8) - 1)).to_bytes(size, "little"), ops)

    def _aligned(self, linear: int, size: int) -> None:
        if self._registers.mode & L.MODE_AC and linear & size - 1:
            raise Fault(AC, 0)

    def stack(self) -> tuple[int, int]:
        """Stack pointer and the mask of its width."""
        mode = self._registers.mode
        mask = 0xFFFFFFFFFFFFFFFF if mode & L.MODE_64 else 0xFFFFFFFF if mode & L.MODE_SS32 else 0xFFFF
        return self._registers.gpr(4) & mask, mask

    def set_stack(self, value: int, mask: int) -> None:
        self._registers.set_gpr(4, value & mask if mask != 0xFFFF else self._registers.gpr(4) & ~mask | value & mask)

    def push(self, size: int, value: int, ops: Ops) -> None:
        pointer, mask = self.stack()
        pointer = pointer - size & mask
        self.store(self.linear(R.SS, pointer), size, value, ops)
        self.set_stack(pointer, mask)

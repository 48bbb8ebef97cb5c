"""Control flow and stack instructions: forms and places that blocks leave to Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, MemorySizeInfo, Mnemonic, OpKind, Register

from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.translate.emit import NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.vcpu import Ops

    from cardcage_tcg.cpu.operands import Operands
    from cardcage_tcg.cpu.registers import RegisterFile

__all__ = ["flow_table"]

M, R, K = Mnemonic, Register, OpKind
UD, ZF = 6, 0x40


class _Flow:
    def __init__(self, registers: RegisterFile, operands: Operands) -> None:
        self._registers, self._operands = registers, operands

    def _target(self, ins: Instruction, ops: Ops) -> tuple[int, int]:
        """(target, operand size) of a near branch. Far ones raise Fault(UD): they have helpers."""
        kind = ins.op0_kind
        if kind in (K.NEAR_BRANCH16, K.NEAR_BRANCH32, K.NEAR_BRANCH64):
            size = {K.NEAR_BRANCH16: 2, K.NEAR_BRANCH32: 4, K.NEAR_BRANCH64: 8}[kind]
            return ins.near_branch_target, size
        if kind == K.REGISTER:
            return self._operands.get(ins.op0_register), NUMBER[ins.op0_register][1]
        if kind == K.MEMORY:
            size = MemorySizeInfo(ins.memory_size).size
            return self._operands.load(self._operands.address(ins), size, ops), size
        raise Fault(UD)

    def call(self, ins: Instruction, ops: Ops) -> None:
        target, size = self._target(ins, ops)
        self._operands.push(size, ins.next_ip, ops)
        self._registers.rip = self._operands.wrap(target)

    def jmp(self, ins: Instruction, ops: Ops) -> None:
        target, size = self._target(ins, ops)
        self._registers.rip = self._operands.wrap(target & ((1 << size * 8) - 1))

    def ret(self, ins: Instruction, ops: Ops) -> None:
        extra = ins.immediate16 if ins.op_count else 0
        size = ins.stack_pointer_increment - extra
        pointer, mask = self._operands.stack()
        target = self._operands.load(self._operands.linear(R.SS, pointer), size, ops)
        self._operands.set_stack(pointer + size + extra, mask)
        self._registers.rip = self._operands.wrap(target)

    def counted(self, ins: Instruction, ops: Ops) -> None:
        del ops
        code = ins.code
        names = (
            (
                2,
                (
                    Code.JCXZ_REL8_16,
                    Code.JCXZ_REL8_32,
                    Code.LOOP_REL8_16_CX,
                    Code.LOOPE_REL8_16_CX,
                    Code.LOOPNE_REL8_16_CX,
                    Code.LOOP_REL8_32_CX,
                    Code.LOOPE_REL8_32_CX,
                    Code.LOOPNE_REL8_32_CX,
                ),
            ),
            (
                8,
                (
                    Code.JRCXZ_REL8_16,
                    Code.JRCXZ_REL8_64,
                    Code.LOOP_REL8_64_RCX,
                    Code.LOOPE_REL8_64_RCX,
                    Code.LOOPNE_REL8_64_RCX,
                ),
            ),
        )
        size = next((width for width, codes in names if code in codes), 4)
        count = self._registers.gpr(1) & ((1 << size * 8) - 1)
        zero = bool(self._registers.arithmetic_flags() & ZF)
        if ins.mnemonic in (M.LOOP, M.LOOPE, M.LOOPNE):
            count = count - 1 & ((1 << size * 8) - 1)
            self._operands.set_number(1, size, count)
            taken = count != 0 and (ins.mnemonic == M.LOOP or zero == (ins.mnemonic == M.LOOPE))
        else:
            taken = count == 0
        if taken:
            self._registers.rip = self._operands.wrap(ins.near_branch_target)

    def push(self, ins: Instruction, ops: Ops) -> None:
        size = abs(ins.stack_pointer_increment)
        if ins.op0_kind == K.REGISTER:
            value = self._operands.get(ins.op0_register)
        elif ins.op0_kind == K.MEMORY:
            value = (
                self._operands.load(self._operands.address(ins), size, ops)
                if self._operands.pushed is None
                else self._operands.pushed
            )
        else:
            value = ins.immediate(0)
        self._operands.push(size, value, ops)

    def pop(self, ins: Instruction, ops: Ops) -> None:
        size = ins.stack_pointer_increment
        pointer, mask = self._operands.stack()
        value = self._operands.pushed
        if value is None:
            value = self._operands.load(self._operands.linear(R.SS, pointer), size, ops)
        if ins.op0_kind == K.REGISTER:
            if ins.op0_register not in NUMBER:
                raise Fault(UD)
            self._operands.set_stack(pointer + size, mask)
            self._operands.set_number(NUMBER[ins.op0_register][0], size, value)
            return
        before = self._registers.gpr(4)
        self._operands.set_stack(pointer + size, mask)  # the address is computed with the incremented pointer
        try:
            self._operands.store(self._operands.address(ins), size, value, ops)
        except Fault:
            self._registers.set_gpr(4, before)
            raise

    def leave(self, ins: Instruction, ops: Ops) -> None:
        size = {Code.LEAVEW: 2, Code.LEAVED: 4, Code.LEAVEQ: 8}[ins.code]
        _, mask = self._operands.stack()
        pointer = self._registers.gpr(5) & mask
        value = self._operands.load(self._operands.linear(R.SS, pointer), size, ops)
        self._operands.set_stack(pointer + size, mask)
        self._operands.set_number(5, size, value)


def flow_table(registers: RegisterFile, operands: Operands) -> dict[int, Callable[[Instruction, Ops], None]]:
    """Return the emulator's functions for these instructions."""
    flow = _Flow(registers, operands)
    return {
        M.CALL: flow.call,
        M.JMP: flow.jmp,
        M.RET: flow.ret,
        M.PUSH: flow.push,
        M.POP: flow.pop,
        M.LEAVE: flow.leave,
        **dict.fromkeys((M.LOOP, M.LOOPE, M.LOOPNE, M.JCXZ, M.JECXZ, M.JRCXZ), flow.counted),
    }

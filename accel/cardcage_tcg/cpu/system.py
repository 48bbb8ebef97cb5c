"""CPUID, and the MSRs and XCR0 that native code leaves to Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Instruction, Mnemonic

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.vcpu import Ops

    from cardcage_tcg.cpu.vcpu import TcgVCpu

__all__ = ["system_table"]

M = Mnemonic
UD, GP = 6, 13


class _System:
    def __init__(self, cpu: TcgVCpu) -> None:
        self._cpu, self._registers = cpu, cpu.registers

    def cpuid(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        registers = self._registers
        leaf, sub = registers.gpr(0) & 0xFFFFFFFF, registers.gpr(1) & 0xFFFFFFFF
        for number, value in zip((0, 3, 1, 2), self._cpu.cpuid(leaf, sub), strict=True):
            registers.set_gpr(number, value)
        self._cpu.native.keep_leaf(self._cpu.pointer, leaf, sub)  # native code answers next time

    def _supervisor(self) -> None:
        if self._registers.mode & L.MODE_CPL3:
            raise Fault(GP, 0)

    def rdmsr(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        self._supervisor()
        value = self._cpu.msrs.read(self._registers.gpr(1) & 0xFFFFFFFF)
        if value is None:
            raise Fault(GP, 0)
        self._registers.set_gpr(0, value & 0xFFFFFFFF)
        self._registers.set_gpr(2, value >> 32)

    def wrmsr(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        self._supervisor()
        value = self._registers.gpr(0) & 0xFFFFFFFF | (self._registers.gpr(2) & 0xFFFFFFFF) << 32
        if not self._cpu.msrs.write(self._registers.gpr(1) & 0xFFFFFFFF, value):
            raise Fault(GP, 0)

    def xgetbv(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        if not self._registers.osxsave():
            raise Fault(UD)
        if self._registers.gpr(1) & 0xFFFFFFFF:
            raise Fault(GP, 0)
        self._registers.set_gpr(0, self._registers.xcr0)
        self._registers.set_gpr(2, 0)

    def xsetbv(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        if not self._registers.osxsave():
            raise Fault(UD)
        self._supervisor()
        value = self._registers.gpr(0) & 0xFFFFFFFF | (self._registers.gpr(2) & 0xFFFFFFFF) << 32
        if self._registers.gpr(1) & 0xFFFFFFFF or not self._cpu.vm.model.takes_xcr0(value):
            raise Fault(GP, 0)
        self._registers.xcr0 = value


def system_table(cpu: TcgVCpu) -> dict[int, Callable[[Instruction, Ops], None]]:
    """Return the emulator's functions for these instructions."""
    system = _System(cpu)
    return {
        M.CPUID: system.cpuid,
        M.RDMSR: system.rdmsr,
        M.WRMSR: system.wrmsr,
        M.XGETBV: system.xgetbv,
        M.XSETBV: system.xsetbv,
    }

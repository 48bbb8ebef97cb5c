"""Instructions that Python does: ports, CPUID, rare MSRs, rare forms, and writes that need more than one host store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.cpu.operands import Operands
from cardcage_tcg.translate.allowed import decoder_of, is_foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.vcpu import Ops

    from cardcage_tcg.cpu.vcpu import TcgVCpu

    Do = Callable[[Instruction, Ops], None]

__all__ = ["Emulator"]

UD = 6


def _tables(cpu: TcgVCpu, operands: Operands) -> Iterator[dict[int, Do]]:
    """What does each instruction, by kinds that have none in common: most guests need the first kind, and few the last,
    so each is loaded when the guest has an instruction that none before it knows."""
    from cardcage_tcg.cpu.ports import port_table

    yield port_table(cpu, operands)
    from cardcage_tcg.cpu.system import system_table

    yield system_table(cpu)
    from cardcage_tcg.cpu.flow import flow_table

    yield flow_table(cpu.registers, operands)
    from cardcage_tcg.cpu.vectors import vector_table

    yield vector_table(cpu, operands)


class Emulator:
    """Does single instructions for one vCPU whose registers are all in its ``struct cpu``."""

    def __init__(self, cpu: TcgVCpu) -> None:
        self._cpu, self._registers, self._linear = cpu, cpu.registers, cpu.linear
        self._operands = Operands(cpu.registers, cpu.linear)
        self._hidden = cpu.vm.model.hidden
        self._decoded: dict[tuple[bytes, int, int], Instruction] = {}
        self._table: dict[int, Do] = {}
        self._more = _tables(cpu, self._operands)

    def fetch(self, pc: int) -> Instruction:
        """Decode the instruction at RIP *pc*. Raises Fault when it cannot be fetched."""
        registers, memory = self._registers, self._linear
        mode = registers.mode
        linear = pc if mode & L.MODE_64 else (registers.cs_base + pc) & 0xFFFFFFFF
        data = memory.fetch_bytes(linear, 15)
        key = data, pc, mode & (L.MODE_64 | L.MODE_32)
        found = self._decoded.get(key)
        if found is None:
            bits = 64 if mode & L.MODE_64 else 32 if mode & L.MODE_32 else 16
            found = decoder_of(bits, data, pc).decode()
            if found.code == Code.INVALID and len(data) < 15:
                memory.fetch_fault(registers.linear_after(linear, len(data)))
            if is_foreign(found) or not self._hidden.isdisjoint(found.cpuid_features()):
                found = Instruction()  # invalid
            if len(self._decoded) > 4096:
                self._decoded.clear()
            self._decoded[key] = found
        return found

    def _find(self, mnemonic: int) -> Do | None:
        while (do := self._table.get(mnemonic)) is None and (more := next(self._more, None)) is not None:
            self._table |= more
        return do

    def run(self, ops: Ops, *, pushed: int | None = None) -> None:
        """Do the instruction at RIP, or deliver the exception it ends with.

        Args:
            pushed: what a PUSH or POP of memory has already read: a device must not be asked twice.
        """
        self._operands.pushed = pushed
        registers = self._registers
        start = registers.rip
        try:
            ins = self.fetch(start)
            do = self._find(ins.mnemonic)
            if do is None or ins.code == Code.INVALID:
                raise Fault(UD)
            registers.rip = self._operands.wrap(ins.next_ip)
            do(ins, ops)
        except Fault as fault:
            registers.rip = start
            self._cpu.raise_exception(fault.vector, fault.error)

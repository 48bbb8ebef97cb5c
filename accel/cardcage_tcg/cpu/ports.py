"""IN and OUT, and one element of INS and OUTS."""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING

from iced_x86 import Instruction, Mnemonic, OpKind, Register

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.translate.emit import NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.vcpu import Ops

    from cardcage_tcg.cpu.operands import Operands
    from cardcage_tcg.cpu.vcpu import TcgVCpu

__all__ = ["port_table"]

M, R, K = Mnemonic, Register, OpKind
GP = 13
_SUFFIX = {getattr(M, f"{op}{s}"): s for op in ("INS", "OUTS") for s in "BWD"}
_WIDTH = {
    **dict.fromkeys((K.MEMORY_SEG_SI, K.MEMORY_ESDI, K.MEMORY_SEG_DI), 2),
    **dict.fromkeys((K.MEMORY_SEG_ESI, K.MEMORY_ESEDI, K.MEMORY_SEG_EDI), 4),
    **dict.fromkeys((K.MEMORY_SEG_RSI, K.MEMORY_ESRDI, K.MEMORY_SEG_RDI), 8),
}


class _Ports:
    def __init__(self, cpu: TcgVCpu, operands: Operands) -> None:
        self._registers, self._linear, self._operands = cpu.registers, cpu.linear, operands
        self._halves, self._events = cpu.halves, cpu.vm.events

    def _string(self, ins: Instruction) -> tuple[int, int, int]:
        """(element size, address mask, step)."""
        size = {"B": 1, "W": 2, "D": 4}[_SUFFIX[ins.mnemonic]]
        width = next((_WIDTH[ins.op_kind(i)] for i in range(ins.op_count) if ins.op_kind(i) in _WIDTH), 8)
        step = -size if self._registers.eflags & 0x400 else size
        return size, (1 << width * 8) - 1, step

    def _advance(self, number: int, mask: int, step: int) -> None:
        value = self._registers.gpr(number) + step & mask
        self._registers.set_gpr(number, value if mask > 0xFFFF else self._registers.gpr(number) & ~mask | value)

    def _repeat(self, ins: Instruction, mask: int) -> bool:
        """False when a repeat count is zero: nothing to do."""
        if not (ins.has_rep_prefix or ins.has_repne_prefix):
            return True
        return bool(self._registers.gpr(1) & mask)

    def _again(self, ins: Instruction, mask: int) -> None:
        if ins.has_rep_prefix or ins.has_repne_prefix:
            self._advance(1, mask, -1)
            if self._registers.gpr(1) & mask:
                self._registers.rip = ins.ip
                self._registers.goes_on()

    def _allowed(self, port: int, size: int) -> None:
        """The I/O permission bitmap, where IOPL does not already allow it. Raises Fault(GP)."""
        if not self._registers.mode & L.MODE_IOPL and not self._bitmap_allows(port, size):
            raise Fault(GP, 0)

    def _port(self, ins: Instruction, at: int) -> int:
        return ins.immediate8 if ins.op_kind(at) == K.IMMEDIATE8 else self._registers.gpr(2) & 0xFFFF

    def in_(self, ins: Instruction, ops: Ops) -> None:
        size, port = NUMBER[ins.op0_register][1], self._port(ins, 1)
        self._allowed(port, size)
        self._operands.set_number(0, size, ops.pio_read(port, size))
        self._met(port, size)

    def out(self, ins: Instruction, ops: Ops) -> None:
        size, port = NUMBER[ins.op1_register][1], self._port(ins, 0)
        self._allowed(port, size)
        self._write(ops, port, size, self._registers.gpr(0) & ((1 << size * 8) - 1))
        self._met(port, size)

    def ins(self, ins: Instruction, ops: Ops) -> None:
        size, mask, step = self._string(ins)
        if self._repeat(ins, mask):
            port = self._registers.gpr(2) & 0xFFFF
            self._allowed(port, size)
            linear = self._operands.linear(R.ES, self._registers.gpr(7) & mask)
            self._linear.probe_write(linear, size)  # a fault must come before the port is read
            self._operands.store(linear, size, ops.pio_read(port, size), ops)
            self._met(port, size)
            self._advance(7, mask, step)
            self._again(ins, mask)

    def outs(self, ins: Instruction, ops: Ops) -> None:
        size, mask, step = self._string(ins)
        if self._repeat(ins, mask):
            port = self._registers.gpr(2) & 0xFFFF
            self._allowed(port, size)
            value = self._operands.load(
                self._operands.linear(ins.memory_segment, self._registers.gpr(6) & mask), size, ops
            )
            self._write(ops, port, size, value)
            self._met(port, size)
            self._advance(6, mask, step)
            self._again(ins, mask)

    def _bitmap_allows(self, port: int, size: int) -> bool:
        """The TSS's I/O permission bitmap (Intel SDM vol. 1, 19.5.2)."""
        base = self._registers.segment_base(7)
        limit, attributes = unpack_from("<I2xH", self._registers.raw, L.SEG + L.SIZEOF_SEG * 7 + L.SEG_LIMIT)
        if attributes & 0xF not in (9, 11) or limit < 103:
            return False
        header = self._linear.supervisor_read(base + 102, 2)
        at = int.from_bytes(header, "little") + port // 8
        if at + 1 > limit:
            return False
        bits = int.from_bytes(self._linear.supervisor_read(base + at, 2), "little")
        return not bits >> (port & 7) & ((1 << size) - 1)

    def _write(self, ops: Ops, port: int, size: int, value: int) -> None:
        """A write to a port that is allowed; doorbells first."""
        if not (self._events.has_bells and self._linear.rings_bell(True, port, size, value)):
            ops.pio_write(port, size, value)

    def _met(self, port: int, size: int) -> None:
        """Ports were accessed: an I/O breakpoint there traps after the instruction."""
        if self._halves[L.ARMED // 4] & L.ARMED_PORT:
            self._registers.native.debug_port(self._registers.pointer, port, size)


def port_table(cpu: TcgVCpu, operands: Operands) -> dict[int, Callable[[Instruction, Ops], None]]:
    """Return the emulator's functions for these instructions."""
    ports = _Ports(cpu, operands)
    return {
        M.IN: ports.in_,
        M.OUT: ports.out,
        **dict.fromkeys((M.INSB, M.INSW, M.INSD), ports.ins),
        **dict.fromkeys((M.OUTSB, M.OUTSW, M.OUTSD), ports.outs),
    }

"""Vector instructions that Python does: gathers, and masked moves beyond a page or of devices (Intel SDM vol. 2).

Elements that are masked out are not accessed, so they cannot fault; a gather that faults keeps what it has got.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Mnemonic, OpKind, RegisterExt

from cardcage_tcg import layout as L
from cardcage_tcg.cpu.faults import Fault
from cardcage_tcg.translate.emit import NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.vcpu import Ops
    from iced_x86 import Instruction, Register_

    from cardcage_tcg.cpu.operands import Operands
    from cardcage_tcg.cpu.vcpu import TcgVCpu

__all__ = ["vector_table"]

M, K = Mnemonic, OpKind
MM_AT, SSE_AT, AVX_AT, HEADER_AT = L.FX + 32, L.FX + 160, L.FX + 576, L.FX + 512
# (bytes of an element, bytes of an index)
GATHERS = {
    M.VGATHERDPS: (4, 4), M.VPGATHERDD: (4, 4), M.VGATHERQPS: (4, 8), M.VPGATHERQD: (4, 8),
    M.VGATHERDPD: (8, 4), M.VPGATHERDQ: (8, 4), M.VGATHERQPD: (8, 8), M.VPGATHERQQ: (8, 8),
}  # fmt: skip
STORES = (M.MASKMOVQ, M.MASKMOVDQU, M.VMASKMOVDQU)
MOVES = {M.VMASKMOVPS: 4, M.VMASKMOVPD: 8, M.VPMASKMOVD: 4, M.VPMASKMOVQ: 8}


class _Vectors:
    def __init__(self, cpu: TcgVCpu, operands: Operands) -> None:
        self._registers, self._linear, self._operands = cpu.registers, cpu.linear, operands

    def _get(self, register: Register_, size: int = 32) -> bytearray:
        number, raw = RegisterExt.number(register), self._registers.raw
        low, high = SSE_AT + 16 * number, AVX_AT + 16 * number
        return bytearray(bytes(raw[low : low + 16]) + bytes(raw[high : high + 16]))[:size]

    def _put(self, register: Register_, value: bytes | bytearray) -> None:
        number, raw = RegisterExt.number(register), self._registers.raw
        value = bytes(value).ljust(32, b"\0")
        raw[SSE_AT + 16 * number : SSE_AT + 16 * number + 16] = value[:16]
        raw[AVX_AT + 16 * number : AVX_AT + 16 * number + 16] = value[16:]
        raw[HEADER_AT] |= 6

    def store(self, ins: Instruction, ops: Ops) -> None:
        """MASKMOVQ and MASKMOVDQU: bytes to DS:RDI."""
        registers, mm = self._registers, ins.mnemonic == M.MASKMOVQ
        if mm:
            self._enter_mmx()
        size = 8 if mm else 16
        data, mask = (
            bytes(registers.raw[at : at + size])
            for at in (
                (MM_AT if mm else SSE_AT) + 16 * RegisterExt.number(register)
                for register in (ins.op1_register, ins.op2_register)
            )
        )
        width = {K.MEMORY_SEG_DI: 2, K.MEMORY_SEG_EDI: 4, K.MEMORY_SEG_RDI: 8}[ins.op0_kind]
        offset = registers.gpr(7)
        wanted = [i for i in range(size) if mask[i] >> 7]
        at = [self._operands.linear(ins.memory_segment, offset + i & (1 << width * 8) - 1) for i in range(size)]
        for i in wanted:  # all or nothing
            self._linear.probe_write(at[i], 1)
        for i in wanted:
            self._operands.store(at[i], 1, data[i], ops)

    def _enter_mmx(self) -> None:
        """As MMX instructions leave the x87 state: top of stack 0, all valid (Intel SDM vol. 1, 9.6.2)."""
        raw = self._registers.raw
        top = raw[L.FX + 3] >> 3 & 7
        slots = [bytes(raw[MM_AT + 16 * i : MM_AT + 16 * i + 16]) for i in range(8)]
        raw[MM_AT : MM_AT + 128] = b"".join(slots[i - top & 7] for i in range(8))
        raw[L.FX + 3] &= 0xC7
        raw[L.FX + 4] = 0xFF
        raw[HEADER_AT] |= 1

    def _base(self, ins: Instruction) -> int:
        base = ins.memory_base
        return ins.memory_displacement + (self._operands.get(base) if base in NUMBER else 0)

    def _check(self, ins: Instruction) -> None:
        """The exceptions of an AVX instruction whose unit is off, and of one whose registers are not all different."""
        numbers = [RegisterExt.number(one) for one in (ins.op0_register, ins.op2_register, ins.memory_index)]
        if self._registers.mode & L.MODE_NOAVX or len(set(numbers)) < 3:
            raise Fault(6)
        if self._registers.field(L.CR0) & 8:
            raise Fault(7)

    def gather(self, ins: Instruction, ops: Ops) -> None:
        self._check(ins)
        width, step = GATHERS[ins.mnemonic]
        size = RegisterExt.size(ins.op0_register)
        count = min(size // width, RegisterExt.size(ins.memory_index) // step)
        into, mask, indices = (
            self._get(ins.op0_register, size),
            self._get(ins.op2_register),
            self._get(ins.memory_index),
        )
        address_size = 8 if self._registers.mode & L.MODE_64 else 4
        if ins.memory_base in NUMBER:
            address_size = NUMBER[ins.memory_base][1]
        done = 0
        try:
            for i in range(count):
                part = slice(i * width, (i + 1) * width)
                if mask[part.stop - 1] >> 7:
                    index = int.from_bytes(indices[i * step : (i + 1) * step], "little", signed=True)
                    offset = self._base(ins) + index * ins.memory_index_scale & (1 << address_size * 8) - 1
                    linear = self._operands.linear(ins.memory_segment, offset)
                    into[part] = self._operands.load(linear, width, ops).to_bytes(width, "little")
                mask[part] = bytes(width)
                done += 1
        finally:
            if 0 < done < count:
                self._put(ins.op0_register, into + self._get(ins.op0_register)[size:])
                self._put(ins.op2_register, mask)
        self._put(ins.op0_register, into[: count * width])
        self._put(ins.op2_register, b"")

    def move(self, ins: Instruction, ops: Ops) -> None:
        width, linear = MOVES[ins.mnemonic], self._operands.address(ins)
        load = ins.op0_kind == K.REGISTER
        register = ins.op0_register if load else ins.op2_register
        size = RegisterExt.size(register)
        mask, data = self._get(ins.op1_register), bytearray(size) if load else self._get(register)
        parts = [i for i in range(0, size, width) if mask[i + width - 1] >> 7]
        if load:
            for i in parts:
                data[i : i + width] = self._operands.load(linear + i, width, ops).to_bytes(width, "little")
            self._put(register, data)
            return
        for i in parts:  # all or nothing
            self._linear.probe_write(linear + i, width)
        for i in parts:
            self._operands.store(linear + i, width, int.from_bytes(data[i : i + width], "little"), ops)


def vector_table(cpu: TcgVCpu, operands: Operands) -> dict[int, Callable[[Instruction, Ops], None]]:
    """Return the emulator's functions for these instructions."""
    vectors = _Vectors(cpu, operands)
    stores: dict[int, Callable[[Instruction, Ops], None]] = dict.fromkeys(STORES, vectors.store)
    if not cpu.avx:
        return stores
    return {**stores, **dict.fromkeys(GATHERS, vectors.gather), **dict.fromkeys(MOVES, vectors.move)}

"""Instructions that Python does: ports, CPUID, rare MSRs, rare forms, and writes that need more than one host store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, Instruction, MemorySizeInfo, Mnemonic, OpKind, Register

from cardcage_tcg import layout as L
from cardcage_tcg.allowed import decoder_of, is_foreign
from cardcage_tcg.emit import NUMBER
from cardcage_tcg.faults import Fault
from cardcage_tcg.vectors import vector_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.vcpu import Ops

    from cardcage_tcg.vcpu import TcgVCpu

__all__ = ["Emulator", "Fault"]

M, R, K = Mnemonic, Register, OpKind
UD, NM, NP, SS, GP, PF, AC = 6, 7, 11, 12, 13, 14, 17
HIGH: dict[int, int] = {R.AH: 0, R.CH: 1, R.DH: 2, R.BH: 3}
CF, PF_FLAG, ZF, OF = 1, 4, 0x40, 0x800


class Emulator:
    """Does single instructions for one vCPU whose registers are all in its ``struct cpu``."""

    def __init__(self, cpu: TcgVCpu) -> None:
        self.cpu = cpu
        self._pushed: int | None = None
        self._hidden = cpu.vm.model.hidden
        self._decoded: dict[tuple[bytes, int, int], Instruction] = {}
        self._table: dict[int, Callable[[Instruction, Ops], None]] = {
            **dict.fromkeys((M.IN,), self._in),
            **dict.fromkeys((M.OUT,), self._out),
            **dict.fromkeys((M.INSB, M.INSW, M.INSD), self._ins),
            **dict.fromkeys((M.OUTSB, M.OUTSW, M.OUTSD), self._outs),
            M.CPUID: self._cpuid,
            M.RDMSR: self._rdmsr,
            M.WRMSR: self._wrmsr,
            M.XGETBV: self._xgetbv,
            M.XSETBV: self._xsetbv,
            M.CALL: self._call,
            M.JMP: self._jmp,
            M.RET: self._ret,
            M.PUSH: self._push,
            M.POP: self._pop,
            M.LEAVE: self._leave,
            **dict.fromkeys((M.LOOP, M.LOOPE, M.LOOPNE, M.JCXZ, M.JECXZ, M.JRCXZ), self._counted),
            **vector_table(self),
        }

    # ---- what instructions are made of ----

    def fetch(self, pc: int) -> Instruction:
        """Decode the instruction at RIP *pc*. Raises Fault when it cannot be fetched."""
        cpu = self.cpu
        mode = cpu.mode
        linear = pc if mode & L.MODE_64 else (cpu.cs_base + pc) & 0xFFFFFFFF
        data = cpu.fetch_bytes(linear, 15)
        key = data, pc, mode & (L.MODE_64 | L.MODE_32)
        found = self._decoded.get(key)
        if found is None:
            bits = 64 if mode & L.MODE_64 else 32 if mode & L.MODE_32 else 16
            found = decoder_of(bits, data, pc).decode()
            if found.code == Code.INVALID and len(data) < 15:
                cpu.fetch_fault(cpu.linear_after(linear, len(data)))
            if is_foreign(found) or not self._hidden.isdisjoint(found.cpuid_features()):
                found = Instruction()  # invalid
            if len(self._decoded) > 4096:
                self._decoded.clear()
            self._decoded[key] = found
        return found

    def run(self, ops: Ops, *, pushed: int | None = None) -> None:
        """Do the instruction at RIP, or deliver the exception it ends with.

        Args:
            pushed: what a PUSH of memory has already read: a device must not be asked twice.
        """
        self._pushed = pushed
        cpu = self.cpu
        start = cpu.rip
        try:
            ins = self.fetch(start)
            do = self._table.get(ins.mnemonic)
            if do is None or ins.code == Code.INVALID:
                raise Fault(UD)
            cpu.rip = self.wrap(ins.next_ip)
            do(ins, ops)
        except Fault as fault:
            cpu.rip = start
            cpu.raise_exception(fault.vector, fault.error)

    def wrap(self, rip: int) -> int:
        mode = self.cpu.mode
        return rip & (0xFFFFFFFFFFFFFFFF if mode & L.MODE_64 else 0xFFFFFFFF if mode & L.MODE_32 else 0xFFFF)

    def get(self, register: int) -> int:
        high = HIGH.get(register)
        if high is not None:
            return self.cpu.gpr(high) >> 8 & 0xFF
        if R.ES <= register <= R.GS:
            return self.cpu.selector(register - R.ES)
        number, size = NUMBER[register]
        return self.cpu.gpr(number) & ((1 << size * 8) - 1)

    def set(self, register: int, value: int) -> None:
        high = HIGH.get(register)
        if high is not None:
            self.cpu.set_gpr(high, self.cpu.gpr(high) & ~0xFF00 | (value & 0xFF) << 8)
            return
        number, size = NUMBER[register]
        self.set_number(number, size, value)

    def set_number(self, number: int, size: int, value: int) -> None:
        if size == 8 or size == 4:
            self.cpu.set_gpr(number, value & ((1 << size * 8) - 1))
        else:
            mask = (1 << size * 8) - 1
            self.cpu.set_gpr(number, self.cpu.gpr(number) & ~mask | value & mask)

    def address(self, ins: Instruction) -> int:
        """Linear address of the memory operand."""
        base, index, disp = ins.memory_base, ins.memory_index, ins.memory_displacement
        if base in (R.RIP, R.EIP):
            offset = disp
        else:
            offset = disp
            size = 8 if self.cpu.mode & L.MODE_64 else ins.memory_displ_size or 4
            for register, scale in ((base, 1), (index, ins.memory_index_scale)):
                if register in NUMBER:
                    size = NUMBER[register][1]
                    offset += self.get(register) * scale
            offset &= (1 << size * 8) - 1
        return self.linear(ins.memory_segment, offset)

    def linear(self, segment: int, offset: int) -> int:
        if self.cpu.mode & L.MODE_64:
            if segment in (R.FS, R.GS):
                offset += self.cpu.segment_base(segment - R.ES)
            return offset & 0xFFFFFFFFFFFFFFFF
        return offset + self.cpu.segment_base(segment - R.ES) & 0xFFFFFFFF

    def load(self, linear: int, size: int, ops: Ops) -> int:
        self._aligned(linear, size)
        return int.from_bytes(self.cpu.read_linear(linear, size, ops), "little")

    def store(self, linear: int, size: int, value: int, ops: Ops) -> None:
        self._aligned(linear, size)
        self.cpu.write_linear(linear, (value & ((1 << size * 8) - 1)).to_bytes(size, "little"), ops)

    def _aligned(self, linear: int, size: int) -> None:
        if self.cpu.mode & L.MODE_AC and linear & size - 1:
            raise Fault(AC, 0)

    def stack(self) -> tuple[int, int]:
        """Stack pointer and the mask of its width."""
        mode = self.cpu.mode
        mask = 0xFFFFFFFFFFFFFFFF if mode & L.MODE_64 else 0xFFFFFFFF if mode & L.MODE_SS32 else 0xFFFF
        return self.cpu.gpr(4) & mask, mask

    def set_stack(self, value: int, mask: int) -> None:
        self.cpu.set_gpr(4, value & mask if mask != 0xFFFF else self.cpu.gpr(4) & ~mask | value & mask)

    def push(self, size: int, value: int, ops: Ops) -> None:
        pointer, mask = self.stack()
        pointer = pointer - size & mask
        self.store(self.linear(R.SS, pointer), size, value, ops)
        self.set_stack(pointer, mask)

    # ---- control flow: forms and places that blocks leave to us ----

    def _target(self, ins: Instruction, ops: Ops) -> tuple[int, int]:
        """(target, operand size) of a near branch. Far ones raise Fault(UD): they have helpers."""
        kind = ins.op0_kind
        if kind in (K.NEAR_BRANCH16, K.NEAR_BRANCH32, K.NEAR_BRANCH64):
            size = {K.NEAR_BRANCH16: 2, K.NEAR_BRANCH32: 4, K.NEAR_BRANCH64: 8}[kind]
            return ins.near_branch_target, size
        if kind == K.REGISTER:
            return self.get(ins.op0_register), NUMBER[ins.op0_register][1]
        if kind == K.MEMORY:
            size = MemorySizeInfo(ins.memory_size).size
            return self.load(self.address(ins), size, ops), size
        raise Fault(UD)

    def _call(self, ins: Instruction, ops: Ops) -> None:
        target, size = self._target(ins, ops)
        self.push(size, ins.next_ip, ops)
        self.cpu.rip = self.wrap(target)

    def _jmp(self, ins: Instruction, ops: Ops) -> None:
        target, size = self._target(ins, ops)
        self.cpu.rip = self.wrap(target & ((1 << size * 8) - 1))

    def _ret(self, ins: Instruction, ops: Ops) -> None:
        extra = ins.immediate16 if ins.op_count else 0
        size = ins.stack_pointer_increment - extra
        pointer, mask = self.stack()
        target = self.load(self.linear(R.SS, pointer), size, ops)
        self.set_stack(pointer + size + extra, mask)
        self.cpu.rip = self.wrap(target)

    def _counted(self, ins: Instruction, ops: Ops) -> None:
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
        count = self.cpu.gpr(1) & ((1 << size * 8) - 1)
        zero = bool(self.cpu.arithmetic_flags() & ZF)
        if ins.mnemonic in (M.LOOP, M.LOOPE, M.LOOPNE):
            count = count - 1 & ((1 << size * 8) - 1)
            self.set_number(1, size, count)
            taken = count != 0 and (ins.mnemonic == M.LOOP or zero == (ins.mnemonic == M.LOOPE))
        else:
            taken = count == 0
        if taken:
            self.cpu.rip = self.wrap(ins.near_branch_target)

    def _push(self, ins: Instruction, ops: Ops) -> None:
        size = abs(ins.stack_pointer_increment)
        if ins.op0_kind == K.REGISTER:
            value = self.get(ins.op0_register)
        elif ins.op0_kind == K.MEMORY:
            value = self.load(self.address(ins), size, ops) if self._pushed is None else self._pushed
        else:
            value = ins.immediate(0)
        self.push(size, value, ops)

    def _pop(self, ins: Instruction, ops: Ops) -> None:
        size = ins.stack_pointer_increment
        pointer, mask = self.stack()
        value = self.load(self.linear(R.SS, pointer), size, ops)
        if ins.op0_kind == K.REGISTER:
            if ins.op0_register not in NUMBER:
                raise Fault(UD)
            self.set_stack(pointer + size, mask)
            self.set_number(NUMBER[ins.op0_register][0], size, value)
            return
        before = self.cpu.gpr(4)
        self.set_stack(pointer + size, mask)  # the address is computed with the incremented pointer
        try:
            self.store(self.address(ins), size, value, ops)
        except Fault:
            self.cpu.set_gpr(4, before)
            raise

    def _leave(self, ins: Instruction, ops: Ops) -> None:
        size = {Code.LEAVEW: 2, Code.LEAVED: 4, Code.LEAVEQ: 8}[ins.code]
        _, mask = self.stack()
        pointer = self.cpu.gpr(5) & mask
        value = self.load(self.linear(R.SS, pointer), size, ops)
        self.set_stack(pointer + size, mask)
        self.set_number(5, size, value)

    # ---- INS and OUTS, one element ----

    def _string(self, ins: Instruction) -> tuple[int, int, int]:
        """(element size, address mask, step)."""
        size = {"B": 1, "W": 2, "D": 4}[_SUFFIX[ins.mnemonic]]
        width = next((_WIDTH[ins.op_kind(i)] for i in range(ins.op_count) if ins.op_kind(i) in _WIDTH), 8)
        step = -size if self.cpu.eflags & 0x400 else size
        return size, (1 << width * 8) - 1, step

    def _advance(self, number: int, mask: int, step: int) -> None:
        value = self.cpu.gpr(number) + step & mask
        self.cpu.set_gpr(number, value if mask > 0xFFFF else self.cpu.gpr(number) & ~mask | value)

    def _repeat(self, ins: Instruction, mask: int) -> bool:
        """False when a repeat count is zero: nothing to do."""
        if not (ins.has_rep_prefix or ins.has_repne_prefix):
            return True
        return bool(self.cpu.gpr(1) & mask)

    def _again(self, ins: Instruction, mask: int) -> None:
        if ins.has_rep_prefix or ins.has_repne_prefix:
            self._advance(1, mask, -1)
            if self.cpu.gpr(1) & mask:
                self.cpu.rip = ins.ip
                self.cpu.goes_on()

    # ---- ports ----

    def _allowed(self, port: int, size: int) -> None:
        """The I/O permission bitmap, where IOPL does not already allow it. Raises Fault(GP)."""
        if not self.cpu.mode & L.MODE_IOPL and not self.cpu.port_allowed(port, size):
            raise Fault(GP, 0)

    def _port(self, ins: Instruction, at: int) -> int:
        return ins.immediate8 if ins.op_kind(at) == K.IMMEDIATE8 else self.cpu.gpr(2) & 0xFFFF

    def _in(self, ins: Instruction, ops: Ops) -> None:
        size, port = NUMBER[ins.op0_register][1], self._port(ins, 1)
        self._allowed(port, size)
        self.set_number(0, size, ops.pio_read(port, size))
        self.cpu.met_port(port, size)

    def _out(self, ins: Instruction, ops: Ops) -> None:
        size, port = NUMBER[ins.op1_register][1], self._port(ins, 0)
        self._allowed(port, size)
        self.cpu.port_write(ops, port, size, self.cpu.gpr(0) & ((1 << size * 8) - 1))
        self.cpu.met_port(port, size)

    def _ins(self, ins: Instruction, ops: Ops) -> None:
        size, mask, step = self._string(ins)
        if self._repeat(ins, mask):
            port = self.cpu.gpr(2) & 0xFFFF
            self._allowed(port, size)
            linear = self.linear(R.ES, self.cpu.gpr(7) & mask)
            self.cpu.probe_write(linear, size)  # a fault must come before the port is read
            self.store(linear, size, ops.pio_read(port, size), ops)
            self.cpu.met_port(port, size)
            self._advance(7, mask, step)
            self._again(ins, mask)

    def _outs(self, ins: Instruction, ops: Ops) -> None:
        size, mask, step = self._string(ins)
        if self._repeat(ins, mask):
            port = self.cpu.gpr(2) & 0xFFFF
            self._allowed(port, size)
            value = self.load(self.linear(ins.memory_segment, self.cpu.gpr(6) & mask), size, ops)
            self.cpu.port_write(ops, port, size, value)
            self.cpu.met_port(port, size)
            self._advance(6, mask, step)
            self._again(ins, mask)

    # ---- system ----

    def _cpuid(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        cpu = self.cpu
        values = cpu.cpuid(cpu.gpr(0) & 0xFFFFFFFF, cpu.gpr(1) & 0xFFFFFFFF)
        for number, value in zip((0, 3, 1, 2), values, strict=True):
            cpu.set_gpr(number, value)

    def _supervisor(self) -> None:
        if self.cpu.mode & L.MODE_CPL3:
            raise Fault(GP, 0)

    def _rdmsr(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        self._supervisor()
        value = self.cpu.read_msr(self.cpu.gpr(1) & 0xFFFFFFFF)
        if value is None:
            raise Fault(GP, 0)
        self.cpu.set_gpr(0, value & 0xFFFFFFFF)
        self.cpu.set_gpr(2, value >> 32)

    def _wrmsr(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        self._supervisor()
        value = self.cpu.gpr(0) & 0xFFFFFFFF | (self.cpu.gpr(2) & 0xFFFFFFFF) << 32
        if not self.cpu.write_msr(self.cpu.gpr(1) & 0xFFFFFFFF, value):
            raise Fault(GP, 0)

    def _xgetbv(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        if not self.cpu.osxsave():
            raise Fault(UD)
        if self.cpu.gpr(1) & 0xFFFFFFFF:
            raise Fault(GP, 0)
        self.cpu.set_gpr(0, self.cpu.xcr0)
        self.cpu.set_gpr(2, 0)

    def _xsetbv(self, ins: Instruction, ops: Ops) -> None:
        del ins, ops
        if not self.cpu.osxsave():
            raise Fault(UD)
        self._supervisor()
        value = self.cpu.gpr(0) & 0xFFFFFFFF | (self.cpu.gpr(2) & 0xFFFFFFFF) << 32
        if self.cpu.gpr(1) & 0xFFFFFFFF or not self.cpu.vm.model.takes_xcr0(value):
            raise Fault(GP, 0)
        self.cpu.xcr0 = value


_SUFFIX = {getattr(M, f"{op}{s}"): s for op in ("INS", "OUTS") for s in "BWD"}
_WIDTH = {
    **dict.fromkeys((K.MEMORY_SEG_SI, K.MEMORY_ESDI, K.MEMORY_SEG_DI), 2),
    **dict.fromkeys((K.MEMORY_SEG_ESI, K.MEMORY_ESEDI, K.MEMORY_SEG_EDI), 4),
    **dict.fromkeys((K.MEMORY_SEG_RSI, K.MEMORY_ESRDI, K.MEMORY_SEG_RDI), 8),
}

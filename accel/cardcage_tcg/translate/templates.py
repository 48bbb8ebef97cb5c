"""One guest instruction to host code: a template that blocks are assembled from, remembered by the instruction's bytes.

User-level instructions are encoded again nearly verbatim with renamed registers; memory operands go through the soft
TLB. What may be emitted is an allow-list: everything else is a helper's (native), or Python's (``emulate``).
"""

from __future__ import annotations

from struct import pack

from iced_x86 import (
    Instruction,
    InstructionInfo,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

from cardcage_tcg import layout as L
from cardcage_tcg.translate.allowed import (
    AH_TO_BH,
    ALL_FLAGS,
    AVX,
    BASIC,
    BORROWED,
    FAULTING,
    FLUSHES,
    HIDDEN,
    INTEGER,
    MASKED_MOVES,
    MASKED_STORES,
    NOTHING,
    OFF_AVX,
    OFF_SSE,
    OFF_WAIT,
    OFF_XSAVE,
    READS,
    RECODE,
    RETAINING,
    SHIFTS,
    SIMD,
    UNALIGNED,
    WRITES,
    XSAVES,
    is_unaligned_vex,
    unit_of,
    waits,
)
from cardcage_tcg.translate.emit import (
    HOST,
    NUMBER,
    SPILLED,
    call_state,
    flags_load,
    load,
    mov,
    mov32,
    named,
    payload_nop,
    store,
)
from cardcage_tcg.translate.inplace import InPlace
from cardcage_tcg.translate.operands import Emulate, Template

__all__ = ["Templates"]

M, R, K = Mnemonic, Register, OpKind


class Templates(InPlace):
    """Makes templates for one mode (``MODE_*`` bits); *bounce* for singles, whose writes go to ``cpu.write_ptr``."""

    def get(self, ins: Instruction, raw: bytes, restore: bool) -> Template:
        """The template of *ins*; *restore* puts the flags back before its operation. Raises :exc:`Emulate`."""
        return self._make(ins, raw, restore)

    # ---- instructions ----

    def _make(self, ins: Instruction, raw: bytes, restore: bool) -> Template:
        mnemonic = ins.mnemonic
        t = Template()
        t.reads, t.kills = ins.rflags_read & ALL_FLAGS, ins.rflags_modified & ALL_FLAGS
        if mnemonic in NOTHING and not set(ins.cpuid_features()) & self.hidden:
            t.reads = t.kills = 0
            return t
        if mnemonic in FLUSHES and not set(ins.cpuid_features()) & self.hidden:
            return self._flush(ins, t, restore)
        if mnemonic == M.WAIT:
            if self.mode & L.MODE_NOFPU:
                self._off(t, OFF_WAIT, ins)
            t.code += b"\x9b"
            return t
        special = self._special(ins, t)
        if special is not None:
            return special
        if mnemonic == M.PUSH:
            return self._push(ins, t, restore)
        if mnemonic == M.POP:
            return self._pop(ins, t, restore)
        if mnemonic == M.LEAVE:
            return self._leave(ins, t, restore)
        kind = self._check_allowed(ins, t)
        if kind is not None and self._is_off(kind, ins):
            self._off(t, kind, ins)
            if kind != OFF_XSAVE:
                return t
        if mnemonic in MASKED_STORES:
            return self._masked_store(ins, t, restore)
        if mnemonic in SHIFTS and ins.op_count and ins.op_kind(ins.op_count - 1) == K.REGISTER:
            t.kills, t.reads = 0, ALL_FLAGS  # a count of zero keeps them
        registers: list[tuple[int, int]] = []
        memory = -1
        for i in range(ins.op_count):
            kind = ins.op_kind(i)
            if kind == K.REGISTER:
                register = ins.op_register(i)
                if R.ES <= register <= R.GS or R.CR0 <= register <= R.DR15:
                    raise Emulate("system register")
                registers.append((i, register))
            elif kind == K.MEMORY:
                memory = i
        if memory >= 0 and mnemonic in FAULTING:
            t.reads = ALL_FLAGS
        if mnemonic == M.LEA:
            return self._lea(ins, t, registers)
        if memory < 0:
            return self._registers(ins, raw, t, registers)
        return self._memory(ins, t, registers, memory, restore)

    def _flush(self, ins: Instruction, t: Template, restore: bool) -> Template:
        """A cache line's flush: memory is coherent, and what is left are the faults of a load of one byte (SDM vol. 2,
        CLFLUSH; APM vol. 3, CLWB)."""
        t.reads = t.kills = 0
        out = bytearray()
        self.address(ins, out, t, 1, False)
        self.access(out, t, 1, False, restore, stack=ins.memory_segment == R.SS, more=L.ACCESS_PROBE)
        t.code = bytes(out)
        return t

    def _check_allowed(self, ins: Instruction, t: Template) -> int | None:
        """Raise Emulate for what may not be emitted; the unit it needs (``OFF_*``), None for the integer unit."""
        mnemonic = ins.mnemonic
        features = set(ins.cpuid_features())
        if features & self.hidden and mnemonic not in (
            M.TZCNT,
            M.LZCNT,
        ):  # those are BSF and BSR where they are missing
            raise Emulate("not in this processor")
        if mnemonic in INTEGER:
            return None
        if ins.is_privileged or ins.is_vsib:
            raise Emulate("not on the allow-list")
        if mnemonic in XSAVES:
            if not self.avx:
                raise Emulate("no XSAVE")
            return OFF_XSAVE
        avx = features & AVX
        if not (features & SIMD - BASIC or avx) or features - SIMD - AVX:
            raise Emulate("not on the allow-list")
        if avx and not self.avx:
            raise Emulate("no AVX")
        return unit_of(ins)

    def _is_off(self, kind: int, ins: Instruction) -> bool:
        """True if the mode may keep the unit from working; a helper then knows which exception it is."""
        if kind in (OFF_AVX, OFF_XSAVE):
            return bool(self.mode & (L.MODE_NOAVX | L.MODE_NOFPU))
        del ins
        return bool(self.mode & L.MODE_NOFPU) or (kind == OFF_SSE and bool(self.mode & L.MODE_NOSSE))

    def _off(self, t: Template, kind: int, ins: Instruction) -> None:
        out = bytearray(b"\xbf" + pack("<I", L.HLP_FPU_OFF | ins.len << 8 | kind << 12))
        out += call_state(L.STUBS + 8 * L.STUB_HELPER)
        t.payload = len(out) + 4
        out += payload_nop
        t.reads, t.kills = ALL_FLAGS, 0
        t.clobbers = t.flags_stored = True
        t.code = bytes(out)

    def _registers(self, ins: Instruction, raw: bytes, t: Template, registers: list[tuple[int, int]]) -> Template:
        touched = False
        for _, register in registers:
            known = NUMBER.get(register)
            if known is not None and (known[0] in HOST or known[0] in SPILLED):
                touched = True
        if not touched:
            code = RECODE.get(ins.code)
            if self.long and code is None:
                t.code = raw
                return t
            copy = ins.copy()
            if code is not None:
                copy.code = code
            t.code = self.encode(copy)
            return t
        return self._renamed(ins, t, registers)

    def _renamed(self, ins: Instruction, t: Template, registers: list[tuple[int, int]]) -> Template:
        copy = ins.copy()
        code = RECODE.get(ins.code)
        if code is not None:
            copy.code = code
        before, after = bytearray(), bytearray()
        if any(register in AH_TO_BH for _, register in registers):
            return self._high_byte(ins, copy, t, registers)
        self._homes(ins, copy, registers, [6, 7], before, after)
        t.code = bytes(before) + self.encode(copy) + bytes(after)
        return t

    def _homes(
        self,
        ins: Instruction,
        copy: Instruction,
        registers: list[tuple[int, int]],
        free: list[int],
        before: bytearray,
        after: bytearray,
    ) -> None:
        """Put host registers in place of guest ones; *before* and *after* get the code that moves those in memory."""
        info = self._info.info(ins)
        homes: dict[int, int] = {}
        borrowed = 0
        for i, register in registers:
            known = NUMBER.get(register)
            if known is None:
                continue
            number, size = known
            if number in HOST:
                copy.set_op_register(i, named[HOST[number], size])
            elif number in SPILLED:
                if number not in homes:
                    if free:
                        homes[number] = free.pop(0)
                    else:
                        home = homes[number] = self._borrow(info, homes)
                        slot = L.SCRATCH + 8 * borrowed
                        borrowed += 1
                        before += store(home, slot)
                        after[:0] = b""
                        after += load(home, slot)
                    if (
                        size < 4
                        or ins.mnemonic in RETAINING
                        or any(
                            info.op_access(j) in READS
                            for j, other in registers
                            if NUMBER.get(other, (-1,))[0] == number
                        )
                    ):
                        before += load(homes[number], L.GPR + 8 * number)
                copy.set_op_register(i, named[homes[number], size])
                if info.op_access(i) in WRITES:
                    after[:0] = store(homes[number], L.GPR + 8 * number)

    @staticmethod
    def _borrow(info: InstructionInfo, homes: dict[int, int]) -> int:
        used = {
            NUMBER[RegisterExt.full_register(one.register)][0]
            for one in info.used_registers()
            if RegisterExt.full_register(one.register) in NUMBER
        }
        return next(one for one in BORROWED if one not in used and one not in homes.values())

    def _high_byte(
        self, ins: Instruction, copy: Instruction, t: Template, registers: list[tuple[int, int]]
    ) -> Template:
        """AH..BH cannot be encoded beside a renamed register, here ESP, ESI or EDI: go through RSI."""
        (i, first), *rest = registers
        if not rest or first in AH_TO_BH or first not in NUMBER or NUMBER[first][0] not in HOST:
            raise Emulate("high byte")
        number, size = NUMBER[first]
        host = HOST[number]
        copy.set_op_register(i, named[6, size])
        t.code = mov(6, host) + self.encode(copy) + (mov(host, 6) if size >= 4 else b"\x66" + mov32(host, 6))
        return t

    def _lea(self, ins: Instruction, t: Template, registers: list[tuple[int, int]]) -> Template:
        number, size = NUMBER[registers[0][1]]
        out = bytearray()
        plain = ins.copy()
        plain.segment_prefix = R.NONE
        if self.long:
            base, index = ins.memory_base, ins.memory_index
            simple = base not in (R.RIP, R.EIP) and not any(
                NUMBER[one][0] in HOST or NUMBER[one][0] in SPILLED
                for one in (base, index, registers[0][1])
                if one in NUMBER
            )
            if simple and size > 2 and (base != R.NONE or index != R.NONE):
                t.code = self.encode(plain)
                return t
        self._offset(plain, out, t)
        if number in SPILLED:
            if size == 8:
                out += store(6, L.GPR + 8 * number)
            elif size == 4:
                out += mov32(6, 6) + store(6, L.GPR + 8 * number)
            else:
                out += b"\x66\x89\xb4\x24" + pack("<i", L.GPR + 8 * number)
        else:
            host = HOST.get(number, number)
            out += mov(host, 6) if size == 8 else mov32(host, 6) if size == 4 else b"\x66" + mov32(host, 6)
        t.code = bytes(out)
        return t

    def _memory(
        self, ins: Instruction, t: Template, registers: list[tuple[int, int]], memory: int, restore: bool
    ) -> Template:
        mnemonic = ins.mnemonic
        size = self.size_of(ins)
        if mnemonic in (M.FXSAVE, M.FXSAVE64, M.FXRSTOR, M.FXRSTOR64):
            size = 512
        elif mnemonic in XSAVES:
            size = 576 if self.mode & L.MODE_NOAVX else 832
        if not 0 < size <= 832:
            raise Emulate("size")
        write = self._info.info(ins).op_access(memory) in WRITES
        stack = ins.memory_segment == R.SS
        out = bytearray(t.code)
        if waits(ins):
            out += b"\x9b"  # FWAIT: a pending exception comes before this instruction's access
        start = len(out)
        width = self._offset(ins, out, t)
        far_bit = mnemonic in (M.BT, M.BTS, M.BTR, M.BTC) and ins.op1_kind == K.REGISTER
        if far_bit:
            self._bit_offset(ins, size, width, out)
            t.clobbers = True
        self._segment(ins, out, t, size, write)
        if mnemonic in XSAVES:
            out += b"\xf7\xc6" + pack("<I", 63)
            self._unless(out, t, b"\x0f\x85", size, int(stack))
        elif mnemonic in MASKED_MOVES:  # elements that are masked out must not fault: beyond one page it is Python's
            out += b"\x89\xf7\x81\xe7\xff\x0f\0\0\x81\xff" + pack("<I", 4096 - size)
            self._unless(out, t, b"\x0f\x87", size, L.ACCESS_EMULATE)
        source, immediate = -1, 0
        if mnemonic in (M.MOV, M.MOVNTI) and write and not self.bounce:
            source, immediate = self._store_source(ins)
        unaligned = mnemonic in UNALIGNED or (size > 8 and is_unaligned_vex(ins))
        at = self.access(
            out,
            t,
            size,
            write,
            False,
            store_source=source,
            immediate=immediate,
            stack=stack,
            alignment=size if unaligned else 0,
            more=L.ACCESS_MASKED
            if mnemonic in MASKED_MOVES
            else L.ACCESS_ALIGNED
            if size in (16, 32, 512) and not unaligned and mnemonic not in XSAVES
            else L.ACCESS_PYTHON
            if write and waits(ins)  # an unmasked exception keeps a result from being stored
            else 0,
        )
        if far_bit:
            out += b"\x48\x2b\xb4\x24" + pack("<i", L.SCRATCH + 24)  # sub rsi, [scratch]: the operation adds it again
        if restore:
            out += flags_load
        copy = ins.copy()
        code = RECODE.get(ins.code)
        if code is not None:
            copy.code = code
        copy.memory_base, copy.memory_index, copy.memory_index_scale = R.RSI, R.NONE, 1
        copy.memory_displacement, copy.memory_displ_size, copy.segment_prefix = 0, 0, R.NONE
        copy.set_op_kind(memory, K.MEMORY)  # also that of moffs
        before, after = bytearray(), bytearray()
        if mnemonic in XSAVES:  # only states that the guest has
            t.borrowed = True
            before += store(0, L.SCRATCH + 16) + store(2, L.SCRATCH + 24)
            before += b"\x23\x84\x24" + pack("<i", L.GUEST_XCR0) + b"\x31\xd2"
            after += load(0, L.SCRATCH + 16) + load(2, L.SCRATCH + 24)
        self._homes(ins, copy, registers, [7], before, after)
        out += before
        modrm = -1 if far_bit or mnemonic in XSAVES or mnemonic in MASKED_MOVES else self.modrm_of(copy)
        if modrm >= 0 and t.accesses:
            self.near_operand(ins, t, at, start, len(out) + modrm)
        out += self.encode(copy) + after + HIDDEN.get(ins.code, b"")
        if source >= 0 and t.accesses:
            t.accesses[at].resume = len(out)
        t.code = bytes(out)
        return t

    def _masked_store(self, ins: Instruction, t: Template, restore: bool) -> Template:
        """MASKMOVDQU and the like: the operand is at DS:RDI, also for the host."""
        size = 8 if ins.mnemonic == M.MASKMOVQ else 16
        width = {K.MEMORY_SEG_DI: 2, K.MEMORY_SEG_EDI: 4, K.MEMORY_SEG_RDI: 8}[ins.op0_kind]
        out = bytearray({2: b"\x41\x0f\xb7\xf3", 4: mov32(6, 11), 8: mov(6, 11)}[width])  # movzx esi, r11w
        self._segment(ins, out, t, size, True)
        stack = ins.memory_segment == R.SS
        self.access(out, t, size, True, restore, stack=stack, alignment=size, more=L.ACCESS_PYTHON)
        copy = ins.copy()
        copy.segment_prefix = R.NONE
        copy.set_op_kind(0, K.MEMORY_SEG_RDI)
        t.code = bytes(out + mov(7, 6) + self.encode(copy))
        return t

    def _store_source(self, ins: Instruction) -> tuple[int, int]:
        if ins.op1_kind == K.REGISTER:
            register = ins.op1_register
            if register in AH_TO_BH:
                return 16 + register - R.AH, 0
            return NUMBER[register][0], 0
        value = ins.immediate(1)
        value -= 1 << 64 if value >> 63 else 0
        return 32, (value + (1 << 31)) % (1 << 32) - (1 << 31)

    def _bit_offset(self, ins: Instruction, size: int, address: int, out: bytearray) -> None:
        """RSI, *address* bytes wide, += the operand-sized distance of the bit number; it is kept in scratch."""
        register = ins.op1_register
        number, width = NUMBER[register]
        if number in SPILLED:
            out += load(7, L.GPR + 8 * number)
            host = 7
        else:
            host = HOST.get(number, number)
        if width == 8:
            out += mov(7, host)
        elif width == 4:
            out += bytes((0x48 | host >> 3, 0x63, 0xF8 | (host & 7)))  # movsxd rdi, r32
        else:
            out += bytes((0x48 | host >> 3, 0x0F, 0xBF, 0xF8 | (host & 7)))  # movsx rdi, r16
        out += b"\x48\xc1\xff\x03\x48\x83\xe7" + pack("<b", -size)  # sar rdi, 3; and rdi, -size
        out += store(7, L.SCRATCH + 24)
        out += {8: b"\x48\x8d\x34\x3e", 4: b"\x8d\x34\x3e", 2: b"\x8d\x34\x3e\x0f\xb7\xf6"}[address]

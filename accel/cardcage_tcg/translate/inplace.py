"""Code for system instructions that go on in the block: helpers' calls, and the few done in place."""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from iced_x86 import (
    CpuidFeature,
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
    alu_flags,
    call_state,
    load,
    load16,
    load32,
    mov32,
    payload_nop,
    store,
)
from cardcage_tcg.translate.system import helper_of, xsave_of

if TYPE_CHECKING:
    pass
from cardcage_tcg.translate.allowed import (
    ADDRESSED,
    ALL_FLAGS,
    XSAVES,
)
from cardcage_tcg.translate.operands import Template
from cardcage_tcg.translate.stack import Stack

__all__ = ["InPlace"]

M, R, K = Mnemonic, Register, OpKind


class InPlace(Stack):
    """System instructions."""

    # ---- system instructions that go on in the block ----

    def _special(self, ins: Instruction, t: Template) -> Template | None:
        mnemonic = ins.mnemonic
        if mnemonic == M.CLI and (self.mode & L.MODE_IOPL):
            t.clobbers = True
            t.code = alu_flags(~0x200 & 0xFFFFFFFF, 0)
            return t
        if mnemonic == M.STI and (self.mode & L.MODE_IOPL) and not self.mode & L.MODE_VM86:
            t.clobbers = t.shadow = True
            # or eflags, IF; cmp [irq_pending], 0; je over; mov [poll], 1: others set it, too, so it is never cleared
            t.code = alu_flags(None, 0x200) + b"\x83\xbc\x24" + pack("<iB", L.IRQ_PENDING, 0)
            t.code += b"\x74\x0b\xc7\x84\x24" + pack("<iI", L.POLL, 1)
            return t
        if mnemonic == M.MOV and ins.op_count == 2:
            if ins.op1_kind == K.REGISTER and R.ES <= ins.op1_register <= R.GS and ins.op0_kind == K.REGISTER:
                return self._store_segment(ins, t)
            if (
                ins.op0_kind == K.REGISTER
                and R.ES <= ins.op0_register <= R.GS
                and not self.mode & (L.MODE_PE | L.MODE_FLAT)
            ):
                in_line = self._load_segment_real(ins, t)
                if in_line is not None:  # from memory, and CS, it is the helper's
                    return in_line
        if not self.user and mnemonic == M.SWAPGS and self.long:
            t.code = (
                load(6, L.GSBASE) + load(7, L.KERNEL_GS_BASE) + store(6, L.KERNEL_GS_BASE) + store(7, L.GSBASE)
                + store(7, L.SEG + 5 * L.SIZEOF_SEG + L.SEG_BASE)
            )  # fmt: skip
            return t
        if not self.user and mnemonic in (M.RDTSC, M.RDTSCP) and self.long:  # CR4.TSD does not reach supervisors
            # rdtsc; shl rdx, 32; or rax, rdx; add rax, [tsc_offset]; mov rdx, rax; shr rdx, 32; mov eax, eax
            t.clobbers = True
            t.code = (
                (b"\x0f\x01\xf9" if mnemonic == M.RDTSCP else b"\x0f\x31")
                + b"\x48\xc1\xe2\x20\x48\x09\xd0\x48\x03\x84\x24" + pack("<i", L.TSC_OFFSET)
                + b"\x48\x89\xc2\x48\xc1\xea\x20\x89\xc0"
                + (load32(1, L.TSC_AUX) if mnemonic == M.RDTSCP else b"")
            )  # fmt: skip
            return t
        if not self.user and mnemonic in (M.STAC, M.CLAC) and CpuidFeature.SMAP not in self.hidden:
            return self._access_flag(mnemonic, ins.len, t)
        found = xsave_of(ins) if self.pku and mnemonic in XSAVES else helper_of(ins, self.mode)
        if found is None:
            return None
        out = bytearray()
        if found.source:
            self._helper_source(ins, found.source, out, t)
            if found.number < 0:  # MOV [mem], sreg: no helper at all
                t.code = bytes(out)
                return t
        if found.segment:
            segment = ins.memory_segment - R.ES
            out += (
                load(7, L.SEG + L.SIZEOF_SEG * segment + L.SEG_BASE) if segment >= 4 or not self.long else b"\x31\xff"
            )
            out += store(7, L.INFO + 8)
        for slot, value in found.info:
            out += b"\xbf" + pack("<I", value & 0xFFFFFFFF) + store(7, L.INFO + 8 * slot)
        out += b"\xbf" + pack("<I", found.number | ins.len << 8 | found.immediate << 12)
        out += call_state(L.STUBS + 8 * L.STUB_HELPER)
        t.payload = len(out) + 4
        out += payload_nop
        t.reads, t.kills = ALL_FLAGS, 0
        t.clobbers = t.flags_stored = True
        t.shadow = found.shadow
        t.code = bytes(out)
        return t

    @staticmethod
    def _access_flag(mnemonic: int, length: int, t: Template) -> Template:
        """STAC and CLAC of ring 0; the helper is asked only when there are entries to be dropped."""
        t.reads, t.kills = ALL_FLAGS, 0
        t.clobbers = t.flags_stored = True
        if mnemonic == M.STAC:
            t.code = alu_flags(None, 1 << 18)
            return t
        call = b"\xbf" + pack("<I", L.HLP_CLAC | length << 8) + call_state(L.STUBS + 8 * L.STUB_HELPER)
        out = alu_flags(~(1 << 18) & 0xFFFFFFFF, 0) + b"\x83\xbc\x24" + pack("<iB", L.SMAP_OPEN, 0)
        out += bytes((0x74, len(call) + len(payload_nop)))  # cmp [smap_open], 0; je over
        t.payload = len(out) + len(call) + 4
        t.code = out + call + payload_nop
        return t

    def _helper_source(self, ins: Instruction, source: str, out: bytearray, t: Template) -> None:
        """Code that puts a helper's operand into ``info``."""
        register = next(
            (ins.op_register(i) for i in reversed(range(ins.op_count)) if ins.op_kind(i) == K.REGISTER), R.NONE
        )
        in_memory = any(ins.op_kind(i) == K.MEMORY for i in range(ins.op_count))
        stack = ins.memory_segment == R.SS
        if source == "store selector":
            self.address(ins, out, t, 2, True)
            self.access(out, t, 2, True, False, stack=stack)
            out += load16(7, L.SEG + L.SIZEOF_SEG * (ins.op1_register - R.ES) + L.SEG_SEL) + b"\x66\x89\x3e"
        elif source == "address":
            self.address(ins, out, t, *ADDRESSED.get(ins.mnemonic, (0, False)))
            out += store(6, L.INFO)
        elif source == "far":
            size = self.size_of(ins) - 2
            self.address(ins, out, t, size + 2, False)
            self.access(out, t, size + 2, False, False, stack=stack)
            out += b"\x0f\xb7\x7e" + pack("<b", size) + store(7, L.INFO)
            out += {2: b"\x0f\xb7\x3e", 4: b"\x8b\x3e", 8: b"\x48\x8b\x3e"}[size] + store(7, L.INFO + 8)
        elif in_memory:
            self.address(ins, out, t, 2, False)
            self.access(out, t, 2, False, False, stack=stack)
            out += b"\x0f\xb7\x3e" + store(7, L.INFO)
        else:
            number = NUMBER[register][0]
            if number in SPILLED:
                out += load16(7, L.GPR + 8 * number)
            else:
                host = HOST.get(number, number)
                rex = 0x40 | host >> 3
                out += (bytes((rex,)) if rex != 0x40 else b"") + bytes((0x0F, 0xB7, 0xF8 | (host & 7)))
            out += store(7, L.INFO)

    def _store_segment(self, ins: Instruction, t: Template) -> Template:
        out = bytearray(load16(7, L.SEG + L.SIZEOF_SEG * (ins.op1_register - R.ES) + L.SEG_SEL))
        number, size = NUMBER[ins.op0_register]
        if number in SPILLED:
            out += store(7, L.GPR + 8 * number) if size >= 4 else b"\x66\x89\xbc\x24" + pack("<i", L.GPR + 8 * number)
        else:
            host = HOST.get(number, number)
            out += mov32(host, 7) if size >= 4 else b"\x66" + mov32(host, 7)
        t.code = bytes(out)
        return t

    def _load_segment_real(self, ins: Instruction, t: Template) -> Template | None:
        """Real and virtual-8086 mode: the base is the selector times 16, nothing can fault."""
        segment = ins.op0_register - R.ES
        if segment == 1 or ins.op1_kind != K.REGISTER or ins.op1_register not in NUMBER:
            return None
        host = NUMBER[ins.op1_register][0]
        host = HOST.get(host, host)
        out = bytearray()
        rex = 0x40 | host >> 3
        out += (bytes((rex,)) if rex != 0x40 else b"") + bytes((0x0F, 0xB7, 0xF8 | (host & 7)))  # movzx edi, r16
        at = L.SEG + L.SIZEOF_SEG * segment
        out += b"\x66\x89\xbc\x24" + pack("<i", at + L.SEG_SEL)
        out += b"\xc1\xe7\x04" + store(7, at + L.SEG_BASE) + store(7, L.SEGBASE + 8 * segment)
        if segment >= 4:
            out += store(7, L.FSBASE if segment == 4 else L.GSBASE)
        t.clobbers = True
        t.shadow = segment == 2
        t.code = bytes(out)
        return t

"""One guest instruction to host code: a template that blocks are assembled from, remembered by the instruction's bytes.

User-level instructions are encoded again nearly verbatim with renamed registers; memory operands go through the soft
TLB. What may be emitted is an allow-list: everything else is a helper's (native), or Python's (``emulate``).
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    CpuidFeature,
    Encoder,
    Instruction,
    InstructionInfo,
    InstructionInfoFactory,
    MemoryOperand,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

from cardcage_tcg import layout as L
from cardcage_tcg.emit import (
    HOST,
    NUMBER,
    SPILLED,
    alu_flags,
    call_state,
    flags_load,
    lea_disp,
    load,
    load16,
    load32,
    mov,
    mov32,
    named,
    payload_nop,
    store,
)
from cardcage_tcg.system import helper_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ALL_FLAGS", "Access", "Emulate", "Template", "Templates"]

M, R, K = Mnemonic, Register, OpKind
ALL_FLAGS = RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF
WRITES = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
READS = {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE, OpAccess.COND_WRITE}
SHIFTS = {M.SHL, M.SHR, M.SAR, M.ROL, M.ROR, M.RCL, M.RCR, M.SHLD, M.SHRD, M.SAL}
NOTHING = {
    getattr(M, name)
    for name in [
        "NOP",
        "ENDBR64",
        "ENDBR32",
        "PREFETCHT0",
        "PREFETCHT1",
        "PREFETCHT2",
        "PREFETCHNTA",
        "PREFETCHW",
        "PREFETCH",
        "PREFETCHWT1",
        "PREFETCHIT0",
        "PREFETCHIT1",
        "PAUSE",
        "CLFLUSH",
        "CLFLUSHOPT",
        "CLWB",
        "CLDEMOTE",
        "RESERVEDNOP",
    ]
}
INTEGER = {
    getattr(M, name)
    for name in [
        "ADD",
        "ADC",
        "SUB",
        "SBB",
        "AND",
        "OR",
        "XOR",
        "CMP",
        "TEST",
        "MOV",
        "MOVZX",
        "MOVSX",
        "MOVSXD",
        "LEA",
        "INC",
        "DEC",
        "NEG",
        "NOT",
        "MUL",
        "IMUL",
        "DIV",
        "IDIV",
        "SHL",
        "SHR",
        "SAR",
        "SAL",
        "ROL",
        "ROR",
        "RCL",
        "RCR",
        "SHLD",
        "SHRD",
        "BT",
        "BTS",
        "BTR",
        "BTC",
        "BSF",
        "BSR",
        "BSWAP",
        "XCHG",
        "XADD",
        "CMPXCHG",
        "CMPXCHG8B",
        "CMPXCHG16B",
        "CBW",
        "CWDE",
        "CDQE",
        "CWD",
        "CDQ",
        "CQO",
        "CLC",
        "STC",
        "CMC",
        "LAHF",
        "SAHF",
        "POPCNT",
        "LZCNT",
        "TZCNT",
        "MOVBE",
        "CRC32",
        "RDRAND",
        "RDSEED",
        "ADCX",
        "ADOX",
        "MOVNTI",
        "LFENCE",
        "SFENCE",
        "MFENCE",
        "SETO",
        "SETNO",
        "SETB",
        "SETAE",
        "SETE",
        "SETNE",
        "SETBE",
        "SETA",
        "SETS",
        "SETNS",
        "SETP",
        "SETNP",
        "SETL",
        "SETGE",
        "SETLE",
        "SETG",
        "CMOVO",
        "CMOVNO",
        "CMOVB",
        "CMOVAE",
        "CMOVE",
        "CMOVNE",
        "CMOVBE",
        "CMOVA",
        "CMOVS",
        "CMOVNS",
        "CMOVP",
        "CMOVNP",
        "CMOVL",
        "CMOVGE",
        "CMOVLE",
        "CMOVG",
        "ANDN",
        "BEXTR",
        "BLSI",
        "BLSMSK",
        "BLSR",
        "BZHI",
        "MULX",
        "PDEP",
        "PEXT",
        "RORX",
        "SARX",
        "SHLX",
        "SHRX",
    ]
}
SIMD = {
    getattr(CpuidFeature, name)
    for name in [
        "INTEL8086",
        "INTEL186",
        "INTEL286",
        "INTEL386",
        "INTEL486",
        "CMOV",
        "X64",
        "MMX",
        "SSE",
        "SSE2",
        "SSE3",
        "SSSE3",
        "SSE4_1",
        "SSE4_2",
        "AES",
        "PCLMULQDQ",
        "SHA",
        "FPU",
        "FPU287",
        "FPU387",
        "FXSR",
    ]
}
AVX = {getattr(CpuidFeature, name) for name in ["AVX", "AVX2", "F16C", "FMA"]}
BASIC = {
    getattr(CpuidFeature, name) for name in ["INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "CMOV", "X64"]
}
X87 = {CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.FPU287XL_ONLY, CpuidFeature.FXSR}
XSAVES = {
    M.XSAVE: 832,
    M.XSAVE64: 832,
    M.XSAVEC: 832,
    M.XSAVEC64: 832,
    M.XSAVEOPT: 832,
    M.XSAVEOPT64: 832,
    M.XRSTOR: 832,
    M.XRSTOR64: 832,
}
"""Instructions with an XSAVE image, and the most bytes they reach (state up to AVX's)."""
MASKED_STORES = {M.MASKMOVDQU, M.MASKMOVQ, M.VMASKMOVDQU}
MASKED_MOVES = {M.VMASKMOVPS, M.VMASKMOVPD, M.VPMASKMOVD, M.VPMASKMOVQ}
ALIGNED_VEX = {M.VMOVAPS, M.VMOVAPD, M.VMOVDQA, M.VMOVNTPS, M.VMOVNTPD, M.VMOVNTDQ, M.VMOVNTDQA}
AH_TO_BH = {R.AH, R.CH, R.DH, R.BH}
ALIGNED = {2: 2, 4: 4, 8: 8, 10: 8, 14: 2, 28: 4, 94: 2, 108: 4, 512: 16}
"""Operand size to the alignment that #AC is about."""
UNALIGNED = {M.MOVUPS, M.MOVUPD, M.MOVDQU, M.LDDQU, M.PCMPESTRI, M.PCMPESTRM, M.PCMPISTRI, M.PCMPISTRM}
"""Instructions of 16 bytes whose misaligned operand is #AC's; with the others it is #GP's, from the host."""
BORROWED = (12, 13, 14, 15, 8, 5)
"""Host registers that stand in for guest registers in memory when RSI and RDI do not suffice."""
RETAINING = {M.BSF, M.BSR}
"""Instructions that may leave a destination as it was, though they are said to write it."""
OFF_X87, OFF_MMX, OFF_SSE, OFF_AVX, OFF_XSAVE, OFF_WAIT = range(6)

_CODES = {name: getattr(Code, name) for name in dir(Code) if not name.startswith("_")}
RECODE = {
    **{_CODES[f"{op}_R{bits}"]: _CODES[f"{op}_RM{bits}"] for op in ("INC", "DEC") for bits in (16, 32)},
    **{code: _CODES[name[:-3]] for name, code in _CODES.items() if name.endswith("_IMM8_82")},
    _CODES["MOV_AL_MOFFS8"]: _CODES["MOV_R8_RM8"],
    _CODES["MOV_AX_MOFFS16"]: _CODES["MOV_R16_RM16"],
    _CODES["MOV_EAX_MOFFS32"]: _CODES["MOV_R32_RM32"],
    _CODES["MOV_RAX_MOFFS64"]: _CODES["MOV_R64_RM64"],
    _CODES["MOV_MOFFS8_AL"]: _CODES["MOV_RM8_R8"],
    _CODES["MOV_MOFFS16_AX"]: _CODES["MOV_RM16_R16"],
    _CODES["MOV_MOFFS32_EAX"]: _CODES["MOV_RM32_R32"],
    _CODES["MOV_MOFFS64_RAX"]: _CODES["MOV_RM64_R64"],
}
"""Codes of 16- and 32-bit mode, or with their own addressing, and the same operation's general form."""
RECODE |= {_CODES[f"XSAVEOPT{wide}_MEM"]: _CODES[f"XSAVE{wide}_MEM"] for wide in ("", "64")}
"""What XSAVEOPT may leave out depends on addresses, which are not the host's."""
_IMAGE = b"\x66\xc7\x46\x06\0\0\x48\xc7\x46\x08\0\0\0\0\x48\xc7\x46\x10\0\0\0\0"
_ENVIRONMENT = b"\xc7\x46\x0c\0\0\0\0\xc7\x46\x10\0\0\0\0\xc7\x46\x14\0\0\0\0"
HIDDEN = {
    **{_CODES[f"{op}{wide}"]: _IMAGE for op in ("XSAVE", "XSAVEC", "XSAVEOPT") for wide in ("_MEM", "64_MEM")},
    **{_CODES[f"FXSAVE{wide}_M512BYTE"]: _IMAGE for wide in ("", "64")},
    **{_CODES[name]: _ENVIRONMENT for name in ("FNSTENV_M28BYTE", "FNSAVE_M108BYTE")},
    **{_CODES[name]: b"\x48\xc7\x46\x06\0\0\0\0" for name in ("FNSTENV_M14BYTE", "FNSAVE_M94BYTE")},
}
"""Code that clears the last x87 opcode and its pointers in an image at RSI: the pointers are the host's."""
ADDRESSED = {
    M.SGDT: (6, True), M.SIDT: (6, True), M.LGDT: (6, False), M.LIDT: (6, False), M.SLDT: (2, True), M.STR: (2, True),
    M.SMSW: (2, True), M.ARPL: (2, True), M.BOUND: (4, False),
}  # fmt: skip
"""Size of the operand of helpers that take an address, and whether it is written, for the segment's limit."""
NEAR_MEMORY = {_CODES[f"{op}_RM{bits}"] for op in ("JMP", "CALL") for bits in (16, 32, 64)}


def _is_unaligned_vex(ins: Instruction) -> bool:
    """VEX instructions do not ask for alignment, but for those that say so by their names."""
    return bool(set(ins.cpuid_features()) & AVX) and ins.mnemonic not in ALIGNED_VEX


def unit_of(ins: Instruction) -> int:
    """The unit (``OFF_*``) of an instruction that is not the integer unit's."""
    features = set(ins.cpuid_features())
    if features & AVX:
        return OFF_AVX
    if features & X87:
        return OFF_X87
    registers = [ins.op_register(i) for i in range(ins.op_count) if ins.op_kind(i) == K.REGISTER]
    narrow = any(R.MM0 <= one <= R.MM7 for one in registers) and not any(R.XMM0 <= one <= R.XMM15 for one in registers)
    return OFF_MMX if narrow or CpuidFeature.MMX in features else OFF_SSE


class Emulate(Exception):
    """The instruction is Python's to do."""


class Access:
    """One memory access inside a template: where its slow path is entered and where that goes on."""

    __slots__ = ("branch", "flags", "immediate", "resume", "size", "source", "stub")

    def __init__(
        self, branch: int, resume: int, stub: int, size: int, source: int = 0, immediate: int = 0, flags: int = 0
    ) -> None:
        self.branch, self.resume, self.stub, self.size = branch, resume, stub, size
        self.source, self.immediate, self.flags = source, immediate, flags


class Template:
    """Host code of one instruction.

    Attributes:
        code: the bytes, holes zero.
        reads, kills: arithmetic flags it needs, and those it surely replaces.
        clobbers: its code destroys the host's flags before the operation, so live flags must be in ``cpu.fl``.
        flags_stored: afterwards the guest's flags are in ``cpu.fl``, not in the host's.
        rip: ``(offset, relative)`` of a 64-bit hole for a RIP-relative address, or None.
        payload: offset of a payload NOP's displacement, or -1.
        accesses: its memory accesses.
        shadow: interrupts are held back until after the next instruction.
        fault: a host signal can come out of it (division, aligned SSE, floating point).
    """

    __slots__ = ("accesses", "clobbers", "code", "fault", "flags_stored", "kills", "payload", "reads", "rip", "shadow")

    def __init__(self) -> None:
        self.code = b""
        self.reads = self.kills = 0
        self.clobbers = self.flags_stored = self.shadow = self.fault = False
        self.rip: tuple[int, int] | None = None
        self.payload = -1
        self.accesses: Sequence[Access] = ()


class Templates:
    """Makes templates for one mode (``MODE_*`` bits); *bounce* for singles, whose writes go to ``cpu.bounce``."""

    def __init__(self, mode: int, *, hidden: frozenset[int] = frozenset(), bounce: bool = False) -> None:
        self.mode, self.hidden, self.bounce = mode, hidden, bounce
        self.avx = CpuidFeature.AVX not in hidden
        self.long = bool(mode & L.MODE_64)
        self.width = 8 if self.long else 4 if mode & L.MODE_32 else 2
        self.user = mode & L.MODE_CPL3
        self.tlb_read = L.TLB_R + (L.SIZEOF_TLB if self.user else 0)
        self.tlb_write = L.TLB_W + (L.SIZEOF_TLB if self.user else 0)
        self._encoder = Encoder(64)
        self._info = InstructionInfoFactory()
        self._sizes: dict[int, int] = {}

    def get(self, ins: Instruction, raw: bytes, restore: bool) -> Template:
        """The template of *ins*; *restore* puts the flags back before its operation. Raises :exc:`Emulate`."""
        return self._make(ins, raw, restore)

    # ---- pieces ----

    def encode(self, ins: Instruction) -> bytes:
        try:
            self._encoder.encode(ins, 0)
        except ValueError as error:
            raise Emulate(str(error)) from error
        return bytes(self._encoder.take_buffer())

    def size_of(self, ins: Instruction) -> int:
        size = self._sizes.get(ins.memory_size)
        if size is None:
            size = self._sizes[ins.memory_size] = MemorySizeInfo(ins.memory_size).size
        return size

    def address(self, ins: Instruction, out: bytearray, t: Template, size: int, write: bool) -> None:
        """Code for RSI = linear address of a memory operand of *size* bytes; RDI is clobbered.

        Flags are kept, except where the segment has a limit to look at; *size* 0 looks at none.
        """
        self._offset(ins, out, t)
        self._segment(ins, out, t, size, write)

    def _offset(self, ins: Instruction, out: bytearray, t: Template) -> int:
        """Code for RSI = effective address of the memory operand (RDI clobbered, flags kept); its width in bytes."""
        base, index, scale, disp = ins.memory_base, ins.memory_index, ins.memory_index_scale, ins.memory_displacement
        if base in (R.RIP, R.EIP):
            t.rip = len(out) + 2, disp - ins.ip
            out += b"\x48\xbe" + bytes(8)
            if base == R.EIP:
                out += mov32(6, 6)
            return 8 if base == R.RIP else 4
        b, x = NUMBER.get(base), NUMBER.get(index)
        if b is None and x is None:
            width = (
                ins.memory_displ_size
                if ins.memory_displ_size in (2, 4) and not self.long
                else self.width
                if not self.long
                else 8
            )
            disp &= (1 << width * 8) - 1
            if width == 8 and (disp < 1 << 31 or disp >= (1 << 64) - (1 << 31)):
                out += b"\x48\xc7\xc6" + pack("<I", disp & 0xFFFFFFFF)
            else:
                out += b"\x48\xbe" + pack("<Q", disp) if width == 8 else b"\xbe" + pack("<I", disp)
            return width
        if (b or x)[1] == 2:
            self._address16(b, x, disp, out)
            return 2
        wide = (b or x)[1]
        host_base = self._host(b, 6, out)
        host_index = self._host(x, 7, out)
        if host_base is None and scale == 1:
            host_base, host_index = host_index, None
        disp -= 1 << 64 if disp >> 63 else 0
        if wide == 4 and disp >= 1 << 31:
            disp -= 1 << 32
        if not disp and host_index is None and host_base is not None:
            if host_base != 6 or wide == 4:
                out += mov(6, host_base) if wide == 8 else mov32(6, host_base)
        else:
            shape = 0 if disp == 0 else 1 if -128 <= disp < 128 else 8
            operand = MemoryOperand(
                R.NONE if host_base is None else named[host_base, 8],
                R.NONE if host_index is None else named[host_index, 8],
                1 if host_index is None else scale,
                disp,
                shape or int(host_base in (5, 13)),
            )
            code, target = (Code.LEA_R64_M, R.RSI) if wide == 8 else (Code.LEA_R32_M, R.ESI)
            out += self.encode(Instruction.create_reg_mem(code, target, operand))
        return wide

    def _host(self, register: tuple[int, int] | None, scratch: int, out: bytearray) -> int | None:
        if register is None:
            return None
        number = register[0]
        if number in SPILLED:
            out += load(scratch, L.GPR + 8 * number)
            return scratch
        return HOST.get(number, number)

    def _address16(self, b: tuple[int, int] | None, x: tuple[int, int] | None, disp: int, out: bytearray) -> None:
        for register, scratch in ((b, 6), (x, 7)):
            if register is None:
                out += pack("<Bi", 0xB8 | scratch, 0)
            else:
                host = HOST.get(register[0], register[0])
                rex = 0x40 | host >> 3
                out += (bytes((rex,)) if rex != 0x40 else b"") + bytes((0x0F, 0xB7, 0xC0 | scratch << 3 | (host & 7)))
        out += b"\x8d\xb4\x3e" + pack("<i", disp & 0xFFFF)  # lea esi, [rsi+rdi+disp]
        out += b"\x0f\xb7\xf6"  # movzx esi, si

    def _segment(self, ins: Instruction, out: bytearray, t: Template, size: int, write: bool) -> None:
        segment = ins.memory_segment
        if self.long:
            if segment in (R.FS, R.GS):
                out += load(7, L.FSBASE if segment == R.FS else L.GSBASE) + b"\x48\x8d\x34\x3e"
        elif segment in (R.CS, R.FS, R.GS) or not self.mode & L.MODE_FLAT:  # CS: not to be written
            self._limit(out, t, segment - R.ES, size, write)
            out += load32(7, L.SEGBASE + 8 * (segment - R.ES)) + b"\x8d\x34\x3e"

    def stack_segment(self, out: bytearray, t: Template, size: int, write: bool) -> None:
        """RSI, an offset in the stack segment, becomes a linear address."""
        if not self.long and not self.mode & L.MODE_FLAT:
            self._limit(out, t, 2, size, write)
            out += load32(7, L.SEGBASE + 16) + b"\x8d\x34\x3e"

    def _limit(self, out: bytearray, t: Template, segment: int, size: int, write: bool) -> None:
        """Protected mode: #GP or #SS unless RSI to RSI + *size* lie in the segment (``struct limit``)."""
        if not size or not self.mode & L.MODE_PE:
            return
        at = L.LIMITS + L.SIZEOF_LIMIT * segment
        out += b"\x89\xf7\x2b\xbc\x24" + pack("<i", at + L.LIMIT_LOW)  # mov edi, esi; sub edi, [low]
        out += b"\x48\x8d\xbf" + pack("<i", size)  # lea rdi, [rdi + size]
        out += b"\x48\x3b\xbc\x24" + pack("<i", at + (L.LIMIT_WRITE if write else L.LIMIT_READ))
        self._unless(out, t, b"\x0f\x87", size, 1 if segment == 2 else 0)

    def _unless(self, out: bytearray, t: Template, branch: bytes, size: int, flags: int) -> None:
        """The conditional *branch* goes to what raises the exception that *flags* (``ACCESS_*``) say."""
        out += branch + bytes(4)
        t.clobbers = True
        t.accesses = (*t.accesses, Access(len(out) - 4, len(out), L.STUB_LIMIT, size, flags=flags))

    def access(
        self,
        out: bytearray,
        t: Template,
        size: int,
        write: bool,
        restore: bool,
        *,
        store_source: int = -1,
        immediate: int = 0,
        stack: bool = False,
        alignment: int = 0,
    ) -> int:
        """Code for RSI = host address of *size* bytes at linear RSI; index of the :class:`Access` it adds."""
        t.clobbers = True
        aligned = alignment or ALIGNED.get(size, 1)
        if self.mode & L.MODE_AC and aligned > 1:  # test esi, alignment - 1
            out += b"\xf7\xc6" + pack("<I", aligned - 1)
            self._unless(out, t, b"\x0f\x85", size, L.ACCESS_AC)
        if write and self.bounce:
            out += load(6, L.WRITE_PTR)
            branch = -1
        else:
            table = self.tlb_write if write else self.tlb_read
            out += b"\x89\xf7\xc1\xef\x08\x81\xe7" + pack("<I", (L.TLB_SIZE - 1) << 4)
            out += b"\x48\x33\xb4\x3c" + pack("<i", table) + b"\x48\x81\xfe" + pack("<I", 4096 - size)
            out += b"\x0f\x87\0\0\0\0"
            branch = len(out) - 4
            out += b"\x48\x03\xb4\x3c" + pack("<i", table + 8)
        stub = (L.STUB_STORE_K if store_source >= 0 else L.STUB_WRITE_K if write else L.STUB_READ_K) + bool(self.user)
        one = Access(branch, len(out), stub, size, max(store_source, 0), immediate, int(stack))
        if branch >= 0:
            t.accesses = (*t.accesses, one)
        if restore:
            out += flags_load
        return len(t.accesses) - 1

    # ---- instructions ----

    def _make(self, ins: Instruction, raw: bytes, restore: bool) -> Template:
        mnemonic = ins.mnemonic
        t = Template()
        t.reads, t.kills = ins.rflags_read & ALL_FLAGS, ins.rflags_modified & ALL_FLAGS
        if mnemonic in NOTHING:
            t.reads = t.kills = 0
            return t
        if mnemonic == M.WAIT:
            t.fault = True
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
        if mnemonic == M.LEA:
            return self._lea(ins, t, registers)
        if memory < 0:
            return self._registers(ins, raw, t, registers)
        return self._memory(ins, t, registers, memory, restore)

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
            t.fault = mnemonic in (M.DIV, M.IDIV)
            return None
        if ins.is_privileged or ins.is_vsib:
            raise Emulate("not on the allow-list")
        t.fault = True
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
        """Whether the mode may keep the unit from working; a helper then knows which exception it is."""
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
        at = self.access(
            out,
            t,
            size,
            write,
            False,
            store_source=source,
            immediate=immediate,
            stack=stack,
            alignment=size if mnemonic in UNALIGNED or (size > 8 and _is_unaligned_vex(ins)) else 0,
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
        if mnemonic in XSAVES:  # only states that the guest has; a fault puts RAX and RDX back from scratch
            before += store(0, L.SCRATCH + 16) + store(2, L.SCRATCH + 24)
            before += b"\x23\x84\x24" + pack("<i", L.GUEST_XCR0) + b"\x31\xd2"
            after += load(0, L.SCRATCH + 16) + load(2, L.SCRATCH + 24)
        self._homes(ins, copy, registers, [7], before, after)
        out += before + self.encode(copy) + after + HIDDEN.get(ins.code, b"")
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
        self.access(out, t, size, True, restore, stack=ins.memory_segment == R.SS, alignment=size)
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
        """Code for RSI = target of a near indirect JMP or CALL; False for what is not one of the mode's width."""
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
            self.address(ins, out, t, size, False)
            self.access(out, t, size, False, False, stack=ins.memory_segment == R.SS)
            out += {2: b"\x0f\xb7\x36", 4: b"\x8b\x36", 8: b"\x48\x8b\x36"}[size]
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
        elif kind == K.MEMORY:
            out += load(7, L.SCRATCH + 24) + prefix + bytes((wide, 0x89, 0x3E))
        else:
            value = ins.immediate(0)
            value -= 1 << 64 if value >> 63 else 0
            if size == 2:
                out += b"\x66\xc7\x06" + pack("<H", value & 0xFFFF)
            else:
                out += bytes((wide, 0xC7, 0x06)) + pack("<I", value & 0xFFFFFFFF)
        self.stack_commit(-size, out)
        t.code = bytes(out)
        return t

    def _pop(self, ins: Instruction, t: Template, restore: bool) -> Template:
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
        else:
            if size == 2:
                if number in SPILLED:
                    out += b"\x0f\xb7\x3e\x66\x89\xbc\x24" + pack("<i", L.GPR + 8 * number)
                else:
                    host = HOST.get(number, number)
                    out += b"\x66" + bytes((0x40 | host >> 3 << 2, 0x8B, 0x06 | (host & 7) << 3))
            elif number in SPILLED:
                out += b"\x48\x8b\x3e" + store(7, L.GPR + 8 * number)
            else:
                host = HOST.get(number, number)
                out += bytes(((0x48 if size == 8 else 0x40) | host >> 3 << 2, 0x8B, 0x06 | (host & 7) << 3))
            self.stack_commit(size, out)
        t.code = bytes(out)
        return t

    def _leave(self, ins: Instruction, t: Template, restore: bool) -> Template:
        size = self.operand_width(ins) or self.width
        out = bytearray()
        if self.long and ins.code == Code.LEAVEQ:
            out += mov(6, 5)
            self.access(out, t, 8, False, restore, stack=True)
            out += b"\x4c\x8d\x4d\x08\x48\x8b\x2e"  # lea r9, [rbp+8]; mov rbp, [rsi]
        elif not self.long and ins.code == Code.LEAVED and self.mode & L.MODE_SS32:
            out += mov32(6, 5)
            self.stack_segment(out, t, 4, False)
            self.access(out, t, 4, False, restore, stack=True)
            out += b"\x44\x8d\x4d\x04\x8b\x2e"
        else:
            raise Emulate(f"leave {size}")
        t.code = bytes(out)
        return t

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
        found = helper_of(ins, self.mode)
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

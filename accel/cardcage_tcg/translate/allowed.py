"""Instructions that may be emitted: allow-lists, and their properties by name."""

from __future__ import annotations

from typing import Any

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    DecoderOptions,
    EncodingKind,
    Instruction,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RflagsBits,
)

__all__ = [
    "ADDRESSED",
    "AH_TO_BH",
    "ALIGNED",
    "ALIGNED_VEX",
    "ALL_FLAGS",
    "AVX",
    "BASIC",
    "BORROWED",
    "ENVIRONMENT",
    "FAULTING",
    "FLUSHES",
    "HIDDEN",
    "IMAGE",
    "INTEGER",
    "MASKED_MOVES",
    "MASKED_STORES",
    "NAMES",
    "NEAR_MEMORY",
    "NOTHING",
    "OFF_AVX",
    "OFF_MMX",
    "OFF_SSE",
    "OFF_WAIT",
    "OFF_X87",
    "OFF_XSAVE",
    "READS",
    "RECODE",
    "RETAINING",
    "SHIFTS",
    "SIMD",
    "UNALIGNED",
    "WRITES",
    "XSAVES",
    "decoder_of",
    "is_foreign",
    "is_unaligned_vex",
    "unit_of",
    "waits",
]

M, R, K = Mnemonic, Register, OpKind

ALL_FLAGS = RflagsBits.OF | RflagsBits.SF | RflagsBits.ZF | RflagsBits.AF | RflagsBits.CF | RflagsBits.PF
WRITES = {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
READS = {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE, OpAccess.COND_WRITE}
FAULTING = {
    *(M.DIV, M.IDIV, M.PTEST, M.COMISS, M.COMISD, M.UCOMISS, M.UCOMISD),
    *(M.VCOMISS, M.VCOMISD, M.VUCOMISS, M.VUCOMISD),
}
"""Instructions that write all flags, and may fault after their operand was found: the frame has the flags of before."""
SHIFTS = {M.SHL, M.SHR, M.SAR, M.ROL, M.ROR, M.RCL, M.RCR, M.SHLD, M.SHRD, M.SAL}
NOTHING = {M.NOP, M.RESERVEDNOP}
FLUSHES = {M.CLFLUSH, M.CLFLUSHOPT, M.CLWB}
DECODE = DecoderOptions.FORCE_RESERVED_NOP | DecoderOptions.NO_WBNOINVD
"""Instructions that guests' processors lack, decoded as they do: ENDBR, RDSSP, BNDxx, CLDEMOTE, prefetches of all kinds
are the reserved NOPs of 0F 0D and 0F 18 to 0F 1F, whose memory operand is not accessed and whose encoding is never
emitted (SDM vol. 2, table A-3, note 1; APM vol. 3, table A-5), and WBNOINVD is WBINVD."""
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
NO_WAIT = {M.FNSTENV, M.FNSAVE, M.FNSTCW, M.FNSTSW}
MASKED_STORES = {M.MASKMOVDQU, M.MASKMOVQ, M.VMASKMOVDQU}
MASKED_MOVES = {M.VMASKMOVPS, M.VMASKMOVPD, M.VPMASKMOVD, M.VPMASKMOVQ}
ALIGNED_VEX = {M.VMOVAPS, M.VMOVAPD, M.VMOVDQA, M.VMOVNTPS, M.VMOVNTPD, M.VMOVNTDQ, M.VMOVNTDQA}
AH_TO_BH = {R.AH, R.CH, R.DH, R.BH}
ALIGNED = {2: 2, 4: 4, 8: 8, 10: 8, 14: 2, 28: 4, 94: 2, 108: 4, 512: 16}
"""Operand size to the alignment that #AC is about."""
UNALIGNED = {
    M.MOVUPS, M.MOVUPD, M.MOVDQU, M.LDDQU, M.PCMPISTRI, M.PCMPISTRM,
    M.PCMPESTRI, M.PCMPESTRM, M.PCMPESTRI64, M.PCMPESTRM64,
}  # fmt: skip
"""Instructions of 16 bytes whose misaligned operand is #AC's; with the others it is #GP's, from the host."""
BORROWED = (12, 13, 14, 15, 8, 5)
"""Host registers that stand in for guest registers in memory when RSI and RDI do not suffice."""
RETAINING = {M.BSF, M.BSR}
"""Instructions that may leave a destination as it was, though they are said to write it."""
OFF_X87, OFF_MMX, OFF_SSE, OFF_AVX, OFF_XSAVE, OFF_WAIT = range(6)

_CODES: dict[str, Any] = vars(Code)
NAMES = {code: name for name, code in _CODES.items() if not name.startswith("_")}
"""The decoder's name of each ``Code``."""
RECODE = {
    **{_CODES[f"{op}_R{bits}"]: _CODES[f"{op}_RM{bits}"] for op in ("INC", "DEC") for bits in (16, 32)},
    **{code: _CODES[name[:-3]] for code, name in NAMES.items() if name.endswith("_IMM8_82")},
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
"""The parts that XSAVEOPT may leave out depend on addresses, which are not the host's."""
IMAGE = b"\x66\xc7\x46\x06\0\0\x48\xc7\x46\x08\0\0\0\0\x48\xc7\x46\x10\0\0\0\0"
ENVIRONMENT = b"\xc7\x46\x0c\0\0\0\0\xc7\x46\x10\0\0\0\0\xc7\x46\x14\0\0\0\0"
HIDDEN = {
    **{_CODES[f"{op}{wide}"]: IMAGE for op in ("XSAVE", "XSAVEC", "XSAVEOPT") for wide in ("_MEM", "64_MEM")},
    **{_CODES[f"FXSAVE{wide}_M512BYTE"]: IMAGE for wide in ("", "64")},
    **{_CODES[name]: ENVIRONMENT for name in ("FNSTENV_M28BYTE", "FNSAVE_M108BYTE")},
    **{_CODES[name]: b"\x48\xc7\x46\x06\0\0\0\0" for name in ("FNSTENV_M14BYTE", "FNSAVE_M94BYTE")},
}
"""Code that clears the last x87 opcode and its pointers in an image at RSI: the pointers are the host's."""
ADDRESSED = {
    M.SGDT: (6, True), M.SIDT: (6, True), M.LGDT: (6, False), M.LIDT: (6, False), M.SLDT: (2, True), M.STR: (2, True),
    M.SMSW: (2, True), M.ARPL: (2, True), M.BOUND: (4, False),
    **{one: (576, one not in (M.XRSTOR, M.XRSTOR64)) for one in XSAVES},
}  # fmt: skip
"""Size of the operand of helpers that take an address, and whether it is written, for the segment's limit."""
NEAR_MEMORY = {_CODES[f"{op}_RM{bits}"] for op in ("JMP", "CALL") for bits in (16, 32, 64)}


def decoder_of(bits: int, data: bytes, ip: int = 0) -> Decoder:
    """The decoder of guest code: *bits* is 16, 32 or 64, *ip* the address of *data*."""
    return Decoder(bits, data, DECODE, ip=ip)


def is_unaligned_vex(ins: Instruction) -> bool:
    """VEX instructions do not ask for alignment, but for those that say so by their names."""
    return bool(set(ins.cpuid_features()) & AVX) and ins.mnemonic not in ALIGNED_VEX


def is_foreign(ins: Instruction) -> bool:
    """Encodings of other processors: EVEX, XOP, MVEX, 3DNow!."""
    return ins.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX)


def waits(ins: Instruction) -> bool:
    """x87 instructions that raise a pending exception first; those without WAIT do not (SDM vol. 1, 8.3.11)."""
    return bool(set(ins.cpuid_features()) & X87 - {CpuidFeature.FXSR}) and ins.mnemonic not in NO_WAIT


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

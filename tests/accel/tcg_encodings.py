"""Encodings of user-level instructions: out of real programs, and changed ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from iced_x86 import Code, CpuidFeature, Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["WIDE", "collect", "encodings", "usable"]

M, R, K = Mnemonic, Register, OpKind
OTHERS = {
    getattr(M, name)
    for name in (
        "IN OUT INSB INSW INSD OUTSB OUTSW OUTSD HLT CLI STI CPUID RDTSC RDTSCP RDPMC RDRAND RDSEED XGETBV RDPID RDPRU"
        " RDPKRU WRPKRU RDFSBASE RDGSBASE WRFSBASE WRGSBASE SGDT SIDT SLDT STR SMSW LAR LSL VERR VERW ARPL LDS LES LFS"
        " LGS LSS PUSHF PUSHFD PUSHFQ POPF POPFD POPFQ CLZERO MONITOR MWAIT MONITORX MWAITX XABORT XBEGIN XEND XTEST"
        " MOVDIRI MOVDIR64B SERIALIZE SALC XSAVE XSAVE64 XSAVEC XSAVEC64 XSAVEOPT XSAVEOPT64 XRSTOR XRSTOR64 FNSETPM"
        " INCSSPD INCSSPQ RDSSPD RDSSPQ UD0 UD1 UD2 VMCALL INVLPGB TLBSYNC CLAC STAC SWAPGS VMMCALL FEMMS FSTDW FSTSG"
        " FRSTPM CLDEMOTE PTWRITE"
    ).split()
    if hasattr(M, name)
}
"""Instructions that a user's program runs differently here and there, or not at all."""
SHORT_MOVSXD = Code.MOVSXD_R16_RM16
"""It reads two bytes of memory (Intel SDM vol. 2); processors of AMD read four, and fault for the last two."""
NEW = {
    getattr(CpuidFeature, name)
    for name in dir(CpuidFeature)
    if name.startswith(
        (
            "AVX512",
            "AVX_",
            "SSE4A",
            "GFNI",
            "XOP",
            "FMA4",
            "TBM",
            "LWP",
            "D3NOW",
            "CET",
            "MPX",
            "VAES",
            "VPCLMUL",
            "CYRIX",
        )
    )
}
WIDE = {getattr(CpuidFeature, name) for name in "AVX AVX2 FMA F16C".split()}


def usable(ins: Instruction, *, avx: bool = False) -> bool:
    """Whether an instruction can be compared: unprivileged, and no branch."""
    if ins.code in (Code.INVALID, SHORT_MOVSXD) or ins.flow_control not in (FlowControl.NEXT, FlowControl.INTERRUPT):
        return False
    if (
        ins.mnemonic in OTHERS
        or ins.is_privileged
        or (ins.flow_control == FlowControl.INTERRUPT and ins.mnemonic != M.INTO)
    ):
        return False
    features = set(ins.cpuid_features())
    if features & NEW or (features & WIDE and not avx):
        return False
    return not any(
        ins.op_kind(i) == K.REGISTER and (R.ES <= ins.op_register(i) <= R.GS or R.CR0 <= ins.op_register(i) <= R.TR7)
        for i in range(ins.op_count)
    )


def encodings(path: Path, bits: int = 64) -> Iterator[bytes]:
    """Instructions in an ELF file's executable sections (in all bytes when it is none), one after the other."""
    data = path.read_bytes()
    pieces = [data]
    if data[:4] == b"\x7fELF" and data[4] == 2:
        shoff, shentsize, shnum = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58)
        pieces = []
        for i in range(shnum):
            _, kind, flags, _, offset, size = struct.unpack_from("<IIQQQQ", data, shoff + i * shentsize)
            if kind == 1 and flags & 4:
                pieces.append(data[offset : offset + size])
    for piece in pieces:
        decoder = Decoder(bits, piece)
        at = 0
        for ins in decoder:
            yield piece[at : at + ins.len]
            at += ins.len


def shape(ins: Instruction) -> tuple[object, ...]:
    """What makes an encoding distinct: code, registers, addressing; not displacements and immediates."""
    address = ins.memory_base, ins.memory_index, ins.memory_index_scale, ins.memory_displ_size
    prefixes = ins.segment_prefix, ins.has_lock_prefix, ins.has_rep_prefix, ins.has_repne_prefix
    return (ins.code, tuple(ins.op_register(i) for i in range(ins.op_count)), address, prefixes)


def mutated(raw: bytes, r: random.Random, bits: int) -> bytes:
    """The same instruction with other registers: bits of ModRM, SIB and REX changed."""
    decoder = Decoder(bits, raw)
    ins = decoder.decode()
    out = bytearray(raw)
    offsets = decoder.get_constant_offsets(ins)
    tail = min((one for one in (offsets.displacement_offset, offsets.immediate_offset) if one), default=len(raw))
    at = r.randrange(max(tail - 2, 0), tail) if tail else 0
    out[at] ^= r.choice((1, 2, 4, 8, 16, 32, 5, 9, 0x3F & r.getrandbits(6)))
    if bits == 64 and r.random() < 0.5:
        rex = next((i for i, one in enumerate(out) if one not in (0x66, 0xF2, 0xF3, 0xF0, 0x64, 0x65, 0x67)), 0)
        if out[rex] & 0xF0 == 0x40:
            out[rex] ^= r.randrange(16)
        elif len(out) < 15:
            out.insert(rex, 0x40 | r.randrange(16))
    return bytes(out)


def collect(paths: Iterable[Path], *, bits: int, avx: bool, mutate: int, seed: int) -> list[bytes]:
    """Distinct encodings of files, and *mutate* variants of each."""
    r = random.Random(seed)
    found: dict[tuple[object, ...], bytes] = {}

    def take(raw: bytes) -> None:
        ins = Decoder(bits, raw, ip=0x10000000).decode()
        if ins.len == len(raw) and usable(ins, avx=avx):
            found.setdefault(shape(ins), raw)

    for path in paths:
        for raw in encodings(path, bits):
            take(raw)
    for raw in list(found.values()):
        for _ in range(mutate):
            take(mutated(raw, r, bits))
    return list(found.values())

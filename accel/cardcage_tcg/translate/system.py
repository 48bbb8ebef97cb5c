"""Which instructions are native helpers, and what each is called with (``native/helpers.h`` states the arguments)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.values import frozen
from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from cardcage_tcg import layout as L
from cardcage_tcg.translate.allowed import NAMES
from cardcage_tcg.translate.emit import NUMBER

if TYPE_CHECKING:
    from collections.abc import Callable

    from iced_x86 import Instruction

__all__ = ["HelperCall", "ends_block", "helper_of", "xsave_of"]

M, R, K, F = Mnemonic, Register, OpKind, FlowControl
_SIZES = {"W": 2, "D": 4, "Q": 8}


@frozen
class HelperCall:
    """A call of a native helper.

    Attributes:
        number: ``HLP_*``. immediate: bits 12 to 31 of its argument.
        source: what ``info`` gets from the memory or register operand: ``"address"`` (linear, in info[0]),
            ``"word"`` (a 16-bit value in info[0]), ``"far"`` (selector in info[0], offset in info[1]), or nothing.
        info: constants as ``(slot, value)``.
        segment: the effective segment's base goes to info[1].
        shadow: interrupts wait until after the next instruction.
    """

    number: int
    immediate: int = 0
    source: str = ""
    info: tuple[tuple[int, int], ...] = ()
    segment: bool = False
    shadow: bool = False


def _suffixed(ins: Instruction) -> int:
    """Operand size of a code whose name ends in W, D or Q before any operand part."""
    return _SIZES[NAMES[ins.code].split("_")[0][-1]]


def _word(ins: Instruction, number: int, immediate: int = 0) -> HelperCall:
    return HelperCall(number, immediate, "word")


def _store_word(ins: Instruction, number: int) -> HelperCall:
    if ins.op0_kind == K.REGISTER:
        register, size = NUMBER[ins.op0_register]
        return HelperCall(number, register | size << 4)
    return HelperCall(number, 0x100, "address")


def _far_memory(ins: Instruction) -> int:
    """Operand size of a far pointer in memory, from the code's name (M1616, M1632, M1664)."""
    return int(NAMES[ins.code][-2:]) // 8


def _jmp_far(ins: Instruction, number: int) -> HelperCall | None:
    name = NAMES[ins.code]
    if "_PTR16" in name:
        return HelperCall(
            number,
            int(name[-2:]) // 8,
            info=((0, ins.far_branch_selector), (1, ins.far_branch32 if name[-2:] == "32" else ins.far_branch16)),
        )
    if "_M16" in name:
        return HelperCall(number, _far_memory(ins), "far")
    return None


def _mov(ins: Instruction) -> HelperCall | None:
    if ins.op_count != 2:
        return None
    first = ins.op0_register if ins.op0_kind == K.REGISTER else R.NONE
    second = ins.op1_register if ins.op1_kind == K.REGISTER else R.NONE
    if R.ES <= first <= R.GS:
        segment = first - R.ES
        if segment == 1:
            return HelperCall(L.HLP_RAISE, 6)
        if second != R.NONE:
            return HelperCall(L.HLP_MOV_SREG, segment | NUMBER[second][0] << 4, shadow=segment == 2)
        return HelperCall(L.HLP_LOAD_SREG, segment, "word", shadow=segment == 2)
    if R.ES <= second <= R.GS and first == R.NONE:
        return HelperCall(-1, second - R.ES, "store selector")
    for low, to, fro in ((R.CR0, L.HLP_MOV_TO_CR, L.HLP_MOV_FROM_CR), (R.DR0, L.HLP_MOV_TO_DR, L.HLP_MOV_FROM_DR)):
        if low <= first < low + 16:
            return HelperCall(to, NUMBER[second][0] | (first - low) << 4)
        if low <= second < low + 16:
            return HelperCall(fro, NUMBER[first][0] | (second - low) << 4)
    return None


def _load_far(ins: Instruction) -> HelperCall:
    segment = {M.LES: 0, M.LSS: 2, M.LDS: 3, M.LFS: 4, M.LGS: 5}[ins.mnemonic]
    number, size = NUMBER[ins.op0_register]
    return HelperCall(L.HLP_LOAD_FAR, segment | number << 4 | size << 8, "far")


def _look(ins: Instruction, number: int) -> HelperCall:
    register, size = NUMBER[ins.op0_register]
    return HelperCall(number, register | size << 4, "word")


def _pop(ins: Instruction) -> HelperCall | None:
    if ins.op0_kind == K.REGISTER and R.ES <= ins.op0_register <= R.GS:
        segment = ins.op0_register - R.ES
        return HelperCall(L.HLP_POP_SREG, segment | ins.stack_pointer_increment << 4, shadow=segment == 2)
    return None


def _retf(ins: Instruction) -> HelperCall:
    return HelperCall(L.HLP_RETF, _suffixed(ins) | (ins.immediate16 if ins.op_count else 0) << 4)


def _table(ins: Instruction, number: int) -> HelperCall:
    return HelperCall(number, int(NAMES[ins.code][-2:]) // 8, "address")


def _fsgsbase(ins: Instruction) -> HelperCall:
    number, size = NUMBER[ins.op0_register]
    flags = (16 if ins.mnemonic in (M.RDGSBASE, M.WRGSBASE) else 0) | (
        32 if ins.mnemonic in (M.WRFSBASE, M.WRGSBASE) else 0
    )
    return HelperCall(L.HLP_FSGSBASE, number | flags | (64 if size == 8 else 0))


def _enter(ins: Instruction) -> HelperCall:
    return HelperCall(L.HLP_ENTER, _suffixed(ins), info=((0, ins.immediate16 | ins.immediate8_2nd << 16),))


def _bound(ins: Instruction) -> HelperCall:
    number, size = NUMBER[ins.op0_register]
    return HelperCall(L.HLP_BOUND, number | size << 4, "address")


def _arpl(ins: Instruction) -> HelperCall:
    source = NUMBER[ins.op1_register][0]
    if ins.op0_kind == K.REGISTER:
        return HelperCall(L.HLP_ARPL, NUMBER[ins.op0_register][0] | source << 4)
    return HelperCall(L.HLP_ARPL, source << 4 | 0x100, "address")


def _xlat(ins: Instruction) -> HelperCall:
    return HelperCall(L.HLP_XLAT, NUMBER[ins.memory_base][1] | (ins.memory_segment - R.ES) << 4, segment=True)


_ADDRESS = {
    **dict.fromkeys((K.MEMORY_SEG_SI, K.MEMORY_ESDI, K.MEMORY_SEG_DI), 2),
    **dict.fromkeys((K.MEMORY_SEG_ESI, K.MEMORY_ESEDI, K.MEMORY_SEG_EDI), 4),
    **dict.fromkeys((K.MEMORY_SEG_RSI, K.MEMORY_ESRDI, K.MEMORY_SEG_RDI), 8),
}


def _out(ins: Instruction) -> HelperCall:
    size = NUMBER[ins.op1_register][1].bit_length() - 1
    return HelperCall(L.HLP_OUT, size | (4 | ins.immediate8 << 3 if ins.op0_kind == K.IMMEDIATE8 else 0))


def _string(ins: Instruction) -> HelperCall | None:
    if not ins.is_string_instruction:
        return None
    name = NAMES[ins.code]
    kind = ("MOVS", "CMPS", "STOS", "LODS", "SCAS").index(name[:4])
    size = "BWDQ".index(name[4])
    width = next(_ADDRESS[ins.op_kind(i)] for i in range(ins.op_count) if ins.op_kind(i) in _ADDRESS)
    repeat = 2 if ins.has_repne_prefix and kind in (1, 4) else 1 if ins.has_rep_prefix or ins.has_repne_prefix else 0
    segment = ins.memory_segment - R.ES if kind in (0, 1, 3) else 3
    return HelperCall(L.HLP_STRING, kind | size << 3 | repeat << 5 | (width.bit_length() - 2) << 7 | segment << 9)


def _plain(number: int) -> Callable[[Instruction], HelperCall]:
    call = HelperCall(number)
    return lambda _: call


def _sized(number: int) -> Callable[[Instruction], HelperCall]:
    return lambda ins: HelperCall(number, _suffixed(ins))


_TABLE: dict[int, Callable[[Instruction], HelperCall | None]] = {
    **{
        getattr(M, name): _plain(getattr(L, f"HLP_{name}"))
        for name in [
            "CLI",
            "STI",
            "HLT",
            "PAUSE",
            "CLD",
            "STD",
            "CLAC",
            "STAC",
            "INT3",
            "INTO",
            "INT1",
            "SYSCALL",
            "SYSENTER",
            "SWAPGS",
            "CLTS",
            "CPUID",
            "RDTSC",
            "RDTSCP",
            "RDPMC",
            "RDMSR",
            "WRMSR",
            "SALC",
            "AAA",
            "AAS",
            "DAA",
            "DAS",
        ]
    },
    **{getattr(M, name): _plain(L.HLP_PRIVILEGED_NOP) for name in ("WBINVD", "INVD")},
    **{getattr(M, name): _sized(L.HLP_PUSHF) for name in ("PUSHF", "PUSHFD", "PUSHFQ")},
    **{getattr(M, name): _sized(L.HLP_POPF) for name in ("POPF", "POPFD", "POPFQ")},
    **{getattr(M, name): _sized(L.HLP_IRET) for name in ("IRET", "IRETD", "IRETQ")},
    **{getattr(M, name): _sized(L.HLP_PUSHA) for name in ("PUSHA", "PUSHAD")},
    **{getattr(M, name): _sized(L.HLP_POPA) for name in ("POPA", "POPAD")},
    M.OUT: _out,
    M.RDPKRU: _plain(L.HLP_RDPKRU),
    M.WRPKRU: _plain(L.HLP_WRPKRU),
    **dict.fromkeys((M.VMCALL, M.VMMCALL), _plain(L.HLP_HYPERCALL)),
    M.XGETBV: _plain(L.HLP_XGETBV),
    M.INT: lambda ins: HelperCall(L.HLP_INT, ins.immediate8),
    M.UD2: lambda _: HelperCall(L.HLP_RAISE, 6),
    M.UD0: lambda _: HelperCall(L.HLP_RAISE, 6),
    M.UD1: lambda _: HelperCall(L.HLP_RAISE, 6),
    M.SYSRET: lambda _: HelperCall(L.HLP_SYSRET, 0),
    M.SYSRETQ: lambda _: HelperCall(L.HLP_SYSRET, 1),
    M.SYSEXIT: lambda _: HelperCall(L.HLP_SYSEXIT),
    M.SYSEXITQ: lambda _: HelperCall(L.HLP_SYSEXIT),
    M.JMP: lambda ins: _jmp_far(ins, L.HLP_FAR_JMP),
    M.CALL: lambda ins: _jmp_far(ins, L.HLP_FAR_CALL),
    M.RETF: _retf,
    M.MOV: _mov,
    M.POP: _pop,
    **dict.fromkeys((M.LES, M.LSS, M.LDS, M.LFS, M.LGS), _load_far),
    M.LLDT: lambda ins: _word(ins, L.HLP_LLDT),
    M.LTR: lambda ins: _word(ins, L.HLP_LTR),
    M.VERR: lambda ins: _word(ins, L.HLP_VERR),
    M.VERW: lambda ins: _word(ins, L.HLP_VERW),
    M.LMSW: lambda ins: _word(ins, L.HLP_LMSW),
    M.LAR: lambda ins: _look(ins, L.HLP_LAR),
    M.LSL: lambda ins: _look(ins, L.HLP_LSL),
    M.SLDT: lambda ins: _store_word(ins, L.HLP_SLDT),
    M.STR: lambda ins: _store_word(ins, L.HLP_STR),
    M.SMSW: lambda ins: _store_word(ins, L.HLP_SMSW),
    M.SGDT: lambda ins: _table(ins, L.HLP_SGDT),
    M.SIDT: lambda ins: _table(ins, L.HLP_SIDT),
    M.LGDT: lambda ins: _table(ins, L.HLP_LGDT),
    M.LIDT: lambda ins: _table(ins, L.HLP_LIDT),
    M.INVLPG: lambda _: HelperCall(L.HLP_INVLPG, 0, "address"),
    **dict.fromkeys((M.RDFSBASE, M.RDGSBASE, M.WRFSBASE, M.WRGSBASE), _fsgsbase),
    M.ENTER: _enter,
    M.BOUND: _bound,
    M.ARPL: _arpl,
    M.XLATB: _xlat,
    M.AAM: lambda ins: HelperCall(L.HLP_AAM, ins.immediate8),
    M.AAD: lambda ins: HelperCall(L.HLP_AAD, ins.immediate8),
    **{getattr(M, op + s): _string for op in ("MOVS", "STOS", "LODS", "SCAS", "CMPS") for s in "BWDQ"},
}


_XSAVES = {
    **dict.fromkeys((M.XSAVE, M.XSAVE64, M.XSAVEOPT, M.XSAVEOPT64), HelperCall(L.HLP_XSAVE, 0, "address")),
    **dict.fromkeys((M.XSAVEC, M.XSAVEC64), HelperCall(L.HLP_XSAVE, 1, "address")),
    **dict.fromkeys((M.XRSTOR, M.XRSTOR64), HelperCall(L.HLP_XSAVE, 2, "address")),
}


def xsave_of(ins: Instruction) -> HelperCall | None:
    """The helper that does *ins* for a guest with protection keys, when it is one of XSAVE's."""
    return _XSAVES.get(ins.mnemonic)


def helper_of(ins: Instruction, mode: int) -> HelperCall | None:
    """The helper that does *ins* in *mode*, or None when it is translated or Python's."""
    found = _TABLE.get(ins.mnemonic)
    if found is None:
        return None
    call = found(ins)
    if call is not None and ins.mnemonic == M.STI:
        return HelperCall(call.number, shadow=True)
    del mode
    return call


_FLOW = {
    M.SYSCALL, M.SYSRET, M.SYSRETQ, M.SYSENTER, M.SYSEXIT, M.SYSEXITQ, M.INT, M.INT3, M.INT1, M.INTO, M.IRET, M.IRETD,
    M.IRETQ, M.RETF, M.UD0, M.UD1, M.UD2, M.HLT, M.VMCALL, M.VMMCALL,
}  # fmt: skip


def ends_block(ins: Instruction) -> bool:
    """True if a helper's instruction sends control elsewhere, so that nothing behind it belongs to the block."""
    if ins.mnemonic in _FLOW:
        return True
    return ins.mnemonic in (M.JMP, M.CALL) and ("_PTR16" in NAMES[ins.code] or "_M16" in NAMES[ins.code])

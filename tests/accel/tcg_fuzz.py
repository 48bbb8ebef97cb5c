"""Differential fuzzing: user-level instructions on the real processor and under the translator, state against state.

``python tests/accel/tcg_fuzz.py [--bits 32] [--avx] [--count N] [--seed S] FILE...`` takes distinct encodings from the
text of ELF files; ``--corpus`` writes some of them, one a line in hexadecimal, for the test's short form.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage_tcg.cpu.vectors import GATHERS
from cardcage_tcg.translate.allowed import SHIFTS
from iced_x86 import (
    Decoder,
    Instruction,
    InstructionInfoFactory,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpCodeTableKind,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)
from tcg_encodings import WIDE, collect
from tcg_explain import explained
from tcg_guest import Guest
from tcg_host import CODE, DATA, DATA_SIZE, GENERAL, READONLY, Host, State

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Case", "Fuzzer"]

M, R, K = Mnemonic, Register, OpKind
AMD = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
NUMBER = {getattr(R, name.upper()): i for i, name in enumerate(GENERAL)}
ARITHMETIC = 0x8D5
STACK = DATA + 0x4000
AREA = range(DATA + 0x200, DATA + 0x3000)
IMAGES = {M.FXSAVE, M.FXSAVE64, M.FNSAVE, M.FNSTENV}
STRINGS = {K.MEMORY_SEG_RSI, K.MEMORY_SEG_RDI, K.MEMORY_ESRDI, K.MEMORY_SEG_ESI, K.MEMORY_SEG_EDI, K.MEMORY_ESEDI} | {
    K.MEMORY_SEG_SI,
    K.MEMORY_SEG_DI,
    K.MEMORY_ESDI,
}
EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF)
INTERESTING = (*EDGES, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 63) - 1)
FLOATS = (
    0,
    1 << 63,
    0x3FF0000000000000,
    0x7FF0000000000000,
    0x7FF8000000000000,
    0x7FF0000000000001,
    1,
    0x40590CCCCCCCCCCD,
)
_INFO = InstructionInfoFactory()


@define
class Case:
    """One run: code, start, data."""

    code: bytes
    start: State
    memory: bytes
    bits: int
    text: str
    ignore: list[tuple[int, int]] = field(factory=list)
    undefined: int = 0


def kept(ins: Instruction) -> bool:
    """True for what leaves the flags as they were when its count is zero, undefined ones too."""
    by_cl = ins.op_count > 0 and ins.op_kind(ins.op_count - 1) == K.REGISTER
    return (ins.mnemonic in SHIFTS and by_cl) or ins.has_rep_prefix or ins.has_repne_prefix


class Fuzzer:
    """Makes cases and compares what both processors make of them."""

    def __init__(self, seed: int, *, avx: bool = False, bits: int = 64, faults: float = 0.02) -> None:
        self.random, self.faults = random.Random(seed), faults
        self.avx, self.bits = avx, bits
        self.host, self.guest = Host(), Guest(avx=avx)
        self.mask = 0xFFFFFFFFFFFFFFFF if bits == 64 else 0xFFFFFFFF
        self.runs = 0
        self.ended: Counter[str] = Counter()

    def close(self) -> None:
        self.host.close()
        self.guest.close()

    # ---- random values ----

    def value(self) -> int:
        r = self.random
        kind = r.randrange(8)
        if kind == 0:
            return r.choice(INTERESTING) & self.mask
        if kind == 1:
            return r.randrange(64)
        if kind == 2:
            return -r.randrange(1, 300) & self.mask
        return r.getrandbits(64) & self.mask

    def xstate(self) -> bytes:
        r = self.random
        out = bytearray(832)
        control = 0x37F if r.random() < 0.9 else 0x340 | r.randrange(64) | r.randrange(16) << 8
        top = r.randrange(8)
        tags = r.choice((0, 0xFF, 0xFF, r.randrange(256)))
        struct.pack_into("<HHB", out, 0, control, top << 11 | (r.randrange(64) if control & 0x3F == 0x3F else 0), tags)
        mxcsr = 0x1F80 if r.random() < 0.9 else r.randrange(0x10000) & ~0x3F
        struct.pack_into("<I", out, 24, mxcsr)
        for i in range(8):
            exponent = r.choice((0, 0x3FFF, 0x3FFF + r.randrange(-70, 70), 0x7FFF, r.randrange(0x8000)))
            mantissa = r.getrandbits(63) | 1 << 63 if exponent or r.random() < 0.5 else 0
            struct.pack_into("<QH", out, 32 + 16 * i, mantissa, exponent | r.randrange(2) << 15)
        for i in range(16):
            out[160 + 16 * i : 176 + 16 * i] = self._vector()
            if self.avx:
                out[576 + 16 * i : 592 + 16 * i] = self._vector()
        struct.pack_into("<Q", out, 512, 7 if self.avx else 3)
        return bytes(out)

    def _vector(self) -> bytes:
        r = self.random
        kind = r.randrange(4)
        if kind == 0:
            return struct.pack("<QQ", r.choice(FLOATS), r.choice(FLOATS))
        if kind == 1:
            return struct.pack("<dd", r.uniform(-1e6, 1e6), r.uniform(-3, 3))
        if kind == 2:
            return struct.pack("<ffff", *(r.uniform(-1e5, 1e5) for _ in range(4)))
        return r.randbytes(16)

    # ---- cases ----

    def case(self, raws: list[bytes]) -> Case | None:
        """A case that runs *raws* one after the other; None where their addresses cannot be arranged."""
        r = self.random
        general = [self.value() for _ in range(16)]
        self.base = DATA if self.bits == 16 else 0  # of the data segment
        general[4] = STACK + 0x400 + r.choice((0, 0, 0, r.randrange(64))) - self.base
        state = State(general, 0 if self.bits == 16 else CODE, 0x202 | r.getrandbits(12) & ARITHMETIC, self.xstate())
        if r.random() < 0.05:
            state.flags |= 0x40000  # AC
        if r.random() < 0.1:
            state.fs, state.gs = r.getrandbits(20), r.getrandbits(24)
        if r.random() < 0.1:
            state.rip += 0x1000 - r.randrange(1, 20)
        memory = bytearray(r.randbytes(DATA_SIZE))
        case = Case(b"", state, b"", self.bits, "")
        written: set[int] = set()
        fixed: set[int] = set()
        out = bytearray()
        for raw in raws:
            skip = len(raws) > 1 and r.random() < 0.3 and not case.undefined
            rip = state.rip + len(out) + 2 * skip
            ins = Decoder(self.bits, raw, ip=rip).decode()
            ready = self._arrange(ins, bytearray(raw), state, written, fixed, memory, case)
            if ready is None:
                return None
            if skip:  # a jump over it, on any condition
                jumps = (*range(0x70, 0x80), 0xEB, *((0xE0, 0xE1, 0xE2, 0xE3) if 1 not in fixed else ()))
                out += bytes((r.choice(jumps), len(ready)))
                case.text += ("; " if case.text else "") + f"jump {out[-2]:#x} over"
                if out[-2] in (0xE0, 0xE1, 0xE2):
                    written.add(1)
            out += ready
            if ins.rflags_read & case.undefined:
                return None
            sure = 0 if kept(ins) else ins.rflags_written | ins.rflags_cleared | ins.rflags_set
            case.undefined = case.undefined & ~sure | ins.rflags_undefined
            if ins.mnemonic in (M.RCL, M.RCR) and ins.op1_kind == K.IMMEDIATE8 and ins.immediate8 & 31 > 1:
                case.undefined |= RflagsBits.OF  # iced has it unchanged by a whole turn; SDM vol. 2, RCL: undefined
            for one in _INFO.info(ins).used_registers():
                full = NUMBER.get(RegisterExt.full_register(one.register))
                if full is not None and one.access not in (OpAccess.READ, OpAccess.COND_READ):
                    written.add(full)
            case.text += ("; " if case.text else "") + f"{ins}"
        case.code = bytes(out) + b"\x0f\x0b"
        case.memory = bytes(memory)
        return case

    def _target(self, size: int) -> int:
        r = self.random
        if r.random() < self.faults:
            return self._forbidden(size)
        kind = r.random()
        if kind < 0.15 and size > 1:
            return DATA + 0x1000 * r.randrange(1, 3) - r.randrange(1, size)
        return r.choice(AREA) & ~(
            63 if size > 8 and kind < 0.9 else size - 1 if size in (2, 4, 8) and kind < 0.8 else 0
        )

    def _forbidden(self, size: int) -> int:
        """Into nothing, what can only be read, or no address at all; also with the second page only."""
        r = self.random
        at = r.choice((DATA + DATA_SIZE, DATA + DATA_SIZE, DATA + READONLY, DATA + READONLY + 0x1000))
        if self.bits == 64 and r.random() < 0.3:
            at = r.choice((1 << 47, 1 << 62, 1 << 63, (1 << 64) - (1 << 47), 1 << 61, 0xDEAD << 48))
        return at - r.randrange(max(size, 1) + 1) & 0xFFFFFFFFFFFFFFFF

    def _arrange(
        self,
        ins: Instruction,
        raw: bytearray,
        state: State,
        written: set[int],
        fixed: set[int],
        memory: bytearray,
        case: Case,
    ) -> bytes | None:
        """Set registers, or the displacement, so that the instruction reaches data; its bytes."""
        r, general = self.random, state.general

        def put(number: int, value: int) -> bool:
            if number in written or (number in fixed and general[number] != value & self.mask):
                return False
            general[number] = value & self.mask
            fixed.add(number)
            return True

        kinds = [ins.op_kind(i) for i in range(ins.op_count)]
        if (
            AMD
            and K.MEMORY not in kinds
            and ins.op_code().op_code == 0x0D
            and ins.op_code().table == OpCodeTableKind.T0F
        ):
            return None  # processors of AMD know no register form, where Intel's are hints (SDM vol. 2, table A-3)
        if any(kind in STRINGS for kind in kinds):
            state.flags |= r.choice((0, 0x400)) if ins.is_string_instruction and not written else 0
            count = r.choice((0, 1, 2, 3, 5, 9, 200, 300)) if ins.has_rep_prefix or ins.has_repne_prefix else general[1]
            for number in (6, 7):
                if not put(number, self._target(16) - self.base):
                    return None
            return bytes(raw) if put(1, count) else None
        if ins.mnemonic == M.XLATB:
            return bytes(raw) if put(3, r.choice(AREA) - self.base) else None
        if ins.mnemonic == M.ENTER:
            # whether the look at the new top of the stack is aligned (#AC) no manual says; AMD's processors ask for it
            state.flags &= ~0x40000
        if ins.mnemonic in (M.LEAVE, M.ENTER):
            return bytes(raw) if put(5, STACK + 0x200 + 8 * r.randrange(16) - self.base) else None
        if K.MEMORY not in kinds or ins.mnemonic in (M.LEA, M.NOP):
            return bytes(raw)
        size = MemorySizeInfo(ins.memory_size).size or 512
        size = 512 if ins.mnemonic in (M.FXSAVE, M.FXSAVE64, M.FXRSTOR, M.FXRSTOR64) else size
        if size >= 16 or ins.is_vsib:
            # whether a misaligned one raises #AC is the processor's to choose (Intel SDM vol. 2, tables 2-21 and 2-27)
            state.flags &= ~0x40000
        target = self._target(size) - self.base
        if ins.memory_segment in (R.FS, R.GS):
            if self.bits != 64:
                return None
            target -= state.fs if ins.memory_segment == R.FS else state.gs
        base, index = (
            NUMBER.get(RegisterExt.full_register(ins.memory_base)),
            NUMBER.get(RegisterExt.full_register(ins.memory_index)),
        )
        if ins.is_vsib:
            return bytes(raw) if self._gather(ins, base, target, state, put) else None
        if 2 in (RegisterExt.size(ins.memory_base), RegisterExt.size(ins.memory_index)):
            return bytes(raw) if self.bits == 16 and self._short(ins, base, index, target, put, case) else None
        if ins.mnemonic in (M.BT, M.BTS, M.BTR, M.BTC) and ins.op1_kind == K.REGISTER:
            bit = NUMBER[RegisterExt.full_register(ins.op1_register)]
            if bit in (base, index, 4) or not put(bit, r.randrange(-4000, 4000)):
                return None
        disp = ins.memory_displacement
        if base is None and index is None:
            if ins.is_ip_rel_memory_operand:
                disp, target = 0, target - (ins.next_ip if self.bits == 64 else 0)
            at = Decoder(self.bits, bytes(raw), ip=ins.ip)
            where = at.get_constant_offsets(at.decode())
            width = where.displacement_size
            if width not in (2, 4) or not -1 << 31 <= target < 1 << 32:
                return None
            part = struct.pack("<I", target & 0xFFFFFFFF)[:width]
            raw[where.displacement_offset : where.displacement_offset + width] = part
            target += ins.next_ip if ins.is_ip_rel_memory_operand else 0
        elif index is None:
            assert base is not None
            if base == 4 and not self._stack_operand(disp, size):
                return None
            if base != 4 and not put(base, target - disp):
                return None
            target = general[base] + disp
        elif base is None or base == index:
            scale = ins.memory_index_scale + (base is not None)
            target -= (target - disp) % scale
            if not put(index, (target - disp) // scale % (1 << 40)):
                return None
        else:
            step = general[index] if index in fixed | written else r.choice((0, 1, 2, r.randrange(64)))
            if (
                base == 4
                or index in written
                or not put(index, step)
                or not put(base, target - disp - step * ins.memory_index_scale)
            ):
                return None
        if ins.mnemonic in IMAGES:
            offset = (target + self.base - DATA) & self.mask
            case.ignore.append((offset, offset + 32))
            if self.bits != 64:  # XMM8 to XMM15 go to reserved bytes
                case.ignore.append((offset + 288, offset + 416))
        if ins.mnemonic in (M.CMPXCHG, M.CMPXCHG8B, M.CMPXCHG16B) and r.random() < 0.5:
            self._expect(ins, target, size, general, memory, written | fixed)
        return bytes(raw)

    def _short(
        self,
        ins: Instruction,
        base: int | None,
        index: int | None,
        target: int,
        put: Callable[[int, int], bool],
        case: Case,
    ) -> bool:
        """16-bit addressing: upper halves do not count."""
        r = self.random
        if ins.mnemonic in IMAGES:
            case.ignore += [(target, target + 32), (target + 288, target + 416)]
        if base is None or index is None:
            only = index if base is None else base
            return only is not None and put(only, (target - ins.memory_displacement) & 0xFFFF | r.getrandbits(16) << 16)
        step = r.getrandbits(16)
        rest = (target - ins.memory_displacement - step) & 0xFFFF
        return put(index, step | r.getrandbits(16) << 16) and put(base, rest | r.getrandbits(16) << 16)

    def _gather(
        self, ins: Instruction, base: int | None, target: int, state: State, put: Callable[[int, int], bool]
    ) -> bool:
        """Small indices from the base register, in 4 or 8 bytes, both ways."""
        if base is None or not put(base, target - ins.memory_displacement):
            return False
        image, number = bytearray(state.xstate), RegisterExt.number(ins.memory_index)
        layout, count = ("<i", 8) if ins.is_vsib32 else ("<q", 4)
        size = struct.calcsize(layout)
        for i in range(count):
            at = i * size
            at += 160 + 16 * number if at < 16 else 560 + 16 * number
            struct.pack_into(layout, image, at, self.random.randrange(-64, 256))
        state.xstate = bytes(image)
        return True

    def _stack_operand(self, disp: int, size: int) -> bool:
        signed = disp - (1 << 64) if disp >> 63 else disp - (1 << 32) if self.bits != 64 and disp >> 31 else disp
        return -0x300 <= signed <= 0x1000 - size

    def _expect(
        self, ins: Instruction, target: int, size: int, general: list[int], memory: bytearray, busy: set[int]
    ) -> None:
        """Make a compare-and-exchange succeed."""
        at = target + self.base - DATA
        if {0, 2} & busy or not 0 <= at <= DATA_SIZE - 16:
            return
        if ins.mnemonic == M.CMPXCHG:
            general[0] = general[0] & ~((1 << 8 * size) - 1) | int.from_bytes(memory[at : at + size], "little")
        else:
            half = size // 2
            general[0] = int.from_bytes(memory[at : at + half], "little")
            general[2] = int.from_bytes(memory[at + half : at + size], "little")

    # ---- comparison ----

    def check(self, case: Case) -> str:
        """Run the case on both; what differs, or an empty string."""
        self.runs += 1
        try:
            want = self.host.run(case.code, case.start, case.memory, bits=case.bits)
        except OSError as error:
            raise AssertionError(f"{case.text} {case.code.hex()}: {error}") from error
        got = self.guest.run(case.code, case.start, case.memory, bits=case.bits)
        self.ended[want.ended] += 1
        found = self._compare(case, want, got)
        if found and (why := explained(self.bits, want, got)):
            self.ended[why] += 1
            return ""
        return found

    def _compare(self, case: Case, want: State, got: State) -> str:
        found = []
        if want.ended != got.ended:
            found.append(f"ends with {got.ended or 'nothing'}, not {want.ended or 'nothing'}")
        if want.address != got.address:
            found.append(f"page fault at {_hex(got.address)}, not {_hex(want.address)}")
        if want.rip != got.rip:
            found.append(f"rip {got.rip:#x}, not {want.rip:#x}")
        count = 16 if case.bits == 64 else 8
        for name, a, b in zip(GENERAL[:count], got.general, want.general, strict=False):
            if (a ^ b) & self.mask:
                found.append(f"{name} {a & self.mask:#x}, not {b & self.mask:#x}")
        mask = 0x400 if want.ended else (ARITHMETIC | 0x40400) & ~_flags(case.undefined)
        if (want.flags ^ got.flags) & mask:
            found.append(f"flags {got.flags & mask:#x}, not {want.flags & mask:#x}")
        end = 832 if self.avx else 416
        mine, real = (_masks_as_signs(case, one.xstate) for one in (got, want))
        if mine[:512] != real[:512] or (self.avx and mine[576:end] != real[576:end]):
            at = next(i for i in range(end) if mine[i] != real[i] and not 512 <= i < 576)
            found.append(f"FPU state at {at}: {mine[at : at + 16].hex()}, not {real[at : at + 16].hex()}")
        x, y = bytearray(got.memory), bytearray(want.memory)
        for low, high in case.ignore:
            x[low:high] = y[low:high]
        if x != y:
            at = next(i for i in range(len(x)) if x[i] != y[i])
            found.append(f"memory at {DATA + at:#x}: {x[at : at + 16].hex()}, not {y[at : at + 16].hex()}")
        return "; ".join(found)

    def explain(self, case: Case, difference: str) -> str:
        """A report of a case that differs."""
        start = " ".join(f"{name}={value:#x}" for name, value in zip(GENERAL, case.start.general, strict=True))
        where = f"{case.text}  [{case.code[:-2].hex()}] at {case.start.rip:#x}"
        return f"{where}: {difference}\n    {start} flags={case.start.flags:#x}"


def _masks_as_signs(case: Case, image: bytes) -> bytes:
    """An XSAVE image whose gathers' masks have only their elements' signs: what else of an element that a fault left
    there stays is the processor's to choose (Intel SDM vol. 2, VPGATHERDD, makes it all ones; AMD's leave it)."""
    out = bytearray(image)
    for ins in Decoder(case.bits, case.code, ip=case.start.rip):
        if ins.mnemonic in GATHERS:
            width, number = GATHERS[ins.mnemonic][0], RegisterExt.number(ins.op2_register)
            for low in (160 + 16 * number, 576 + 16 * number):
                for at in range(low, low + 16, width):
                    out[at : at + width] = (b"\xff" if out[at + width - 1] >> 7 else b"\0") * width
    return bytes(out)


def _hex(value: int | None) -> str:
    return "none" if value is None else f"{value:#x}"


def _flags(iced: int) -> int:
    """EFLAGS bits of iced's flags."""
    names = (("CF", 1), ("PF", 4), ("AF", 16), ("ZF", 64), ("SF", 128), ("OF", 0x800))
    return sum(bit for name, bit in names if iced & getattr(RflagsBits, name))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare the translator with the real processor, instruction by instruction."
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--bits", type=int, default=64, choices=(16, 32, 64))
    parser.add_argument("--avx", action="store_true")
    parser.add_argument("--only-avx", action="store_true")
    parser.add_argument("--mutate", type=int, default=1)
    parser.add_argument("--states", type=int, default=1, help="start states for each encoding")
    parser.add_argument("--count", type=int, default=0, help="at most so many encodings")
    parser.add_argument("--sequence", type=int, default=1, help="instructions in a case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=40)
    parser.add_argument("--corpus", type=Path)
    options = parser.parse_args()
    raws = collect(options.files, bits=options.bits, avx=options.avx, mutate=options.mutate, seed=options.seed)
    if options.only_avx:
        raws = [raw for raw in raws if set(Decoder(options.bits, raw).decode().cpuid_features()) & WIDE]
    chooser = random.Random(options.seed)
    chooser.shuffle(raws)
    raws = raws[: options.count or None]
    if options.corpus:
        options.corpus.write_text("".join(raw.hex() + "\n" for raw in sorted(raws)))
        return 0
    fuzzer = Fuzzer(options.seed, avx=options.avx, bits=options.bits)
    bad: Counter[str] = Counter()
    skipped = 0
    for raw in raws:
        for _ in range(options.states):
            case = fuzzer.case([raw, *(chooser.choice(raws) for _ in range(options.sequence - 1))])
            if case is None:
                skipped += 1
                continue
            difference = fuzzer.check(case)
            if difference:
                name = case.text.split()[0]
                bad[name] += 1
                if bad[name] <= 3 and sum(bad.values()) <= options.show:
                    print(fuzzer.explain(case, difference))
    print(f"{len(raws)} encodings, {fuzzer.runs} runs, {skipped} not arranged; ended {dict(fuzzer.ended)}")
    print(f"{sum(bad.values())} differ: {dict(bad.most_common(60))}")
    fuzzer.close()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

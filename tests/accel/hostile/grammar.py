"""Random guest code: pieces of some instructions, aimed at what the translator is made of."""

from __future__ import annotations

import random
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hostile.encode import Asm
from hostile.pages import HIGH, RANDOM_WINDOW
from hostile.places import (
    ALIASES,
    APIC,
    CODE,
    CODE_SIZE,
    DATA,
    DATA_SIZE,
    DEVICE,
    FRAMES,
    HOST_PORT,
    MAPS,
    PAM,
    ROM,
    SEGMENT,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostile.pages import Maps

__all__ = ["KINDS", "SPECIAL", "Grammar", "address", "special"]

HERE = Path(__file__).parent.parent
SPECIAL = (
    1 << 62,
    1 << 63,
    1 << 47,
    (1 << 64) - (1 << 47) - 0x1000,
    1 << 48,
    3 << 62,
    0xDEAD << 48,
    1 << 61,
    (1 << 63) - 1,
)
"""Not canonical: tags that tables may use for an empty entry, and edges."""


def special(r: random.Random) -> int:
    """An address that is not canonical."""
    found = r.choice(SPECIAL) + r.choice((0, 0, 8, 0x800, 0x1000, r.randrange(1 << 12), r.randrange(1 << 21)))
    if r.random() < 0.2:
        found = r.getrandbits(64)
    found &= 0xFFFFFFFFFFFFFFFF
    return found if (found >> 47) not in (0, 0x1FFFF) else 1 << 62


def address(r: random.Random, maps: Maps, bits: int) -> int:
    """A linear address that is likely to matter."""
    spot = r.randrange(15)
    edge = r.choice((0, 0, 0, -1, -2, -3, -4, -7, -8, -15, -16, -31, 1, 8, 0x40, r.randrange(4096)))
    page = r.randrange(16) << 12
    at = (
        CODE + r.randrange(CODE_SIZE), DATA + page + edge, DATA + r.randrange(DATA_SIZE), maps.ram + edge,
        DEVICE + edge, APIC + (r.randrange(64) << 4) + r.choice((0, 0, edge)), ROM + page + edge, PAM + page + edge,
        MAPS + r.randrange(0x40000), RANDOM_WINDOW + (r.randrange(512) << 12) + edge, (1 << 32) + edge,
        FRAMES + r.randrange(0x1300), DATA + (1 << r.randrange(16)), CODE + page + edge, edge,
    )[spot]  # fmt: skip
    if bits == 64:
        far = r.random()
        if far < 0.1:
            at += r.choice((HIGH, 0xFFFFFF8000000000))
        elif far < 0.2:
            at = ALIASES + r.randrange(1 << 30)
        elif far < 0.3:
            at = special(r)
        elif far < 0.35:
            at = r.choice((1 << 47, HIGH, 1 << 64)) + edge
    return at & (0xFFFFFFFFFFFFFFFF if bits == 64 else 0xFFFFFFFF)


@cache
def corpus(bits: int | str) -> list[bytes]:
    """User-level instructions of a width, or AVX."""
    return [bytes.fromhex(line) for line in (HERE / f"tcg_corpus_{bits}.txt").read_text().split()]


SYSTEM = [
    bytes.fromhex(one)
    for one in (
        "0f20c0 0f20d8 0f20e0 0f22c0 0f22d8 0f22e0 0f01f8 0f0138 0f06 0f09 0f08 0f00d0 0f00d8 0f0110 0f0118"
        " 0f0100 0f0108 0f01e0 0f01f0 0f05 0f07 480f07 0f34 0f35 480f35 0fa2 0f31 0f01f9 0f32 0f30 f4 fa fb 9c"
        " 9d 90 f390 cc cd80 cd21 cf 48cf 66cf 0fc7f0 0f01d0 0f01d1 0fae00 0fae08 0fae20 0fae28 0faef0 0fae38"
        " 9bdbe3 dbe2 0f77 0f0b 0fff 8ed8 8ed0 8ec0 8ee0 8ee8 0fa1 0fa9 17 1f 07 0fb200 c500 c400 0f21c0"
        " 0f23c0 0f21f8 0f23f8 0f23f0 0f23c8 6c 6d 6e 6f f36c f36e e4f1 e6f1 ec ee ed ef cb ca0400 48cb"
        " c8040001 c9 d7 f1 d6 0f0d00 0f18c0 f30f1ec8 0f1f00 0f02c0 0f03c0 0f00e0 0f00e8 63c0 0fc7c8 0f7800"
        " 0f7900 0f01c1 0f01d9 f30fae00 f30faec0 f30fc7f8 0f01ca 0f01cb 62 ea eb fe e3fe"
    ).split()
]


def _forms(text: str) -> list[tuple[bytes, int, bytes]]:
    """(opcode, ModRM's reg field, prefix) of ``HEX/REG`` words."""
    found = []
    for word in text.split():
        opcode, register = word.split("/")
        raw = bytes.fromhex(opcode)
        cut = raw[0] in (0x66, 0xF2, 0xF3) and len(raw) > 1
        found.append((raw[cut:], int(register), raw[:cut]))
    return found


RMW = _forms("01/0 01/7 31/1 ff/0 fe/1 0fb1/2 0fc1/3 87/1 f7/2 d3/0 d3/2 d3/4 d3/7 0fc7/1 0fab/1 8f/0 0fa5/1 10/0")
WIDE = _forms(
    "0f28/1 0f29/1 0f10/2 0f11/2 660f6f/3 f30f7f/3 660fe7/3 0f5e/1 f20f5e/1 dd/0 dd/3 db/7 df/6 0fae/0 0fae/1 0fae/2"
    " 0fae/3 dd/6 dd/4 d9/6 0f2b/1 0fc3/1 0fae/4 0fae/5 0fae/7"
)


class Grammar:
    """Makes snippets of one width.

    Args:
        r: where chance comes from.
        maps: the page tables there are.
        kinds: which pieces may be used (of ``KINDS``).
        avx: whether to use AVX instructions.
    """

    def __init__(self, r: random.Random, maps: Maps, kinds: list[str], *, avx: bool = False) -> None:
        self.r, self.maps, self.kinds, self.avx = r, maps, kinds, avx

    def snippet(self, bits: int, at: int, room: int = 240) -> bytes:
        """Code of at most *room* bytes."""
        code = Asm(bits, at)
        for _ in range(self.r.randrange(1, 9)):
            piece = Asm(bits, code.here)
            KINDS[self.r.choice(self.kinds)](self, piece)
            if len(code.out) + len(piece.out) > room:
                break
            code.raw(bytes(piece.out))
        return bytes(code.out)

    def address(self, bits: int) -> int:
        return address(self.r, self.maps, bits)

    def base(self, code: Asm) -> int:
        """A register that now holds an address."""
        base = self.r.choice((0, 1, 2, 3, 5, 6, 7, *((8, 9, 10, 13, 15) if code.bits == 64 else ())))
        code.mov(base, self.address(code.bits))
        return base

    # ---- pieces ----

    def load(self, code: Asm) -> None:
        r, base = self.r, self.base(code)
        code.mem(r.choice((b"\x8b", b"\x8a", b"\x0f\xb6", b"\x0f\xb7", b"\x3b", b"\x85")), r.randrange(4), base,
                 r.choice((0, -1, 127, 8)), prefix=r.choice((b"", b"", b"\x66", b"\x64", b"\x2e")),
                 wide=r.random() < 0.5)  # fmt: skip

    def store(self, code: Asm) -> None:
        r, base = self.r, self.base(code)
        code.mem(r.choice((b"\x89", b"\x88")), r.randrange(8), base, r.choice((0, -1, 127, 8)),
                 prefix=r.choice((b"", b"", b"\x66", b"\x65", b"\x26")), wide=r.random() < 0.5)  # fmt: skip

    def rmw(self, code: Asm) -> None:
        r, base = self.r, self.base(code)
        opcode, register, _ = r.choice(RMW)
        prefix = r.choice((b"", b"", b"\xf0", b"\x66"))
        code.mem(opcode, register, base, r.choice((0, 0, -1, 3)), prefix=prefix, wide=r.random() < 0.5)

    def absolute(self, code: Asm) -> None:
        r = self.r
        opcode, register, tail = r.choice(
            ((b"\x83", 0, b"\x01"), (b"\x8b", 0, b""), (b"\x89", 1, b""), (b"\x0f\xc1", 1, b""), (b"\xff", 6, b""),
             (b"\x0f\x10", 1, b""), (b"\x0f\x29", 1, b""), (b"\xff", 4, b""), (b"\xff", 2, b""),
             (b"\xc7", 0, b"\x90\x90\xc3\x90"))
        )  # fmt: skip
        code.absolute(opcode, register, self.address(32)).raw(tail)

    def wide(self, code: Asm) -> None:
        """SSE and x87 in memory, aligned or not."""
        r, base = self.r, self.base(code)
        opcode, register, prefix = r.choice(WIDE)
        code.mem(opcode, register, base, r.choice((0, 0, 1, 8)), prefix=prefix)

    def strings(self, code: Asm) -> None:
        r = self.r
        code.mov(6, self.address(code.bits)).mov(7, self.address(code.bits))
        code.mov(1, r.choice((0, 1, 2, 8, 100, 4096, 5000, 70000, (1 << 64) - 1 if r.random() < 0.1 else 3)))
        code.raw(r.choice((0xFC, 0xFC, 0xFD)), r.choice((b"", b"\xf3", b"\xf3", b"\xf2")))
        code.raw(r.choice((b"", b"", b"\x66", b"\x67", b"\x64")))
        if code.bits == 64 and r.random() < 0.3:
            code.raw(0x48)
        code.raw(r.choice((0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF, 0x6C, 0x6E, 0x6D, 0x6F)))

    def branch(self, code: Asm) -> None:
        """An indirect jump, call or return, anywhere."""
        r = self.r
        target = (
            self.address(code.bits)
            if r.random() < 0.5
            else CODE + (r.randrange(CODE_SIZE) & ~r.choice((0xFF, 0x7FF, 0)))
        )
        how = r.randrange(6)
        register = r.choice((0, 1, 2, 3))
        code.mov(register, target)
        if how < 2:
            code.raw(0xFF, (0xE0 if how else 0xD0) + register)
        elif how == 2:
            code.raw(0x50 + register, r.choice((b"\xc3", b"\xc2\x10\x00", b"\xcb", b"\xf3\xc3")))
        elif how == 3:
            code.mem(b"\xff", r.choice((2, 4, 3, 5, 6)), register, 0)
        elif how == 4:
            code.raw(b"\x50" * r.randrange(2), 0x68, struct.pack("<I", r.choice(list(SEGMENT.values()))))
            code.raw(0x50 + register, b"\x48" * (code.bits == 64), 0xCB)
        else:
            code.jump(CODE + (r.randrange(CODE_SIZE) & ~0xFF), r.choice((b"\xe9", b"\xe8", b"\x0f\x84", b"\x0f\x85")))

    def patch(self, code: Asm) -> None:
        """A store into code: ours, that of others, across pages, through an alias, behind the next instruction."""
        r = self.r
        target = CODE + r.randrange(CODE_SIZE)
        if r.random() < 0.3:
            target = code.here + r.randrange(40) if code.bits != 16 else CODE + r.randrange(0x100)
        if r.random() < 0.2:
            target = CODE + (r.randrange(31) << 12) + 0x1000 - r.randrange(1, 8)
        if code.bits == 64 and r.random() < 0.2:
            target += HIGH
        register, value = (
            r.choice((3, 7)),
            r.choice((0x90909090, 0x0B0F0B0F, 0xC3C3C3C3, 0xFEEBFEEB, 0xCCCCCCCC, r.getrandbits(32))),
        )
        if code.bits == 64 and r.random() < 0.4:
            value |= value << 32
        code.mov(register, target).mov(0, value)
        code.mem(
            r.choice((b"\x89", b"\x88", b"\x87", b"\x01", b"\x0f\xc1", b"\x0f\xb1")), 0, register, wide=r.random() < 0.5
        )

    def system(self, code: Asm) -> None:
        r = self.r
        code.mov(0, r.choice((self.address(code.bits), r.getrandbits(32), 0x80050033, 0x11, 1 << r.randrange(32), 0)))
        raw = r.choice(SYSTEM)
        code.raw(raw)
        if raw in (b"\x62", b"\xea"):
            code.raw(struct.pack("<IH", CODE + (r.randrange(CODE_SIZE) & ~0xFF), r.choice(list(SEGMENT.values()))))

    def control(self, code: Asm) -> None:
        """CR0, CR3 and CR4, near what they should be; INVLPG."""
        r, how = self.r, self.r.randrange(8)
        if how < 3:
            code.mov(
                0, r.choice((*self.maps.long, self.maps.pae, self.maps.narrow, r.getrandbits(32), special(r)))
            ).raw(b"\x0f\x22\xd8")
        elif how == 3:
            code.raw(b"\x0f\x20\xd8\x0f\x22\xd8")
        elif how == 4:
            code.raw(b"\x0f\x20\xe0").raw(
                0x35, struct.pack("<I", 1 << r.choice((4, 5, 7, 7, 9, 10, 11, 16, 18, 20, 21)))
            )
            code.raw(b"\x0f\x22\xe0")
        elif how == 5:
            code.raw(b"\x0f\x20\xc0").raw(0x35, struct.pack("<I", 1 << r.choice((0, 1, 2, 3, 16, 18, 31))))
            code.raw(b"\x0f\x22\xc0")
        else:
            code.mem(b"\x0f\x01", 7, self.base(code))

    def msr(self, code: Asm) -> None:
        r = self.r
        index = r.choice(
            (
                0xC0000080, 0x1B, 0x6E0, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101,
                0xC0000102, 0x174, 0x175, 0x176, 0x277, 0x10, 0x4B564D00, 0x4B564D01, 0x12, 0x11, 0x250, 0x200, 0x808,
                0x80B, 0x830, 0x800 + r.randrange(0x40), 0x832, 0x838, 0xC0000103, 0x1D9, 0xC0010000, 0x400,
                r.getrandbits(32),
            )
        )  # fmt: skip
        code.mov(1, index).mov(0, r.choice((r.getrandbits(32), 0xD01, 0x501, 0xFEE00900, 0xFEE00D00, self.address(32))))
        code.mov(2, r.choice((0, 0, 0xFFFFFFFF, 0x4000, r.getrandbits(32)))).raw(
            r.choice((b"\x0f\x30", b"\x0f\x30", b"\x0f\x32"))
        )

    def apic(self, code: Asm) -> None:
        """Writes of the local APIC: ICR (fixed, NMI, INIT, SIPI), EOI, timer, TPR."""
        r = self.r
        code.mov(3, APIC)
        for _ in range(r.randrange(1, 4)):
            offset = r.choice(
                (0x300, 0x300, 0x310, 0xB0, 0x80, 0x320, 0x380, 0x3E0, 0xF0, 0x350, 0x370, r.randrange(64) << 4)
            )
            value = r.choice(
                (
                    r.getrandbits(32), 0x4500, 0x4610, 0xC0000 | r.randrange(256), 0x4000 | r.randrange(32, 256),
                    0xC0500, 0x1FF, 0x20000 | r.randrange(32, 256), 0xC4400, 0x700, 1000, r.randrange(4) << 24,
                    0xC0600 | r.randrange(16) + 0x40,
                )
            )  # fmt: skip
            code.mov(0, value).mem(b"\x89", 0, 3, offset)

    def arithmetic(self, code: Asm) -> None:
        """Faults of the processor in translated code: division, SIMD exceptions, x87."""
        r, how = self.r, self.r.randrange(5)
        if how == 0:
            code.mov(1, r.choice((0, 1, 0xFF))).mov(2, r.choice((0, r.getrandbits(32)))).raw(
                r.choice((b"\xf7\xf1", b"\xf7\xf9", b"\xf6\xf1"))
            )
        elif how == 1:
            code.mov(3, DATA).mov(0, r.choice((0, 0x1F80, 0xFFFF, r.getrandbits(32)))).mem(b"\x89", 0, 3).mem(
                b"\x0f\xae", 2, 3
            )
            code.raw(r.choice((b"\x0f\x5e\xc1", b"\x0f\x51\xc1", b"\x66\x0f\x5a\xc1", b"\xf3\x0f\x58\xca")))
        elif how == 2:
            code.mov(3, DATA).raw(0xB8, struct.pack("<I", r.getrandbits(16))[: 4 if code.bits != 16 else 2])
            code.mem(b"\x89", 0, 3).mem(b"\xd9", 5, 3).raw(b"\xd9\xee\xd9\xee\xde\xf9\x9b")
        elif how == 3:
            code.raw(r.choice((b"\xd4\x00", b"\xce", b"\xd5\x10", b"\x27")))
        else:
            code.mov(3, DATA + r.randrange(1, 16)).mem(b"\x0f\x28", 1, 3)

    def flags(self, code: Asm) -> None:
        """TF, AC, NT, IF, DF, IOPL, VM by POPF, then whatever comes."""
        value = self.r.choice((0x102, 0x302, 0x40202, 0x4202, 0x3202, 0x602, 0x20202, 0x10202, self.r.getrandbits(22)))
        code.mov(0, value).raw(b"\x50", b"\x66" * (code.bits == 16), b"\x9d")

    def debug(self, code: Asm) -> None:
        code.mov(0, self.address(code.bits)).raw(0x0F, 0x23, 0xC0 | self.r.randrange(4) << 3)
        code.mov(0, self.r.getrandbits(32) if self.r.random() < 0.3 else 0x400 | 0x101 << self.r.randrange(4))
        code.raw(b"\x0f\x23\xf8")

    def far(self, code: Asm) -> None:
        """Far jumps and calls, gates, task switches, IRET with what the stack has."""
        r = self.r
        selector = r.choice((*SEGMENT.values(), r.getrandbits(16), SEGMENT["tss"] + 16 * r.randrange(4)))
        target = CODE + (r.randrange(CODE_SIZE) & ~0xFF)
        how = r.randrange(4)
        if how == 0 and code.bits != 64:
            size = "<I" if code.bits == 32 else "<H"
            code.raw(
                r.choice((0xEA, 0x9A)),
                struct.pack(size, target & (0xFFFFFFFF if code.bits == 32 else 0xFFFF)),
                struct.pack("<H", selector),
            )
        elif how == 1:
            code.mov(3, DATA + 0x100).mov(0, target).mem(b"\x89", 0, 3).mov(0, selector).mem(b"\x89", 0, 3, 4)
            code.mem(b"\xff", r.choice((3, 5)), 3)
        elif how == 2:
            code.mov(0, selector).raw(0x8E, 0xC0 | r.choice((0, 2, 3, 4, 5)) << 3)
        else:
            for value in (
                r.choice((0x10, 0x2B, selector)),
                DATA + 0x800,
                r.getrandbits(22),
                r.choice(list(SEGMENT.values())),
                target,
            ):
                code.mov(0, value).raw(0x50)
            code.raw(r.choice((b"\xcf", b"\x48\xcf")) if code.bits == 64 else b"\xcf")

    def host(self, code: Asm) -> None:
        """Ask the machine to act (slots, memory, interrupts) in the midst of an instruction."""
        code.mov(0, self.r.getrandbits(8)).raw(0xE7, HOST_PORT)

    def loop(self, code: Asm) -> None:
        code.mov(1, self.r.choice((2, 30, 1000)))
        start = code.here
        self.r.choice((Grammar.load, Grammar.store, Grammar.rmw, Grammar.arithmetic))(self, code)
        code.back(start, 0xE2)

    def library(self, code: Asm) -> None:
        """An instruction of real programs, its registers pointing somewhere."""
        for _ in range(2):
            self.base(code)
        code.raw(self.r.choice(corpus("avx" if self.avx and code.bits == 64 and self.r.random() < 0.5 else code.bits)))

    def noise(self, code: Asm) -> None:
        code.raw(self.r.randbytes(self.r.randrange(1, 12)))

    def stack(self, code: Asm) -> None:
        """A stack pointer that points anywhere, and pushes, pops, calls, ENTER on it."""
        r = self.r
        code.mov(4, self.address(code.bits))
        code.raw(
            r.choice(
                (
                    b"\x50",
                    b"\x58",
                    b"\x9c",
                    b"\xc8\x10\x00\x03",
                    b"\xc9",
                    b"\x60",
                    b"\x61",
                    b"\xe8\x00\x00\x00\x00",
                    b"\x6a\xff",
                )
            )
        )
        code.mov(4, DATA + 0x8000)


KINDS: dict[str, Callable[[Grammar, Asm], None]] = {
    name: getattr(Grammar, name)
    for name in (
        "load store rmw absolute wide strings branch patch system control msr apic arithmetic flags debug far host loop"
        " library noise stack"
    ).split()
}

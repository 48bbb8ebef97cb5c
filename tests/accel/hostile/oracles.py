"""Code that tells by itself when the processor is wrong: it ends with OUT to ORACLE_PORT where no processor gets.

Single oracles must fault before they reach that; the roles are programs that loop until the machine stops.
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

from attrs import define, field

from hostile.encode import Asm
from hostile.grammar import special
from hostile.places import ALIASES, BIG, CODE, DATA, DEVICE, HOST_PORT, ORACLE_PORT, OWN

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FOLLOWS", "ROLES", "Role", "must_fault", "sled"]

RET_PAD = CODE + 0x800
"""A RET at an address whose place in the jump cache is the first: what an empty entry would lead to."""


def must_fault(r: random.Random, at: int, token: int) -> bytes:
    """64-bit code that touches an address that is not canonical, whatever the page tables are."""
    code = Asm(64, at)
    bad = special(r)
    if r.random() < 0.5:  # fill the tables, then empty them
        code.mov(3, r.choice((BIG, 0x400000, CODE, DATA))).mem(b"\x8b", 1, 3).mem(b"\x89", 1, 3)
        if r.random() < 0.7:
            code.jump(RET_PAD, b"\xe8").mov(1, RET_PAD).raw(b"\xff\xd1")
        code.raw(r.choice((b"\x0f\x20\xd8\x0f\x22\xd8", b"\x0f\x01\x3b", b"")))
    code.raw(0x49, 0xBB, struct.pack("<I", token), b"\x0f\x0b\x0f\x0b")  # narrower code ends here
    code.mov(3, bad).raw(b"\x44\x89\xd8")
    how = r.randrange(10)
    if how < 3:
        code.raw(
            r.choice(
                (
                    b"\x8b\x0b",
                    b"\x01\x0b",
                    b"\x0f\x28\x0b",
                    b"\x89\x0b",
                    b"\x48\x0f\xb1\x0b",
                    b"\xff\x33",
                    b"\xf0\x0f\xc1\x0b",
                )
            )
        )
    elif how < 5:
        code.raw(b"\x48\x89\xde\x48\x89\xdf\xb9\x01\x00\x00\x00")
        code.raw(r.choice((b"\xf3\xaa", b"\xa5", b"\xae", b"\xf3\xa4", b"\x48\xab", b"\x89\xde\xaf")))
    elif how < 7:
        code.raw(b"\xff\xd3")
    elif how < 8:
        code.raw(b"\x48\x8d\x0d\x03\x00\x00\x00\x51\x53\xc3")  # RET to it, above the way on
    elif how < 9:
        code.raw(b"\x48\x8d\x0d\x03\x00\x00\x00\x51\xff\xe3")
    else:
        code.mov(1, DATA + 0xF00).raw(b"\x48\x89\x19\xff\x11")  # CALL [mem]
    code.raw(b"\x44\x89\xd8", 0xE7, ORACLE_PORT)
    return bytes(code.out)


def sled(r: random.Random, bits: int) -> bytes:
    """Constants that are, as host code, exit_group(77): what a stale address into the code buffer would run."""
    out = bytearray()
    if bits == 64:
        for part in [b"\x90\x90\x90\x90\x90\x90\xeb\x02"] * r.randrange(20, 55) + [
            b"\xbf\x4d\0\0\0\x90\xeb\x02", b"\xb8\xe7\0\0\0\x90\xeb\x02", b"\x0f\x05\xcc\xcc\xcc\xcc\xeb\x02",
        ]:  # fmt: skip
            out += b"\x48\xb8" + part
    else:
        for part in [b"\x90\x90\xeb\x01"] * r.randrange(20, 50) + [
            b"\x6a\x4d\xeb\x01", b"\x5f\x90\xeb\x01", b"\x31\xc0\xeb\x01", b"\xb0\xe7\xeb\x01", b"\x0f\x05\xeb\x01",
        ]:  # fmt: skip
            out += (b"\x66\xb8" if bits == 16 else b"\xb8") + part
    return bytes(out + b"\xc3")


@define
class Role:
    """Programs by address, and where a vCPU starts in 64-bit code, of ring 0 or of ring 3."""

    start: int
    code: dict[int, bytes] = field(factory=dict)
    user: bool = False


def _own(cpu: int) -> int:
    return OWN + 0x8000 * cpu


def _oracle(code: Asm, token: int) -> None:
    """The value that was wrong goes to R15."""
    code.raw(b"\x41\x89\xc7", 0xB8, struct.pack("<I", token), 0xE7, ORACLE_PORT)


TARGET, SEQUENCE = OWN + 0x1000, OWN + 0x3000
"""What the patcher patches (MOV EAX, imm32 at an aligned imm32), and how often it did: the first vCPU's pages."""


def patched(r: random.Random, cpu: int, token: int) -> Role:
    """Calls code that another processor patches: after it serializes, the code is at least as new as the sequence."""
    target = TARGET
    filler = b"".join(b"\xba" + struct.pack("<I", i) for i in range(r.choice((0, 3, 50))))
    body = b"\x90\x90\x90\xb8\0\0\0\0" + filler + b"\xc3"
    code = Asm(64, _own(cpu))
    code.mov(4, DATA + 0x8000)
    if r.random() < 0.8:  # another block on the page, which stays
        code.jump(target + 0x800, b"\xe8")
    code.mov(5, target).mov(3, SEQUENCE)
    loop = code.here
    if r.random() < 0.8:
        code.mem(b"\xc6", 0, 5).raw(0x90)  # so that it is translated anew
    code.raw(b"\xff\xd5").mem(b"\x8b", 6, 3)
    code.raw(
        r.choice(
            (b"\x31\xc0\x0f\xa2", b"\x31\xc0\x0f\xa2", b"\x0f\x20\xd8\x0f\x22\xd8", b"\x0f\xae\xf0\x31\xc0\x0f\xa2")
        )
    )
    code.mov(5, target).mov(3, SEQUENCE).raw(b"\xff\xd5\x39\xf0\x73\x0a")  # CMP EAX, ESI; JAE
    _oracle(code, token)
    code.back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out), target: body, target + 0x800: b"\xc3"})


def patcher(r: random.Random, cpu: int, token: int) -> Role:
    """Writes the constant, then the sequence."""
    code = Asm(64, _own(cpu))
    code.mov(6, 0).mov(5, TARGET).mov(3, SEQUENCE)
    loop = code.here
    code.raw(b"\xff\xc6").mem(b"\x89", 6, 5, 4).mem(b"\x89", 6, 3)
    code.mov(1, r.choice((10, 1000, 20000, 100000)))
    code.raw(b"\xf3\x90\xff\xc9\x75\xfa").back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out)})


def selfpatch(r: random.Random, cpu: int, token: int) -> Role:
    """Patches its own code, by any width and alignment, then calls it: it sees what it wrote."""
    own = _own(cpu)
    where = own + 0x2000 - r.choice((2, 3, 4, 5, 0x40, 0x800)) + r.choice((0, 0, 0x1000))
    code = Asm(64, own)
    code.mov(4, DATA + 0x8000 + 0x100 * cpu).mov(6, 0).mov(5, where)
    loop = code.here
    code.raw(b"\xff\xc6")
    how = r.randrange(4)
    if how == 0:
        code.mem(b"\x89", 6, 5, 1)
    elif how == 1:
        code.raw(b"\x89\xf0").mem(b"\x87", 0, 5, 1)
    elif how == 2:
        code.mem(b"\xff", 0, 5, 1)
    else:
        code.mov(7, own + 0x5000).mem(b"\x89", 6, 7).raw(b"\x56").mov(6, own + 0x5000).mov(7, where + 1).mov(1, 4)
        code.raw(b"\xf3\xa4\x5e")
    code.raw(b"\xff\xd5\x39\xf0\x74\x0a")
    _oracle(code, token)
    code.back(loop)
    return Role(own, {own: bytes(code.out), where: b"\xb8\0\0\0\0\x90\x90\xc3"})


FAULTING = OWN + 0x1000


def faulter(r: random.Random, cpu: int, token: int) -> Role:
    """Faults in a block whose bytes another processor changes: its handler's frames lead back here."""
    fault = r.choice((b"\xf7\xf1", b"\x0f\x28\x0d\x01\x00\x00\x00", b"\xf7\xf9", b"\x48\xf7\xf1"))
    body = b"\x31\xd2\x31\xc9\xb8\x01\0\0\0" + b"\x90" * 6 + fault + b"\x90" * 8 + b"\xc3"
    code = Asm(64, _own(cpu))
    code.mov(4, DATA + 0x8000 + 0x100 * cpu)
    loop = code.here
    code.jump(FAULTING, b"\xe8").back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out), FAULTING: body})


def flipper(r: random.Random, cpu: int, token: int) -> Role:
    """Changes the faulting block to and fro."""
    code = Asm(64, _own(cpu))
    code.mov(3, FAULTING)
    loop = code.here
    for value, at, wide in r.choice(
        (
            (
                (b"\x90", 11, False),
                (b"\x31\xc0", 10, True),
                (b"\x66", 9, False),
                (b"\x90", 9, False),
                (b"\x90\x90", 10, True),
            ),
            ((b"\xeb\x0e", 9, True), (b"\x90\x90", 9, True)),
            ((b"\xc3", 9, False), (b"\x90", 9, False), (b"\x48\xb8", 11, True), (b"\x90\x90", 11, True)),
        )
    ):
        if wide:
            code.mem(b"\xc7", 0, 3, at, prefix=b"\x66").raw(value)
        else:
            code.mem(b"\xc6", 0, 3, at).raw(value)
        code.raw(b"\xf3\x90" * r.randrange(3))
    code.back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out)})


def reader(r: random.Random, cpu: int, token: int) -> Role:
    """Reads and writes a device; registers keep what they held."""
    code = Asm(64, _own(cpu))
    marks = {13: r.getrandbits(64), 14: r.getrandbits(64), 15: r.getrandbits(64), 10: r.getrandbits(63)}
    for register, mark in marks.items():
        code.mov(register, mark)
    code.mov(3, DEVICE + 0xF0).mov(4, DATA + 0x8000 + 0x100 * cpu)
    loop = code.here
    for _ in range(r.randrange(1, 7)):
        code.mem(*r.choice(((b"\x8b", 0), (b"\x89", 0), (b"\x01", 0), (b"\x8b", 0), (b"\x0f\x10", 1), (b"\xff", 0))), 3)
    for register, mark in marks.items():
        code.mov(2, mark).raw(0x4C, 0x39, 0xC2 | (register & 7) << 3, 0x74, 0x0A)  # CMP RDX, R; JE
        _oracle(code, token)
    code.back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out)})


VISITED = OWN + 0x1000
"""A function that the sharer patches, 64 bytes into its page, while the visitor has it translated."""


def sharer(r: random.Random, cpu: int, token: int) -> Role:
    """Patches a function by a store that shares its look-up with one before a device's answer, then calls it."""
    code = Asm(64, _own(cpu))
    code.mov(4, DATA + 0x8000).mov(6, 0).mov(5, VISITED).mov(7, VISITED + 0x40).mov(3, DEVICE + 0xF0)
    loop = code.here
    code.raw(b"\xff\xc6").mem(b"\xc6", 0, 7).raw(0xB8)  # the page holds no code now
    code.mem(b"\x89", 6, 5, r.choice((0, 8, 0x28)))
    for _ in range(r.randrange(1, 4)):
        code.mem(b"\x8b", 0, 3)
    code.mem(b"\x89", 6, 5, 0x41).raw(b"\xff\xd7\x39\xf0\x74\x0a")  # CALL RDI; CMP EAX, ESI; JE
    _oracle(code, token)
    code.back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out), VISITED + 0x40: b"\xb8\0\0\0\0\xc3"})


def visitor(r: random.Random, cpu: int, token: int) -> Role:
    """Calls what the sharer patches."""
    code = Asm(64, _own(cpu))
    code.mov(4, DATA + 0x8000 + 0x100 * cpu)
    loop = code.here
    code.jump(VISITED + 0x40, b"\xe8").raw(b"\xf3\x90" * r.randrange(3)).back(loop)
    return Role(_own(cpu), {_own(cpu): bytes(code.out)})


def doubler(r: random.Random, cpu: int, token: int) -> Role:
    """A program that patches a function by one address and calls it by others: each call tells where it was made."""
    own, offset = _own(cpu), 0x100 * cpu + r.choice((0, 0x10, 0x39, 0x7F8, 0xCF3))
    code = Asm(64, own)
    code.mov(6, 0).mov(5, BIG + offset)
    loop = code.here
    code.raw(b"\xff\xc6").mem(b"\x89", 6, 5, 8)
    for _ in range(r.randrange(2, 6)):
        code.mov(3, ALIASES + offset + 4096 * r.randrange(1 << 18)).raw(b"\xff\xd3\x39\xf0\x74\x0a")
        _oracle(code, token)
        code.raw(b"\x48\x8d\x53\x07\x48\x39\xd1\x74\x0a")  # LEA RDX, [RBX+7]; CMP RCX, RDX; JE
        _oracle(code, token)
    code.jump(loop)
    body = b"\x48\x8d\x0d\0\0\0\0\xb8\0\0\0\0\xc3"  # LEA RCX, [RIP]; MOV EAX, imm32; RET
    return Role(own, {own: bytes(code.out), BIG + offset: body}, user=True)


def sprayer(r: random.Random, cpu: int, token: int) -> Role:
    """Runs block after block of host code in constants, and has the machine change its slots between."""
    own = _own(cpu)
    code = Asm(64, own)
    code.mov(4, DATA + 0x8000 + 0x100 * cpu)
    loop = code.here
    places = {}
    count, step = r.randrange(4, 9), r.choice((0x300, 0x340, 0x2C0))
    for i in range(count):
        places[own + 0x1000 + 0x300 * i + step % 0x40] = sled(r, 64)
    if r.random() < 0.5:
        code.raw(0xE7, HOST_PORT)
    for _ in range(r.randrange(1, 4)):
        for place in places:
            code.jump(place, b"\xe8")
    code.raw(0xE7, HOST_PORT).back(loop)
    return Role(own, {own: bytes(code.out), **places})


def storm(r: random.Random, cpu: int, token: int) -> Role:
    """Runs thousands of aliases of one page at two offsets, then stores into it."""
    own, count = _own(cpu), r.choice((8000, 40000, 50000))
    code = Asm(64, own)
    code.mov(4, DATA + 0x8000 + 0x100 * cpu)
    loop = code.here
    for offset in (0x800, 0):
        code.mov(3, ALIASES + offset).mov(1, count)
        again = code.here
        code.raw(b"\xff\xd3\x48\x81\xc3\x00\x10\x00\x00\xff\xc9").back(again, 0x75)
    code.mov(3, ALIASES + 0x800).mem(b"\xc6", 0, 3).raw(0xC3)
    code.back(loop)
    return Role(own, {own: bytes(code.out), BIG: b"\xc3" * 4096})


ROLES: dict[str, Callable[[random.Random, int, int], Role]] = {
    one.__name__: one
    for one in (patched, patcher, selfpatch, faulter, flipper, reader, sharer, visitor, doubler, sprayer, storm)
}
FOLLOWS = {"patched": "patcher", "faulter": "flipper", "sharer": "visitor"}
"""Which role the next vCPU plays."""

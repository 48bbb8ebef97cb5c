"""Programs' code does not hold its address: it is translated once, wherever it is mapped."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from cardcage_tcg import layout as L
from tcg_guest import CODE_AT, PT_CODE, Guest
from tcg_host import CODE, DATA, DATA_SIZE, XSTATE_SIZE, State

if TYPE_CHECKING:
    from collections.abc import Iterator

FUNCTION, FAR = CODE + 0x1000, 0x10000
"""A function in the second page of code, and how far behind it its page is mapped again, and once more."""
STACK = DATA + 0x2000 - 64


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    for i in (1, 2):
        made.memory.write(PT_CODE + 8 * ((0x1000 + i * FAR) >> 12), struct.pack("<Q", CODE_AT + 0x1000 | 5))
    yield made
    made.close()


def call(guest: Guest, address: int) -> State:
    """Run a function of the program, and come back with its registers."""
    start = State([0] * 16, CODE, 0x202, _clean())
    start.general[4] = STACK
    program = b"\x48\xbe" + struct.pack("<Q", address) + b"\xff\xd6\x0f\x0b"  # mov rsi, address; call rsi; ud2
    return guest.run(program, start, bytes(DATA_SIZE))


def _clean() -> bytes:
    image = bytearray(XSTATE_SIZE)
    struct.pack_into("<H", image, 0, 0x37F)
    struct.pack_into("<I", image, 24, 0x1F80)
    return bytes(image)


def blocks(guest: Guest) -> int:
    """How many were made."""
    return guest.vm._q[L.VM_STAT // 8 + 1]


WHERE = b"\x48\x8d\x05\0\0\0\0\xe8\0\0\0\0\x59\x48\x8b\x15\0\0\0\0\xc3"
"""LEA RAX, [RIP]; CALL to the next one; POP RCX; MOV RDX, [RIP]; RET."""


def test_code_at_three_addresses(guest: Guest) -> None:
    """What it computes from RIP is where it is mapped, and it is translated once."""
    guest.memory.write(CODE_AT + 0x1000, WHERE)
    call(guest, FUNCTION)
    before = blocks(guest)
    for at in (FUNCTION + FAR, FUNCTION, FUNCTION + 2 * FAR):
        ended = call(guest, at)
        assert (ended.ended, ended.general[0], ended.general[1]) == ("", at + 7, at + 12)
        assert ended.general[2] == int.from_bytes(WHERE[20:], "little")
    assert blocks(guest) - before <= 6  # of the program, whose constant is another each time


@pytest.mark.parametrize(
    ("code", "signal", "offset"),
    [
        (b"\x90\x31\xc9\xf7\xf1\xc3", "SIGFPE", 3),  # div ecx
        (b"\x90\x90\x8b\x04\x25\0\0\0\0\xc3", "SIGSEGV", 2),  # mov eax, [0]
        (b"\x74\x00\x0f\x28\x04\x25\x08\0\0\x20\xc3", "SIGSEGV", 2),  # movaps xmm0, [DATA + 8]
        (b"\x90\xf4", "SIGSEGV", 1),  # hlt
        (b"\x90\x90\x90\xcc", "SIGTRAP", 4),  # int3
        (b"\x9c\x81\x0c\x24\0\x01\0\0\x9d\x90\x90", "SIGTRAP", 10),  # pushf; or [rsp], TF; popf; nop
    ],
)
def test_faults_at_three_addresses(guest: Guest, code: bytes, signal: str, offset: int) -> None:
    """An instruction faults at the address where it is mapped."""
    guest.memory.write(CODE_AT + 0x1000, code)
    for at in (FUNCTION, FUNCTION + FAR, FUNCTION + 2 * FAR, FUNCTION):
        ended = call(guest, at)
        assert (ended.ended, ended.rip) == (signal, at + offset)


def test_a_store_across_two_pages_at_three_addresses(guest: Guest) -> None:
    """What is translated for one instruction alone, and kept beside it, goes on where the instruction is mapped."""
    store = b"\x48\xb8" + b"\x11" * 8 + b"\x48\x01\x04\x25" + struct.pack("<I", DATA + 0xFFC) + WHERE  # add [], rax
    guest.memory.write(CODE_AT + 0x1000, store)
    for at in (FUNCTION, FUNCTION + FAR, FUNCTION + 2 * FAR, FUNCTION):
        ended = call(guest, at)
        assert (ended.ended, ended.general[0]) == ("", at + len(store) - len(WHERE) + 7)
        assert ended.memory[0xFFC:0x1004] == b"\x11" * 8


def test_code_that_is_written_is_new_at_all_its_addresses(guest: Guest) -> None:
    """A function that was run at three addresses runs as it was written at each of them."""
    for value in range(1, 5):
        guest.memory.write(CODE_AT + 0x1000, b"\xb8" + struct.pack("<I", value) + b"\xc3")
        for at in (FUNCTION, FUNCTION + FAR, FUNCTION + 2 * FAR, FUNCTION):
            assert call(guest, at).general[0] == value


@pytest.mark.parametrize("distance", [0x7FFFFFFF, -0x80000000, 0x7FFFF000, 0xFFB])
def test_jumps_as_far_as_there_are(guest: Guest, distance: int) -> None:
    """A direct jump to another page goes as far from each address as it says."""
    guest.memory.write(CODE_AT + 0x1000, b"\xe9" + struct.pack("<i", distance))
    for at in (FUNCTION, FUNCTION + FAR):
        ended = call(guest, at)
        assert (ended.ended, ended.rip, ended.address) == ("SIGSEGV", *[at + 5 + distance & 0xFFFFFFFFFFFFFFFF] * 2)

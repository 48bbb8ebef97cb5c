"""The soft TLB: how much it holds, and that what looks for its entries finds them all."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from cardcage_tcg import layout as L
from test_tcg_tables import CODE, DATA, PD, PDPT, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE, PAGES, ACCESSED = 0x400000, 512, 0x20
AREA = 0x200000
"""2 MiB of RAM in pages of their own."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    for i in range(PAGES):
        made.put(TABLE + 8 * i, AREA + 4096 * i | 3)
    for i in range(5):  # and by four more addresses each
        made.put(PD + 8 if i == 0 else 0x500000 + 8 * i, TABLE | 3)
    made.put(PDPT + 8, 0x500003)
    yield made
    made.close()


def touch(store: bool = False) -> bytes:
    """Read or write a byte of each of ECX pages from RBX on."""
    return (b"\x88\x03" if store else b"\x8a\x03") + b"\x48\x81\xc3\0\x10\0\0\xff\xc9\x75\xf3"


def test_four_megabytes_of_pages_stay(machine: Machine) -> None:
    """A thousand pages that were read and are read again have no walk of the page tables the second time."""
    again = b"\xbb" + struct.pack("<I", 0x40200000) + b"\xb9" + struct.pack("<I", 1024)
    # and qword [rsi], ~ACCESSED over the table, in between
    forget = b"\x48\x83\x26\xdf\x48\x83\xc6\x08\xff\xca\x75\xf4"
    machine.run(0, CODE, again + touch() + forget + again + touch(), rsi=TABLE, rdx=PAGES)
    entries = struct.unpack(f"<{PAGES}Q", machine.memory.read(TABLE, 8 * PAGES))
    assert sum(bool(one & ACCESSED) for one in entries) < 8


def test_every_alias_of_a_page_that_becomes_code(machine: Machine) -> None:
    """A page that begins to hold code is written unseen by none of the addresses by which it was written before."""
    for i in range(PAGES):
        machine.put(TABLE + 8 * i, DATA | 3)
    machine.memory.write(DATA, b"\xb8\0\0\0\0\xc3")  # mov eax, 0; ret
    begin = b"\xbb" + struct.pack("<I", 0x40200001) + b"\xb9" + struct.pack("<I", 4 * PAGES) + b"\xb0\0"
    # inc byte [rbx]; call rdx; add edi, eax; add rbx, 4096; dec ecx; jnz
    change = b"\xfe\x03\xff\xd2\x01\xc7\x48\x81\xc3\0\x10\0\0\xff\xc9\x75\xef"
    cpu = machine.run(0, CODE, begin + touch(store=True) + b"\xff\xd2" + begin + change, rdx=DATA, rdi=0)
    assert cpu.get_state().registers.rdi == sum(i % 256 for i in range(1, 4 * PAGES + 1))


@pytest.mark.parametrize("store", [False, True])
def test_invlpg_among_many_large_pages(machine: Machine, store: bool) -> None:
    """INVLPG in one large page drops each of its pieces, whatever other large pages the TLB holds."""
    machine.put(PDPT + 8, 0x500003)
    for i in range(4, 8):
        machine.put(0x500000 + 8 * i, 0x200083)
    high = 0x40000000 + (4 << 21)
    begin = b"\xbb" + struct.pack("<I", high) + b"\xb9" + struct.pack("<I", 4 * 512)
    remap = b"\x48\xc7\x04\x25" + struct.pack("<II", 0x500000 + 8 * 5, 0x600083)  # mov qword [entry], ...
    invlpg = b"\x0f\x01\x3c\x25" + struct.pack("<I", high + (1 << 21) + 0x5000)
    end = b"\xbb" + struct.pack("<I", high + (1 << 21)) + b"\xb9" + struct.pack("<I", 512) + b"\xb0\x5a"
    machine.run(0, CODE, begin + touch(store=store) + remap + invlpg + end + touch(store=True))
    assert all(machine.memory.read(0x600000 + 4096 * i, 1) == b"\x5a" for i in range(512))
    assert all(machine.memory.read(0x200000 + 4096 * i, 1) == b"\0" for i in range(512))


def test_jumps_to_addresses_that_agree_in_their_low_bits(machine: Machine) -> None:
    """A thousand functions of 2 KiB that are called in turn stay in the jump cache, and so need no look-up."""
    for at in range(0, PAGES * 4096, 2048):
        machine.memory.write(AREA + at, b"\xc3")
    # call rbx; add rbx, 2048; dec ecx; jnz
    calls = b"\xbb" + struct.pack("<I", AREA) + b"\xb9" + struct.pack("<I", 2 * PAGES)
    calls += b"\xff\xd3\x48\x81\xc3\0\x08\0\0\xff\xc9\x75\xf3"
    cpu = machine.run(0, CODE, calls)
    held = struct.unpack_from(f"<{2 * L.JC_SIZE}Q", cpu.raw, L.JC)[::2]
    assert sum(AREA <= one < AREA + PAGES * 4096 for one in held) > 2 * PAGES * 9 // 10

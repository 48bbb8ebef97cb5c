"""INVLPG at one address of a large page drops the whole of it: code, reads and writes by another go where it is now."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest
from cardcage.memory import RamBlock, RamRange
from cardcage.vcpu import Exit
from cardcage.x86 import Segment
from test_tcg_tables import CODE, PD, PDPT, PML4, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

SEEN, TABLE, MOVED, MIDDLE, PAGE = 0x9000, 0x500000, 1 << 30, 2 << 20, 0x40000000
"""What the guest found, a table of smaller pages, where the page moves, its middle or end, its linear address."""
PSE, PAE, PGE, GLOBAL, LARGE = 0x10, 0x20, 0x80, 0x100, 0x83


class Kind(NamedTuple):
    """A large page: its entry, how much of it is used, and the tables and registers that map it and CODE."""

    entry: int
    size: int
    tables: dict[int, int]
    cr3: int
    cr4: int
    efer: int = 0


LOW = {PD: LARGE | GLOBAL, PD + 8: 0x200000 | LARGE | GLOBAL}
KINDS = {
    "4M": Kind(PDPT + 4 * 256, 4 << 20, {PDPT: LARGE | GLOBAL}, PDPT, PSE),
    "2M of PAE": Kind(0x5000, 2 << 20, {PDPT: PD | 1, PDPT + 8: 0x5001, **LOW}, PDPT, PAE),
    "2M": Kind(0x5000, 2 << 20, {PML4: PDPT | 3, PDPT: PD | 3, PDPT + 8: 0x5003, **LOW}, PML4, PAE, 0xD00),
    "1G": Kind(PDPT + 8, 8 << 20, {PML4: PDPT | 3, PDPT: PD | 3, **LOW}, PML4, PAE, 0xD00),
}
READ, WRITE, ADD = b"\x8b\x03", b"\x89\x13\x89\xd0", b"\x01\x13\x8b\x03"
"""mov eax, [ebx]; mov [ebx], edx and mov eax, edx; add [ebx], edx and mov eax, [ebx]"""
INVLPG, TOGGLE_PGE = (
    b"\x0f\x01\x7d\0",
    2 * b"\x0f\x20\xe0\x34\x80\x0f\x22\xe0",
)  # invlpg [ebp]; mov eax, cr4; xor al, 0x80; mov cr4, eax


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    made.memory.add(RamRange(MOVED, 8 << 20, RamBlock(8 << 20)))
    yield made
    made.close()


def seen(
    machine: Machine,
    kind: Kind,
    use: bytes,
    used: int,
    dropped: int,
    flags: int = LARGE,
    to: int | None = None,
    drop: bytes = INVLPG,
) -> list[int]:
    """What *use* finds at *used*: twice, and twice after the entry changed and INVLPG ran at *dropped*."""
    for address, value in kind.tables.items():
        machine.put(address, value)
    machine.put(kind.entry, flags)
    change = b"\x89\x0f" + drop  # mov [edi], ecx
    program = use + b"\x89\x06\x83\xc6\x04\xff\xca"  # mov [esi], eax; add esi, 4; dec edx
    program += b"\x83\xfa\x02\x75" + bytes([len(change)]) + change  # cmp edx, 2; jne beyond it
    program += b"\x85\xd2\x75"  # test edx, edx; jnz to the first
    machine.memory.write(CODE, program + struct.pack("b", -len(program) - 1) + b"\xf4")
    cpu = machine.cpus[0]
    state = cpu.get_state()
    system, registers = state.system, state.registers
    system.cr0, system.cr3, system.cr4, system.efer = 0x80000011, kind.cr3, kind.cr4 | PGE, kind.efer
    system.cs = Segment(selector=8, base=0, limit=0xFFFFFFFF, type=11, l=kind.efer != 0, db=kind.efer == 0, g=1)
    for name in ("ds", "es", "ss", "fs", "gs"):
        setattr(system, name, Segment.flat(16))
    registers.rip, registers.rsp, registers.rflags = CODE, 0xF000, 2
    registers.rbx, registers.rcx, registers.rdx = PAGE + used, MOVED | flags if to is None else to, 4
    registers.rsi, registers.rdi, registers.rbp = SEEN, kind.entry, PAGE + dropped
    state.events.halted = False
    cpu.set_state(state)
    ended = cpu.run(machine.ops)
    assert ended.reason is Exit.HALTED, f"{ended}"
    return list(struct.unpack("<4I", machine.memory.read(SEEN, 16)))


def call(machine: Machine, used: int, direct: bool) -> bytes:
    """A call of a function at *used* that tells which of the two places it lies in."""
    for base, value in ((0, 1), (MOVED, 2)):
        machine.memory.write(base + used, b"\xb8" + struct.pack("<I", value) + b"\xc3")  # mov eax, ...; ret
    return b"\xe8" + struct.pack("<i", PAGE + used - CODE - 5) if direct else b"\xff\xd3"  # call ebx


@pytest.mark.parametrize("flags", [LARGE, LARGE | GLOBAL], ids=["", "global"])
@pytest.mark.parametrize("direct", [False, True], ids=["indirect", "direct"])
def test_code(machine: Machine, kind: Kind, direct: bool, flags: int) -> None:
    """Code anywhere in a large page is the new page's after INVLPG anywhere else in it, jumps chained to it or not."""
    places = [
        0x100000,
        kind.size - 0x100000,
        MIDDLE - 3 if kind.size > MIDDLE else 0x100FFD,
    ]  # the last lies across pages
    for used in places:
        for dropped in [0, kind.size - 1, *places]:
            found = seen(machine, kind, call(machine, used, direct), used, dropped, flags)
            assert found == [1, 1, 2, 2], (hex(used), hex(dropped))


@pytest.mark.parametrize(
    ("use", "found", "left"),
    [(READ, [100, 100, 200, 200], [100, 200]), (WRITE, [4, 3, 2, 1], [3, 1]), (ADD, [104, 107, 202, 203], [107, 203])],
    ids=["read", "write", "add"],
)
def test_data(machine: Machine, kind: Kind, use: bytes, found: list[int], left: list[int]) -> None:
    """What is read and written anywhere in a large page is the new page's after INVLPG anywhere else in it."""
    for used in (0x100000, kind.size - 0x100000):
        for dropped in (0, kind.size - 1, 0x100000, kind.size - 0x100000):
            machine.memory.write(used, struct.pack("<I", 100))
            machine.memory.write(MOVED + used, struct.pack("<I", 200))
            assert seen(machine, kind, use, used, dropped) == found, (hex(used), hex(dropped))
            assert [struct.unpack("<I", machine.memory.read(at + used, 4))[0] for at in (0, MOVED)] == left


@pytest.mark.parametrize("use", ["call", "read"])
def test_a_page_that_becomes_smaller_ones(machine: Machine, kind: Kind, use: str) -> None:
    """INVLPG anywhere in a large page that was split drops the whole of it."""
    huge, wide = kind.size == 8 << 20, 8 if kind.cr4 & PAE else 4
    for i in range(4096 // wide):
        entry = MOVED + (i << 21) | LARGE if huge else MOVED + (i << 12) | 3
        machine.memory.write(TABLE + wide * i, entry.to_bytes(wide, "little"))
    for used in (0x100000, kind.size - 0x100000):
        for dropped in (0, kind.size - 1):
            if use == "read":
                machine.memory.write(used, struct.pack("<I", 1))
                machine.memory.write(MOVED + used, struct.pack("<I", 2))
            code = READ if use == "read" else call(machine, used, direct=False)
            assert seen(machine, kind, code, used, dropped, to=TABLE | 3) == [1, 1, 2, 2], (hex(used), hex(dropped))


@pytest.mark.parametrize("direct", [False, True], ids=["indirect", "direct"])
def test_global_pages_until_pge_changes(machine: Machine, kind: Kind, direct: bool) -> None:
    """CR4.PGE cleared and set again drops global large pages, too."""
    code = call(machine, 0x100000, direct)
    assert seen(machine, kind, code, 0x100000, 0, LARGE | GLOBAL, drop=TOGGLE_PGE) == [1, 1, 2, 2]

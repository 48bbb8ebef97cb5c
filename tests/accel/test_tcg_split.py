"""Operands across two pages, POP to memory and CPUID: in native code, with the processor's faults."""

from __future__ import annotations

import struct
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from cardcage.errors import ConfigError
from cardcage_tcg import layout as L
from cardcage_tcg.cpu.emulate import Emulator
from cardcage_tcg.cpu.vcpu import TcgVCpu
from test_tcg_tables import CODE, DATA, DEVICE, PD, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.vcpu import Ops

EDGE = 0x301000
"""The first byte behind a page of data."""
TIMES = 100
LOOP = b"\xff\xc9\x75"  # dec ecx; jnz
OLD = bytes(range(1, 65))


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(cpu="max")
    yield made
    made.close()


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often Python did an instruction, or the write of one."""
    counts: Counter[str] = Counter()
    run, slow_write = Emulator.run, TcgVCpu._slow_write

    def count_run(self: Emulator, ops: Ops, *, pushed: int | None = None) -> None:
        counts["run"] += 1
        run(self, ops, pushed=pushed)

    def count_write(self: TcgVCpu, ops: Ops, linear: int, size: int) -> None:
        counts["write"] += 1
        slow_write(self, ops, linear, size)

    monkeypatch.setattr(Emulator, "run", count_run)
    monkeypatch.setattr(TcgVCpu, "_slow_write", count_write)
    return counts


def small_pages(machine: Machine) -> int:
    """Map the 2 MiB of EDGE by a table of pages; its address."""
    table = 0x400000
    for i in range(512):
        machine.put(table + 8 * i, 0x200000 + 4096 * i | 3)
    machine.put(PD + 8, table | 3)
    return table


def loop(code: bytes) -> bytes:
    """Run *code* ECX times."""
    return code + LOOP + struct.pack("<b", -len(code) - 4)


@pytest.mark.parametrize(
    ("code", "new"),
    [
        (b"\x0f\x11\x03", bytes(16)),  # movups [rbx], xmm0
        (b"\x48\x01\x03", struct.pack("<Q", 0x0807060504030201 + 5 * TIMES)),  # add [rbx], rax
        (b"\xf0\x48\x01\x03", struct.pack("<Q", 0x0807060504030201 + 5 * TIMES)),  # lock add
        (b"\x48\x87\x03", struct.pack("<Q", 5 if TIMES % 2 else 0x0807060504030201)),  # xchg [rbx], rax
        (b"\x83\x2b\x01", struct.pack("<I", 0x04030201 - TIMES)),  # sub dword [rbx], 1
        (b"\x48\x89\x03", struct.pack("<Q", 5)),  # mov [rbx], rax
    ],
    ids=["movups", "add", "lock add", "xchg", "sub", "mov"],
)
@pytest.mark.parametrize("first", [1, 3])
def test_writes_across_pages_stay_native(
    machine: Machine, python: Counter[str], code: bytes, new: bytes, first: int
) -> None:
    """A write across two pages of RAM is Python's once at most, which makes its template, and writes its bytes only."""
    at = EDGE - first
    machine.memory.write(at - 16, bytes(16) + OLD)
    machine.run(0, CODE, loop(code), rbx=at, rax=5, rcx=TIMES)
    assert machine.memory.read(at - 16, 80) == bytes(16) + new + OLD[len(new) :]
    assert python["write"] <= 1
    assert python["run"] == 0


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("code", [b"\x0f\x11\x03", b"\x48\x01\x03", b"\x48\x89\x03"], ids=["movups", "add", "mov"])
def test_a_fault_comes_before_either_part(machine: Machine, code: bytes, missing: int) -> None:
    """When one of two pages cannot be written, nothing of the other is, and CR2 is the first byte that faults."""
    table = small_pages(machine)
    machine.run(0, CODE, code, rbx=EDGE + 0xFFC, rax=5)  # which makes the template
    machine.memory.write(EDGE - 4, OLD[:16])
    machine.put(table + 8 * ((EDGE >> 12) - 0x200 - 1 + missing), 0)
    with pytest.raises(AssertionError, match="first vector 14"):
        machine.run(0, CODE, code, rbx=EDGE - 4, rax=5)
    assert machine.cpus[0].get_state().system.cr2 == (EDGE if missing else EDGE - 4)
    assert machine.memory.read(EDGE - 4, 16) == OLD[:16]


@pytest.mark.parametrize("code", [b"\x0f\x11\x03", b"\x48\x01\x03", b"\x48\x89\x03"], ids=["movups", "add", "mov"])
def test_code_that_a_write_across_pages_changes(machine: Machine, code: bytes) -> None:
    """Code in the second page is translated anew after a write that reached it from the first."""
    machine.memory.write(EDGE - 1, b"\x90\xb8\x01\0\0\0\xc3" + bytes(9))  # nop; mov eax, 1; ret
    call = b"\xff\xd2"  # call rdx
    value = b"\x90\xb8\x02\0\0\0\xc3\x90"
    add = int.from_bytes(value, "little") - int.from_bytes(b"\x90\xb8\x01\0\0\0\xc3\0", "little")
    number = add if code == b"\x48\x01\x03" else int.from_bytes(value, "little")
    load = b"\x66\x48\x0f\x6e\xc6\x48\x89\xf0"  # movq xmm0, rsi; mov rax, rsi
    machine.run(0, CODE, call + b"\x89\xc5" + load + code + call, rbx=EDGE - 1, rdx=EDGE, rsi=number)
    registers = machine.cpus[0].get_state().registers
    assert (registers.rbp, registers.rax) == (1, 2)


def test_halves_of_a_device_stay_the_devices(machine: Machine) -> None:
    """A vector that is stored from RAM into a device's page reaches both, the device in its own accesses."""
    machine.memory.write(DEVICE - 8, OLD[:8])
    machine.run(0, CODE, b"\x0f\x11\x03", rbx=DEVICE - 7)
    assert machine.memory.read(DEVICE - 8, 8) == OLD[:1] + bytes(7)
    assert sum(size for kind, address, size, _ in machine.accesses if kind == "write" and address >= DEVICE) == 9


@pytest.mark.parametrize(
    ("code", "at"),
    [
        (b"\x8f\x03", DATA),  # pop [rbx]
        (b"\x8f\x44\x24\x10", 0x180000 + 8 + 0x10),  # pop [rsp + 16]: as the stack pointer is afterwards
        (b"\x66\x8f\x03", DATA),
        (b"\x8f\x03", EDGE - 4),
    ],
    ids=["rbx", "rsp", "word", "across"],
)
def test_pop_to_memory(machine: Machine, python: Counter[str], code: bytes, at: int) -> None:
    """POP to memory writes what was on the stack, and computes its address with the stack pointer of afterwards."""
    size = 2 if code[0] == 0x66 else 8
    machine.memory.write(0x180000, OLD[:8])
    machine.memory.write(at, bytes(8))
    machine.run(0, CODE, code, rsp=0x180000, rbx=at)
    assert machine.memory.read(at, 8) == OLD[:size] + bytes(8 - size)
    assert machine.cpus[0].get_state().registers.rsp == 0x180000 + size
    assert python["run"] == (1 if at & 0xFFF > 0xFF8 else 0)


def test_pop_to_memory_that_faults(machine: Machine) -> None:
    """POP whose destination cannot be written leaves the stack pointer where it was."""
    table = small_pages(machine)
    machine.put(table + 8 * ((EDGE >> 12) - 0x200), 0)
    with pytest.raises(AssertionError, match="first vector 14"):
        machine.run(0, CODE, b"\x8f\x03", rsp=0x180000, rbx=EDGE)
    assert machine.cpus[0].get_state().registers.rsp == 0x180000


def test_pop_from_a_device_asks_it_once(machine: Machine) -> None:
    """POP of a device's memory into a page of code reads the device once."""
    machine.memory.write(DATA, b"\xc3" + bytes(15))
    machine.run(0, CODE, b"\xff\xd2\x48\x89\xf4\x8f\x03", rdx=DATA, rbx=DATA, rsi=DEVICE)  # call rdx; mov rsp, rsi; pop
    assert [kind for kind, *_ in machine.accesses] == ["read"]


def test_cpuid_is_remembered(python: Counter[str]) -> None:
    """Each leaf of CPUID is Python's once, until what it depends on changes."""
    try:
        machine = Machine(cpu="max", features={"avx": True})
    except ConfigError as error:
        pytest.skip(str(error))
    ask = b"\xb8\x01\0\0\0\x31\xc9\x0f\xa2\xff\xcf\x75\xf3\x89\xce"  # cpuid EDI times, leaf 1; mov esi, ecx
    enable = b"\x0f\x20\xe0\x0d\0\0\x04\0\x0f\x22\xe0"  # mov rax, cr4; or eax, OSXSAVE; mov cr4, rax
    machine.run(0, CODE, ask + enable + b"\xbf" + struct.pack("<I", TIMES) + ask[:-2], rdi=TIMES)
    registers = machine.cpus[0].get_state().registers
    assert (registers.rsi >> 27 & 1, registers.rcx >> 27 & 1) == (0, 1)
    assert python["run"] == 2
    machine.close()


def test_leaves_that_share_a_place(machine: Machine) -> None:
    """CPUID answers each of many leaves rightly, those that take one another's place in memory too."""
    leaves = [(leaf, sub) for leaf in (0, 1, 7, 0xB, 0x40000000, 0x80000000, 0x80000008, 5, 69) for sub in (0, 1, 64)]
    for _ in range(2):
        for leaf, sub in leaves:
            machine.run(0, CODE, b"\x0f\xa2", rax=leaf, rcx=sub)
            registers = machine.cpus[0].get_state().registers
            assert (registers.rax, registers.rbx, registers.rcx, registers.rdx) == machine.cpus[0].cpuid(leaf, sub)


def _taken(machine: Machine) -> int:
    """Bytes of the code buffer that hold code."""
    count = machine.vm._q[L.VM_CODE_USED // 8] >> L.CHUNK_BITS
    chunks = machine.vm._chunks.view[: L.SIZEOF_CHUNK * count].cast("I").tolist()
    return sum(low + (1 << L.CHUNK_BITS) - high for low, high in zip(chunks[::2], chunks[1::2], strict=True))


def test_singles_are_made_once(machine: Machine) -> None:
    """An instruction that writes across pages again and again takes no more of the code buffer."""
    machine.run(0, CODE, loop(b"\x48\x01\x03"), rbx=EDGE - 3, rax=1, rcx=TIMES)
    used = _taken(machine)
    machine.run(0, CODE, loop(b"\x48\x01\x03"), rbx=EDGE - 3, rax=1, rcx=TIMES)
    assert _taken(machine) - used < 4096

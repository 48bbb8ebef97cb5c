"""What INVLPG takes away, and code outside RAM."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from cardcage.accelerator import VmSpec
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit
from cardcage.x86 import DescriptorTable, Segment
from cardcage_tcg.accel import Tcg
from tcg_guest import NoDevices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.x86 import Registers

PML4, PDPT, PD_LOW, PD, PT, IDT, HANDLER, CODE = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0x8000
HIGH = 0x40000000
LOAD_EAX, LOAD_EBX, INVLPG, STORE = b"\x8b\x04\x25", b"\x8b\x1c\x25", b"\x0f\x01\x3c\x25", b"\x48\xc7\x04\x25"


def at(opcode: bytes, address: int, value: int | None = None) -> bytes:
    """An instruction with an absolute address, and perhaps an immediate."""
    return opcode + struct.pack("<I", address) + (b"" if value is None else struct.pack("<I", value))


def call(address: int) -> bytes:
    """MOV EBP, address; CALL RBP."""
    return b"\xbd" + struct.pack("<I", address) + b"\xff\xd5"


class Machine:
    """8 MiB, the first two identity-mapped; ``HIGH`` is for the tests. Runs at CPL 0 up to HLT."""

    def __init__(self) -> None:
        self.vm = Tcg().create_vm(VmSpec(cpus=1, irqchip="none"))
        self.memory, self._ram = PhysicalMemory(), RamBlock(8 << 20)
        self.memory.add(RamRange(0, 8 << 20, self._ram))
        self.memory.attach(self.vm)
        self.memory.on_written = self.vm.memory_written
        for where, value in ((PML4, PDPT | 3), (PDPT, PD_LOW | 3), (PDPT + 8, PD | 3), (PD_LOW, 0x83)):
            self.put(where, value)
        self.put(IDT + 6 * 16, HANDLER & 0xFFFF | 8 << 16 | 0x8E00 << 32)
        self.put(IDT - 0x100 + 8, 0xFFFF | 0x9B << 40 | 0xAF << 48)
        self.memory.write(HANDLER, b"\xb8\x06\0\0\0\xf4")  # mov eax, 6; hlt

    def put(self, address: int, value: int) -> None:
        self.memory.write(address, struct.pack("<Q", value))

    def run(self, code: bytes) -> Registers:
        cpu = self.vm.create_vcpu(0)
        self.memory.write(CODE, code + b"\xf4")
        state = cpu.get_state()
        system = state.system
        system.cr0, system.cr3, system.cr4, system.efer = 0x80010033, PML4, 0x6A0, 0xD00
        system.gdt, system.idt = DescriptorTable(IDT - 0x100, 15), DescriptorTable(IDT, 0xFFF)
        system.cs = Segment(selector=8, base=0, limit=0xFFFFFFFF, type=11, l=1, g=1)
        system.ss = Segment(selector=0, base=0, limit=0xFFFFFFFF, type=3, db=1, g=1)
        state.registers.rip, state.registers.rsp, state.registers.rflags = CODE, 0x100000, 2
        cpu.set_state(state)
        ended = cpu.run(NoDevices())
        assert ended.reason is Exit.HALTED, f"{ended}"
        return cpu.get_state().registers

    def close(self) -> None:
        self.vm.close()
        self.memory.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


def test_invlpg_of_a_large_page(machine: Machine) -> None:
    """INVLPG anywhere in a large page drops the translation of all of it."""
    machine.put(PD, 0x200083)
    machine.memory.write(0x205000, b"old!")
    machine.memory.write(0x405000, b"new!")
    registers = machine.run(
        at(LOAD_EAX, HIGH + 0x5000) + at(STORE, PD, 0x400083) + at(INVLPG, HIGH) + at(LOAD_EBX, HIGH + 0x5000)
    )
    assert struct.pack("<QQ", registers.rax, registers.rbx) == b"old!\0\0\0\0new!\0\0\0\0"


@pytest.mark.parametrize("large", [False, True])
def test_invlpg_of_code_whose_page_was_forgotten(machine: Machine, large: bool) -> None:
    """After INVLPG a call runs the code that is there now, though the fetch TLB had forgotten the page."""
    one, two, other = 0x200000, 0x400000, 0x600000
    for value, where in ((1, one), (2, two), (3, other + 0x10)):
        machine.memory.write(where, b"\xb8" + struct.pack("<I", value) + b"\xc3")  # mov eax, value; ret
    machine.put(PD + 8, other | 0x83)
    if large:
        machine.put(PD, one | 0x83)
        change = at(STORE, PD, two | 0x83) + at(INVLPG, HIGH + 0x1000)
    else:
        machine.put(PD, PT | 3)
        machine.put(PT, one | 3)
        change = at(STORE, PT, two | 3) + at(INVLPG, HIGH)
    registers = machine.run(call(HIGH) + b"\x89\xc3" + call(HIGH + 0x200010) + change + call(HIGH))
    assert (registers.rbx, registers.rax) == (1, 2)


def test_code_outside_ram(machine: Machine) -> None:
    """Code where there is no RAM reads as ones: #UD."""
    machine.put(PD, 0xD0000083)
    assert machine.run(call(HIGH)).rax == 6


def test_pending_x87_exception_comes_before_an_access(machine: Machine) -> None:
    """#MF of the instruction before comes before the page fault of an x87 instruction's own operand."""
    machine.put(IDT + 16 * 16, HANDLER + 16 & 0xFFFF | 8 << 16 | 0x8E00 << 32)
    machine.memory.write(HANDLER + 16, b"\xb8\x10\0\0\0\xf4")  # mov eax, 16; hlt
    unmasked = b"\x68\x00\0\0\0\xd9\x2c\x24"  # push 0; fldcw [rsp]
    divide = b"\xd9\xee\xd9\xee\xde\xf9"  # fldz; fldz; fdivp: invalid
    assert machine.run(b"\xdb\xe3" + unmasked + divide + at(b"\xd9\x04\x25", 0x7FFFFF00)).rax == 16

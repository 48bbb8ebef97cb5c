"""Blocks that go on behind conditional jumps, and accesses in them that share the look-up of a page."""

from __future__ import annotations

import ctypes
import random
import struct
from typing import TYPE_CHECKING

import pytest
from cardcage.accelerator import MemorySlot
from cardcage_tcg import layout as L
from iced_x86 import BlockEncoder, Code, Instruction, MemoryOperand, Register
from tcg_guest import Guest
from tcg_host import CODE, DATA, DATA_SIZE, READONLY, Host, State
from test_tcg_tables import CODE as PROGRAM
from test_tcg_tables import DATA as PLACE
from test_tcg_tables import DEVICE, OTHER, Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

R, C = Register, Code
CASES, SIGNS = 3000, 0x8C5  # all arithmetic flags but AF
BASES = [R.RBX, R.RBP, R.RSI, R.RDI, R.R9, R.R10, R.R12, R.R13, R.RSP]
OTHERS = [R.RAX, R.RCX, R.RDX, R.R8, R.R11, R.R14, R.R15]
WIDE = {R.RAX: R.EAX, R.RCX: R.ECX, R.RDX: R.EDX, R.R8: R.R8D, R.R11: R.R11D, R.R14: R.R14D, R.R15: R.R15D}
JUMPS = [C.JE_REL8_64, C.JNE_REL8_64, C.JB_REL32_64, C.JAE_REL8_64, C.JS_REL8_64, C.JO_REL32_64, C.JLE_REL8_64]
EDGES = [DATA + 0x1000, DATA + 0x2000, DATA + READONLY, DATA + READONLY + 0x1000, DATA + 0x5000, DATA + DATA_SIZE]


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    made = Guest(code_cache=8)
    yield made
    made.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


class Programs:
    """Random straight code with jumps ahead, most of whose accesses are near each other."""

    def __init__(self, r: random.Random) -> None:
        self.r = r
        self.near: list[MemoryOperand] = []

    def operand(self) -> MemoryOperand:
        if self.near and self.r.random() < 0.3:
            return self.r.choice(self.near)
        base = self.r.choice(BASES[:5] if self.r.random() < 0.8 else BASES)
        index = R.NONE if self.r.random() < 0.8 else self.r.choice([R.RCX, R.R11, R.R14])
        disp = self.r.choice([0, 8, 16, 24, -8, 1, 60, 64, 100, -100, 127, 400])
        made = MemoryOperand(
            base, index, 1 if index == R.NONE else self.r.choice([1, 2, 8]), disp, 1 if -128 <= disp < 128 else 8
        )
        self.near.append(made)
        return made

    def one(self) -> Instruction:
        r, other = self.r, self.r.choice(OTHERS)
        kind = r.random()
        if kind < 0.22:
            return Instruction.create_reg_mem(
                r.choice([C.MOV_R64_RM64, C.ADD_R64_RM64, C.CMP_R64_RM64]), other, self.operand()
            )
        if kind < 0.3:
            return Instruction.create_reg_mem(
                r.choice([C.MOV_R32_RM32, C.MOVZX_R32_RM8, C.MOVZX_R32_RM16, C.ADC_R32_RM32]),
                WIDE[other],
                self.operand(),
            )
        if kind < 0.5:
            return Instruction.create_mem_reg(
                r.choice([C.MOV_RM64_R64, C.ADD_RM64_R64, C.XCHG_RM64_R64, C.CMP_RM64_R64]), self.operand(), other
            )
        if kind < 0.56:
            return Instruction.create_mem_i32(
                r.choice([C.MOV_RM32_IMM32, C.ADD_RM32_IMM32]), self.operand(), r.getrandbits(31)
            )
        if kind < 0.6:
            return Instruction.create_mem(r.choice([C.INC_RM64, C.SETE_RM8, C.NOT_RM64]), self.operand())
        if kind < 0.69:
            load = kind < 0.65
            make = Instruction.create_reg_mem if load else Instruction.create_mem_reg
            operands = (R.XMM1, self.operand()) if load else (self.operand(), R.XMM1)
            made = make(C.MOVUPS_XMM_XMMM128 if load else C.MOVUPS_XMMM128_XMM, *operands)
            # which comes first of an address that is not canonical and one that is not aligned, no manual says
            if made.memory_base not in (R.RSP, R.RBP) and r.random() < 0.5:
                made.code = C.PXOR_XMM_XMMM128 if load else C.MOVAPS_XMMM128_XMM
            return made
        if kind < 0.77:
            return Instruction.create_reg(r.choice([C.PUSH_R64, C.POP_R64]), other)
        if kind < 0.8:
            base = r.choice(BASES)
            return Instruction.create_reg_mem(
                C.LEA_R64_M, base, MemoryOperand(base, displ=r.choice([8, -16, 40]), displ_size=1)
            )
        if kind < 0.82:
            return Instruction.create_reg_reg(C.MOV_R64_RM64, r.choice(BASES[:5]), r.choice(BASES))
        if kind < 0.86:
            return Instruction.create_reg_reg(C.CMOVB_R64_RM64, other, R.RAX)
        if kind < 0.9:
            return Instruction.create_reg_i32(C.ADD_RM64_IMM32, r.choice(OTHERS), r.choice([1, -1, 0x7FFFFFFF]))
        return Instruction.create_reg_reg(
            r.choice([C.ADC_R64_RM64, C.CMP_R64_RM64, C.SUB_R64_RM64]), other, r.choice(OTHERS)
        )

    def program(self) -> bytes:
        count, self.near = self.r.randrange(4, 40), []
        lines = [
            Instruction.create_branch(self.r.choice(JUMPS), 0) if self.r.random() < 0.15 else self.one()
            for _ in range(count)
        ]
        lines.append(Instruction.create(C.UD2))
        for at, line in enumerate(lines):
            line.ip = 0x1000 + at
            if line.code in JUMPS:
                line.near_branch64 = 0x1000 + min(count, at + self.r.randrange(1, 6))
        encoder = BlockEncoder(64)
        for line in lines:
            encoder.add(line)
        return encoder.encode(CODE)

    def state(self) -> State:
        r = self.r
        general = [r.choice([0, 1, 2, 3, 0x80, r.getrandbits(64), r.getrandbits(31)]) for _ in range(16)]
        general[1], general[11], general[14] = (r.choice([0, 1, 2, 5, -3 % (1 << 64)]) for _ in range(3))
        for number in (3, 5, 6, 7, 9, 10, 12, 13, 4):
            general[number] = r.choice(EDGES) + r.choice(
                [-8, -16, -24, -64, -100, -200, -0x800, 0, 8, -1, -60, r.randrange(-2000, 100)]
            )
        xstate = struct.pack("<H22xI4x", 0x37F, 0x1F80) + bytes(128) + r.randbytes(32)
        xstate = xstate.ljust(512, b"\0") + struct.pack("<Q", 3) + bytes(312)
        return State(general, CODE, 0x202 | r.getrandbits(12) & SIGNS, xstate)


def shown(state: State) -> dict[str, object]:
    """All that is compared; at a fault not the flags: what kills them may lie behind it."""
    return {
        "rip": hex(state.rip), "flags": hex(0 if state.ended else state.flags & SIGNS),
        "registers": [hex(one) for one in state.general],
        "ended": state.ended, "address": state.address, "memory": state.memory, "xmm1": state.xstate[176:192],
    }  # fmt: skip


def test_programs_like_the_processor(host: Host, guest: Guest) -> None:
    """Random programs whose accesses lie near each other, about the edges of pages, end as on the real processor, also
    after the code buffer was full."""
    r = random.Random(4)
    programs = Programs(r)
    for case in range(CASES):
        code, start, memory = programs.program(), programs.state(), r.randbytes(DATA_SIZE)
        want = shown(host.run(code, start, memory))
        for time in ("first", "second"):  # the second has templates of all that it does not run, too
            assert shown(guest.run(code, start, memory)) == want, f"case {case}, {time} time: {code.hex()}"
    assert guest.vm.generation


@pytest.mark.parametrize("count", [40, 64, 100])
def test_a_block_of_checked_accesses(host: Host, guest: Guest, count: int) -> None:
    """A block of nothing but loads that have a limit, an alignment and a page to look at runs as on the processor."""
    r = random.Random(count)
    start, memory = Programs(r).state(), r.randbytes(DATA_SIZE)
    general = [one & 0xFFFFFFFF for one in start.general[:8]] + [0] * 8
    general[3], general[4] = DATA + 0x100, DATA + 0x2000
    start = State(general, CODE, 0x40202, start.xstate)
    code = b"\x2e\x03\x03" * count + b"\x0f\x0b"  # add eax, cs:[ebx], with RFLAGS.AC
    want = shown(host.run(code, start, memory, bits=32))
    for _ in range(2):
        assert shown(guest.run(code, start, memory, bits=32)) == want


def test_what_lies_behind_the_data_is_nobodys() -> None:
    """The processor that is asked finds nothing behind the data, whatever the tests' own process has mapped there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    there = libc.mmap(DATA + DATA_SIZE, 4096, 3, 0x22, -1, 0)
    host = Host()
    try:
        start = Programs(random.Random(1)).state()
        start.general[3] = DATA + DATA_SIZE
        ended = host.run(b"\x8b\x03\x0f\x0b", start, bytes(DATA_SIZE))  # mov eax, [rbx]
        assert (ended.ended, ended.address) == ("SIGSEGV", DATA + DATA_SIZE)
    finally:
        host.close()
        libc.munmap(there, 4096)


def between(after: bytes, before: bytes = b"\x48\x89\x01") -> bytes:
    """Code that stores RAX at RCX (*before*), reads a device at RBX, and does *after*."""
    return before + b"\x8b\x13" + after


STORE, LOAD = b"\x48\x89\x41\x08", b"\x48\x8b\x71\x08"  # mov [rcx + 8], rax; mov rsi, [rcx + 8]


def test_a_page_that_begins_to_hold_code_meanwhile(machine: Machine) -> None:
    """A store that shares another one's look-up ends code that its page got while a device was asked in between."""
    function = PLACE + 8

    def run_it() -> None:
        machine.on_access = lambda: None
        machine.memory.write(function, b"\xb0\x11\x90\x90\x90\x90\x90\xf4")  # mov al, 0x11; nop ...; hlt
        machine.run(1, OTHER, b"\xe9" + struct.pack("<i", function - OTHER - 5))

    code = int.from_bytes(b"\xb0\x22\x90\x90\x90\x90\x90\xf4", "little")
    machine.run(0, PROGRAM, between(STORE), rax=code, rcx=PLACE + 0x1000, rbx=DEVICE)
    machine.on_access = run_it
    machine.run(0, PROGRAM, between(STORE), rax=code, rcx=PLACE, rbx=DEVICE)
    cpu = machine.run(1, OTHER, b"\xe9" + struct.pack("<i", function - OTHER - 5))
    assert cpu.get_state().registers.rax & 0xFF == 0x22


def test_a_dirty_log_that_begins_meanwhile(machine: Machine) -> None:
    """A store that shares another one's look-up is in a dirty log that began, or was read, in between."""
    (slot,) = [MemorySlot(0, 8 << 20, machine.block.host_address)]
    machine.run(0, PROGRAM, between(STORE), rcx=PLACE, rbx=DEVICE)
    machine.on_access = machine.vm.start_dirty_log
    machine.run(0, PROGRAM, between(STORE), rcx=PLACE, rbx=DEVICE)
    assert _is_dirty(machine.vm.fetch_dirty_log(slot), PLACE)
    machine.on_access = lambda: machine.vm.fetch_dirty_log(slot) and None
    machine.run(0, PROGRAM, between(STORE), rcx=PLACE, rbx=DEVICE)
    assert _is_dirty(machine.vm.fetch_dirty_log(slot), PLACE)


def _is_dirty(log: bytes, address: int) -> bool:
    return bool(log[address >> 15] >> (address >> 12 & 7) & 1)


def test_a_device_is_asked_once_though_a_translation_was_dropped(machine: Machine) -> None:
    """A load in the midst of a block that left for a device gets its one answer, and what shares a look-up goes on."""
    machine.memory.write(PLACE + 8, b"\x77".ljust(8, b"\0"))
    machine.run(0, PROGRAM, between(LOAD, b"\x48\x8b\x01"), rcx=PLACE, rbx=DEVICE)
    machine.accesses.clear()
    machine.on_access = lambda: machine.vm.flush_translations()
    cpu = machine.run(0, PROGRAM, between(LOAD, b"\x48\x8b\x01"), rcx=PLACE, rbx=DEVICE)
    registers = cpu.get_state().registers
    assert machine.accesses == [("read", DEVICE, 4, 0)]
    assert (registers.rdx, registers.rsi) == (0x55667788, 0x77)


def test_accesses_near_each_other_share_a_look_up(machine: Machine) -> None:
    """Six loads off one register take at most half of the code of six that lie far from each other."""

    def length(code: bytes) -> int:
        before = _code(machine)
        for _ in range(2):
            machine.run(0, PROGRAM, code, rcx=PLACE)
        return _code(machine) - before

    near = b"".join(b"\x48\x8b\x41" + bytes((8 * i,)) for i in range(6))
    far = b"".join(b"\x48\x8b\x81" + struct.pack("<i", 0x800 * i) for i in range(6))
    length(near + far)  # templates
    assert 2 * length(near) <= length(far)


def _code(machine: Machine) -> int:
    """Bytes of code that runs."""
    count = machine.vm._q[L.VM_CODE_USED // 8] >> L.CHUNK_BITS
    return sum(machine.vm._chunks.view[: L.SIZEOF_CHUNK * count].cast("I").tolist()[::2])

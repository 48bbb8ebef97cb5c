"""The translator's tables hold nothing that a guest can name, and nothing that is gone is used."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.accelerator import MemorySlot, VmSpec
from cardcage.errors import ConfigError
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit
from cardcage.x86 import DescriptorTable, Segment
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from tcg_cpu import Cpu, load
from tcg_guest import NoDevices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage_tcg.cpu.vcpu import TcgVCpu

PML4, PDPT, PD, GDT, CODE, OTHER, DATA = 0x1000, 0x2000, 0x3000, 0x6000, 0x8000, 0x20000, 0x100000
DEVICE = 0x800000


def tables(raw: memoryview | bytes) -> Iterator[tuple[str, int, int, int, int]]:
    """(table, index, tag as an address that would be looked up, index it leads to, host address) of every entry."""
    for name, at in (("tlb_r", L.TLB_R), ("tlb_w", L.TLB_W)):
        for half in range(2):
            for i in range(L.TLB_SIZE):
                tag, add = struct.unpack_from("<QQ", raw, at + half * L.SIZEOF_TLB + 16 * i)
                yield f"{name}[{half}]", i, tag, tag >> 12 & L.TLB_SIZE - 1, add
    for half in range(2):
        for i in range(L.JC_SIZE):
            pc, code = struct.unpack_from("<QQ", raw, L.JC + 16 * (half * L.JC_SIZE + i))
            size = L.JC_SIZE if half else 1 << L.JC_SUPERVISOR
            yield f"jc[{half}]", i, pc, (pc ^ pc >> L.JC_SHIFT) >> L.JC_LOW & size - 1, code
        for i in range(L.XTLB_SIZE):
            tag, phys = struct.unpack_from("<QQ", raw, L.XTLB + 16 * (half * L.XTLB_SIZE + i))
            yield f"xtlb[{half}]", i, tag, tag >> 12 & L.XTLB_SIZE - 1, phys


def check_empty(raw: memoryview | bytes) -> None:
    for name, index, _, leads_to, target in tables(raw):
        assert leads_to != index, f"{name}[{index}] can be named"
        assert target == 0, f"{name}[{index}] still points at {target:#x}"


def test_empty_entries_cannot_be_named() -> None:
    """No address leads to an empty entry of a TLB or the jump cache whose tag it could equal, and it points nowhere."""
    cpu = Cpu(load())
    check_empty(cpu._area)


class Machine:
    """8 MiB and two vCPUs at CPL 0 in 64-bit mode, identity-mapped; a device at 8 MiB."""

    def __init__(self, **spec: Any) -> None:
        self.vm = Tcg().create_vm(VmSpec(**{"cpus": 2, "irqchip": "none", **spec}))
        self.memory, self.block = PhysicalMemory(), RamBlock(8 << 20)
        self.memory.add(RamRange(0, 8 << 20, self.block))
        self.memory.attach(self.vm)
        self.memory.on_written = self.vm.memory_written
        self.put(PML4, PDPT | 3)
        self.put(PDPT, PD | 3)
        for i in range(8):
            self.put(PD + 8 * i, i << 21 | 0x83)
        self.put(GDT + 8, 0xFFFF | 0x9B << 40 | 0xAF << 48)
        self.cpus = [self.vm.create_vcpu(index) for index in range(2)]
        self.accesses: list[tuple[str, int, int, int]] = []
        self.on_access: Callable[[], None] = lambda: None
        self.ops = _Device(self)

    def put(self, address: int, value: int) -> None:
        self.memory.write(address, struct.pack("<Q", value))

    def run(self, index: int, address: int, code: bytes, **registers: int) -> TcgVCpu:
        """Run *code* up to the HLT that is put behind it."""
        cpu = self.cpus[index]
        self.memory.write(address, code + b"\xf4")
        state = cpu.get_state()
        system = state.system
        system.cr0, system.cr3, system.cr4, system.efer = 0x80010033, PML4, 0x6A0, 0xD00
        system.gdt, system.idt = DescriptorTable(GDT, 15), DescriptorTable(0, 0)
        system.cs = Segment(selector=8, base=0, limit=0xFFFFFFFF, type=11, l=1, g=1)
        system.ss = Segment(selector=0, base=0, limit=0xFFFFFFFF, type=3, db=1, g=1)
        state.registers.rip, state.registers.rsp, state.registers.rflags = address, 0x200000 - index * 0x1000, 2
        for name, value in registers.items():
            setattr(state.registers, name, value)
        state.events.halted = False
        cpu.set_state(state)
        ended = cpu.run(self.ops)
        assert ended.reason is Exit.HALTED, f"{ended}"
        return cpu

    def forget_all(self) -> None:
        """Change slots, which forgets all code, and fill the place with other code, as another vCPU can meanwhile."""
        for _ in range(2):
            slot = MemorySlot(0x40000000, 0x1000, self.block.host_address, readonly=True)
            self.vm.map_memory(slot)
            self.vm.unmap_memory(slot)
        # blocks whose immediates are host code that would not come back: INT3
        code = b"".join(b"\x48\xb8" + b"\xcc" * 8 + b"\xeb\0" for _ in range(400))
        self.run(1, OTHER, code)

    def close(self) -> None:
        self.vm.close()
        self.memory.close()


class _Device(NoDevices):
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def mmio_read(self, address: int, size: int, /) -> int:
        self._machine.accesses.append(("read", address, size, 0))
        self._machine.on_access()
        return 0x1122334455667788 & (1 << size * 8) - 1

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        self._machine.accesses.append(("write", address, size, value))
        self._machine.on_access()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("code", "accesses", "rax"),
    [
        (b"\x8b\x03", [("read", DEVICE, 4, 0)], 0x55667788),  # mov eax, [rbx]
        (b"\xff\x33\x58", [("read", DEVICE, 8, 0)], 0x1122334455667788),  # push [rbx]; pop rax
        (b"\x66\x0f\x38\x2a\x03\x66\x0f\x7e\xc0", [("read", DEVICE, 8, 0), ("read", DEVICE + 8, 8, 0)], 0x55667788),
        (b"\x89\x03", [("write", DEVICE, 4, 7)], 7),  # mov [rbx], eax
        (b"\x01\x03", [("read", DEVICE, 4, 0), ("write", DEVICE, 4, 0x5566778F)], 7),  # add [rbx], eax
        (b"\x48\x0f\xc1\x03", [("read", DEVICE, 8, 0), ("write", DEVICE, 8, 0x112233445566778F)], 0x1122334455667788),
    ],
    ids=["load", "push", "movntdqa", "store", "add", "xadd"],
)
def test_device_access_while_all_code_is_forgotten(
    machine: Machine, code: bytes, accesses: list[tuple[str, int, int, int]], rax: int
) -> None:
    """An instruction that left for a device ends, and asks it once, though its translation has been overwritten."""
    machine.on_access = machine.forget_all
    cpu = machine.run(0, CODE, b"\x48\x31\xc9" + code + b"\x48\xff\xc1", rbx=DEVICE, rax=7)
    assert machine.accesses == accesses
    registers = cpu.get_state().registers
    assert (registers.rax, registers.rcx) == (rax, 1)


def test_operand_among_code_stays_atomic(machine: Machine) -> None:
    """A locked read-modify-write of bytes among translated code is done in memory itself, and ends the code there."""
    machine.memory.write(DATA, b"\xb8\x01\0\0\0\xc3")  # mov eax, 1; ret
    call = b"\xe8" + struct.pack("<i", DATA - CODE - 5)
    cpu = machine.run(0, CODE, call + b"\x89\xc2\xf0\x83\x43\x01\x08" + b"\xff\xd3", rbx=DATA)
    registers = cpu.get_state().registers
    assert (registers.rdx, registers.rax) == (1, 9)
    assert cpu.registers.field(L.SINGLE_SIZE) == 0


def run_aliases(machine: Machine, count: int) -> None:
    """Run the RET at DATA by *count* addresses, each a block of its own."""
    machine.memory.write(DATA, b"\xc3")
    for i in range(8):  # 16 MiB to 4 GiB: every 4 KiB shows DATA
        machine.put(PDPT + 8 * (i + 4), 0x400000 + 0x1000 * i | 3)
        for entry in range(512):
            machine.put(0x400000 + 0x1000 * i + 8 * entry, 0x500003)
    for entry in range(512):
        machine.put(0x500000 + 8 * entry, DATA | 3)
    loop = b"\xff\xd3\x48\x81\xc3\0\x10\0\0\xff\xc9\x75\xf3"  # call rbx; add rbx, 4096; dec ecx; jnz
    machine.run(0, CODE, loop, rbx=4 << 30, rcx=count)


def test_blocks_of_a_page_are_bounded(machine: Machine) -> None:
    """A page holds a bounded number of blocks, whatever segment bases and aliases it is run by."""
    run_aliases(machine, 20000)
    slot = machine.vm.memory._slots[0]
    count = struct.unpack_from("<QQQ", machine.vm.memory._pages[slot].view, (DATA >> 12) * L.SIZEOF_PAGE)[2]
    assert 0 < count <= 8192


def test_a_full_page_forgets_its_oldest_blocks(machine: Machine) -> None:
    """Code of a page that has as many blocks as it may have is translated once, not at each of its turns."""
    run_aliases(machine, 9000)
    machine.memory.write(DATA + 64, b"\xc3")
    installed = machine.vm._q[L.VM_STAT // 8 + 1]
    loop = b"\xff\xd3\xff\xd2\xff\xc9\x75\xf8"  # call rbx; call rdx; dec ecx; jnz
    machine.run(0, CODE, loop, rbx=DATA, rdx=DATA + 64, rcx=1000)
    assert machine.vm._q[L.VM_STAT // 8 + 1] - installed < 20


def test_walks_end_code_that_lies_in_tables(machine: Machine) -> None:
    """The accessed bit that a page walk sets in bytes that have been translated is seen when they run again."""
    table = 0x400000
    machine.put(PDPT + 8 * 4, table | 3)
    machine.put(table + 64, 0xC3 << 32 | 0x83)  # shows 0xc300000000; its bytes are an immediate, and a RET
    machine.memory.write(table + 63, b"\xb8")  # mov eax, imm32
    cpu = machine.run(
        0, CODE, b"\xff\xd2\x89\xc6\x8b\x0b\xff\xd2", rbx=(4 << 30) + (8 << 21), rdx=table + 63
    )  # call rdx; mov esi, eax; mov ecx, [rbx]; call rdx
    registers = cpu.get_state().registers
    assert (registers.rsi, registers.rax, registers.rcx) == (0x83, 0xA3, 0x55667788)


@pytest.mark.parametrize("bits", [16, 32])
def test_code_that_only_goes_forward_is_kicked(machine: Machine, bits: int) -> None:
    """Code that comes round by the wrap of its instruction pointer, with no jump back, answers a kick."""
    cpu = machine.cpus[0]
    state = cpu.get_state()
    system = state.system
    count = 0x300000
    if bits == 16:
        system.cs = Segment(selector=0x1000, base=0x10000, limit=0xFFFF, type=11)
        machine.memory.write(0x10000, b"\x90" * 0x10000)
        machine.memory.write(0x10000, b"\x67\xff\x05" + struct.pack("<I", count))  # inc word [count]
        state.registers.rip = 0
    else:
        system.cr0 = 0x11
        system.cs = Segment.flat(8, code=True)
        places = (0x1000, 0x56000000, 0xAB000000)
        for place, to in zip(places, places[1:] + places[:1], strict=True):
            if place > 0x800000:
                machine.memory.add(RamRange(place, 0x1000, RamBlock(4096)))
            code = b"\xff\x05" + struct.pack("<I", count)  # inc dword [count]
            machine.memory.write(place, code + b"\xe9" + struct.pack("<I", to - place - len(code) - 5 & 0xFFFFFFFF))
        state.registers.rip = places[0]
    for name in ("ds", "es", "ss", "fs", "gs"):
        setattr(system, name, Segment.flat(16) if bits == 32 else Segment(selector=0, base=0, limit=0xFFFFFFFF, type=3))
    state.registers.rflags = 2
    cpu.set_state(state)
    ended: list[Exit] = []
    thread = threading.Thread(target=lambda: ended.append(cpu.run(machine.ops).reason), daemon=True)
    thread.start()
    while struct.unpack("<H", machine.memory.read(count, 2))[0] < 100:
        assert thread.is_alive()
    cpu.kick()
    thread.join(60)
    assert ended == [Exit.KICKED]


def test_slots_change_in_one_step_for_python_too(machine: Machine) -> None:
    """A store that Python does for a vCPU waits for a change of memory slots that is half done, and is not lost."""
    slot, reads, changing = machine.memory.slots[0], threading.Event(), threading.Event()

    def answer(port: int, size: int) -> int:
        reads.set()
        assert changing.wait(60)
        return 0x5A

    machine.ops.pio_read = answer  # type: ignore[method-assign] # the device of this test
    thread = threading.Thread(target=machine.run, args=(0, CODE, b"\x6c"), kwargs={"rdi": DATA, "rdx": 0x70})  # insb
    thread.start()
    assert reads.wait(60)
    with machine.vm.quiesce():
        machine.vm.unmap_memory(slot)
        changing.set()
        thread.join(0.2)  # long enough for a store that does not wait
        machine.vm.map_memory(slot)
    thread.join(60)
    assert machine.memory.read(DATA, 1) == b"\x5a"
    assert machine.accesses == []


def test_operand_of_an_instruction_that_was_replaced(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction that another vCPU replaces while Python prepares its write has an operand of its own size."""
    last = (8 << 20) - 1
    machine.memory.write(last, b"\xc3")  # code, so that Python does the write
    prepare = machine.vm.blocks.prepare_single

    def replaced(cpu: TcgVCpu) -> tuple[int, bool, bool] | None:
        machine.memory.write(CODE + 2, b"\x0f\x11\x03")  # movups [rbx], xmm0: 16 bytes
        return prepare(cpu)

    monkeypatch.setattr(machine.vm.blocks, "prepare_single", replaced)
    cpu = machine.run(0, CODE, b"\xff\xd3\x00\x03\x90", rbx=last, rax=0x90)  # call rbx; add [rbx], al; nop
    assert machine.memory.read(last, 1) == b"\0"
    assert sum(size for kind, address, size, _ in machine.accesses if kind == "write" and address >= DEVICE) == 15
    assert cpu.get_state().registers.rip == CODE + 6


def test_a_single_is_of_the_bytes_it_is_kept_by(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction that another vCPU patches while its write is prepared is not kept for the bytes of before."""
    once, patched = machine.vm.native.once, []

    def patch_first(*arguments: object) -> int:
        if not patched:
            patched.append(True)
            machine.memory.write(CODE + 2, b"\x28\x03")  # sub [rbx], al
        return int(once(*arguments))

    monkeypatch.setattr(machine.vm.native, "once", patch_first)
    for expected in (0xC2, 0xC4):
        machine.memory.write(DATA, b"\xc3")
        machine.run(0, CODE, b"\xff\xd3\x00\x03", rbx=DATA, rax=1)  # call rbx; add [rbx], al
        assert machine.memory.read(DATA, 1)[0] == expected


def test_what_is_fetched_ahead_leaves_no_trace(machine: Machine) -> None:
    """Code that Python reads beyond an instruction, into a page that is not there, changes neither CR2 nor a PUSH."""
    table = 0x400000
    machine.put(PD + 8, table | 3)
    for i in range(512):
        machine.put(table + 8 * i, 0x200000 + i * 4096 | (3 if i != 0x11 else 0))
    cpu = machine.run(0, 0x210FF8, b"\x31\xc0\x0f\xa2")  # cpuid
    assert cpu.get_state().system.cr2 == 0
    machine.put(DATA, 0x1122334455667788)
    machine.run(0, 0x210FF8, b"\xff\x33", rbx=DATA, rsp=0x180004)  # push [rbx], across pages
    assert machine.memory.read(0x17FFFC, 8) == machine.memory.read(DATA, 8)


@pytest.mark.parametrize("code", ["62f27d49920408", "62f27d29920408", "c4e271920408"], ids=["zmm", "ymm", "off"])
def test_gathers_of_units_that_are_not_there(code: str) -> None:
    """A gather of AVX-512's, and one of AVX's while the guest has not enabled that, raise #UD."""
    try:
        machine = Machine(cpu="max", features={"avx2": True})
    except ConfigError as error:
        pytest.skip(str(error))
    with pytest.raises(AssertionError, match="first vector 6"):
        machine.run(0, CODE, bytes.fromhex(code), rax=DATA)
    machine.close()


def test_kvmclock_counts_round(machine: Machine) -> None:
    """The version of kvmclock's structure wraps."""
    machine.cpus[0].msrs._version = (1 << 32) - 2
    machine.run(0, CODE, b"\xb9\x01\x4d\x56\x4b\xb8\x01\0\x10\0\x31\xd2\x0f\x30")  # wrmsr
    assert machine.memory.read(0x100000, 4) == bytes(4)


def test_kvmclock_goes_on(machine: Machine) -> None:
    """A state that is set, in the same VM later or in one that is older, has kvmclock go on from what it was, by the
    processor's TSC; where the guest has put nonsense there, it shows this VM's time."""
    cpu = machine.run(0, CODE, b"\xb9\x01\x4d\x56\x4b\xb8\x01\0\x10\0\x31\xd2\x0f\x30")  # wrmsr

    def shown(tsc: int) -> float:
        version, _, since, time, multiplier, shift, _ = struct.unpack("<IIQQIbB2x", machine.memory.read(0x100000, 32))
        assert version % 2 == 0
        assert 0 <= tsc - since < 1 << 40
        return float(time + ((tsc - since << shift if shift >= 0 else tsc - since >> -shift) * multiplier >> 32)) / 1e9

    state = cpu.get_state()
    assert state.tsc is not None
    kept, before = machine.memory.read(0x100000, 32), shown(state.tsc)
    for other in (0, -(10**12)):
        machine.memory.write(0x100000, kept)
        cpu.vm.clock.ahead += other
        cpu.set_state(state)
        assert machine.memory.read(0x100000, 4) != kept[:4]
        found = cpu.get_state().tsc
        assert found is not None
        assert before <= shown(found) < before + 100
    machine.memory.write(0x100000, b"\xff" * 32)
    cpu.set_state(state)
    assert machine.memory.read(0x100000, 32) != b"\xff" * 32


@pytest.mark.parametrize(
    "code", [b"\x87\x03", b"\x83\x23\0", b"\xab", b"\x0f\x01\x23"], ids=["xchg", "and", "stosd", "smsw"]
)
def test_ends_of_interrupts_by_any_instruction(code: bytes) -> None:
    """Whatever instruction writes EOI, the machine hears of a level-triggered interrupt's end."""
    machine = Machine(irqchip="split")
    machine.put(PDPT + 8 * 3, 0x7003)
    machine.put(0x7000 + 8 * (0xFEE00000 >> 21 & 511), 0xFEE00083)
    cpu, ended = machine.cpus[0], []

    def end(vector: int, /) -> None:
        ended.append(vector)
        cpu.kick()

    machine.ops.end_of_interrupt = end  # type: ignore[method-assign] # the machine of this test
    for field in (L.LAPIC_ISR, L.LAPIC_TMR):
        cpu.halves[(L.LAPIC + field) // 4 + 1] = 2  # vector 0x21
    with pytest.raises(AssertionError, match="KICKED"):
        machine.run(0, CODE, code + b"\xeb\xfe", rbx=0xFEE000B0, rdi=0xFEE000B0, rax=0)
    assert ended == [0x21]
    assert machine.memory.read(0x21, 2) == bytes(2)
    machine.close()


def test_wide_reads_of_the_local_apic() -> None:
    """A read of more than a register from the local APIC's page gives nothing of what was read elsewhere before."""
    machine = Machine(irqchip="split")
    machine.put(PDPT + 8 * 3, 0x7003)
    machine.put(0x7000 + 8 * (0xFEE00000 >> 21 & 511), 0xFEE00083)
    halted = threading.Timer(60, machine.cpus[0].kick)  # a HLT with a local APIC waits: ended by what the store does
    machine.on_access = lambda: machine.cpus[0].kick() if machine.accesses[-1][0] == "write" else None
    halted.start()
    with pytest.raises(AssertionError, match="KICKED"):
        machine.run(0, CODE, b"\x0f\x10\x06\x0f\x10\x03\x88\x06\xeb\xfe", rbx=0xFEE00020, rsi=DEVICE)
    halted.cancel()
    assert machine.cpus[0].get_state().fpu.xsave[160:176] == bytes(16)
    machine.close()


def test_invlpg_of_code_behind_a_segment_that_wraps(machine: Machine) -> None:
    """INVLPG drops code whose linear address is its segment's base plus EIP, round 4 GiB."""
    directory, table, high, base = 0x400000, 0x401000, 0x10000000, 0xFFFF0000

    def put(address: int, value: int) -> None:
        machine.memory.write(address, struct.pack("<I", value))

    for i in range(4):
        put(directory + 4 * i, i << 22 | 0x83)
    put(directory + 4 * (high >> 22), table | 3)
    put(table, 0x500003)
    for value, address in ((1, 0x500000), (2, 0x501000)):
        machine.memory.write(address, b"\xb8" + struct.pack("<I", value) + b"\xc3")  # mov eax, value; ret
    remap = b"\xc7\x05" + struct.pack("<II", table, 0x501003) + b"\x0f\x01\x3d" + struct.pack("<I", high)
    machine.memory.write(CODE, b"\xff\xd3\x89\xc6" + remap + b"\xff\xd3\xf4")  # call ebx; mov esi, eax; ..; call ebx
    cpu = machine.cpus[0]
    state = cpu.get_state()
    system = state.system
    system.cr0, system.cr3, system.cr4, system.efer = 0x80010033, directory, 0x690, 0
    system.cs = Segment(selector=8, base=base, limit=0xFFFFFFFF, type=11, db=1, g=1)
    for name in ("ss", "ds", "es"):
        setattr(system, name, Segment(selector=16, base=0, limit=0xFFFFFFFF, type=3, db=1, g=1))
    registers = state.registers
    registers.rip, registers.rbx = (one - base & 0xFFFFFFFF for one in (CODE, high))
    registers.rsp, registers.rflags = 0x200000, 2
    cpu.set_state(state)
    assert cpu.run(machine.ops).reason is Exit.HALTED
    registers = cpu.get_state().registers
    assert (registers.rsi, registers.rax) == (1, 2)


@pytest.mark.parametrize("codes", ["8fe97880c1 8fe978804010", "0f0fc19e 0f0fc100", "62f17c4810c1 62f17c48104101"])
def test_encodings_of_other_processors(machine: Machine, codes: str) -> None:
    """XOP, 3DNow! and AVX-512 encodings of any length raise #UD, after a try or two."""
    for code in codes.split():
        with pytest.raises(AssertionError, match="first vector 6"):
            machine.run(0, CODE, bytes.fromhex(code))
        assert machine.cpus[0].tries <= 2


def test_an_instruction_that_is_never_found_ends(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction for which no template can be kept raises #UD after a bounded number of tries."""
    monkeypatch.setattr(machine.vm.blocks, "_add_template", lambda *_: True)
    with pytest.raises(AssertionError, match="first vector 6"):
        machine.run(0, CODE, b"\x62\xf1\x7c\x48\x10\xc7\x90")

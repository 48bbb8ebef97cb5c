"""The model-specific registers and the CPUID of the processor that guests see."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from cardcage.accelerator import VmSpec
from cardcage.errors import UsageError
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.x86 import reset_state
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from cardcage_tcg.cpu.msrlist import MSRS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_tcg.cpu.vcpu import TcgVCpu

ALL = (1 << 64) - 1
ODD = 0xAAAA_AAAA_AAAA_AAAA  # not canonical


@pytest.fixture
def cpu() -> Iterator[TcgVCpu]:
    vm = Tcg().create_vm(VmSpec(cpus=2, irqchip="split", cpu="max"))
    vm.create_vcpu(0)
    yield vm.create_vcpu(1)
    vm.close()


@pytest.mark.parametrize(
    ("index", "value", "reads"),
    [
        *((0xC0010000 + at, 0x530076, 0) for at in range(8)),
        (0xC0010010, 0x7C0000, 0), (0xC0010015, 1 << 6, 1 << 6), (0xC0010015, 1 << 18, 1 << 18), (0xC0010015, 1, 0),
        (0xC0010015, 1 << 25, None), (0xC001001A, 0xC000_0000, 0xC000_0000), (0xC001001A, 1 << 40, None),
        (0x200, 0xC000_0000, 0xC000_0000), (0x200, 0x80_0000_0006, 0x80_0000_0006), (0x20E, 1 << 40, None),
        (0x20E, 2, None), (0x20E, 7, None), (0x200, 0x106, None), (0x201, 0xFF_FFFF_F800, 0xFF_FFFF_F800),
        (0x20F, 0x700, None), (0x20F, 1 << 63, None), (0x20F, 1 << 40, None),
        *((at, 0x0605_0401_0006_0504, 0x0605_0401_0006_0504) for at in (0x250, 0x258, 0x259, 0x268, 0x26F)),
        *((at, 2 << 8 * byte, None) for at in (0x250, 0x26F) for byte in range(8)), (0x268, 7, None),
        (0x268, 0x1E, None), (0x2FF, 0xC06, 0xC06), (0x2FF, 0x806, 0x806), (0x2FF, 0xC02, None), (0x2FF, 0x1006, None),
        (0x2FF, 0x106, None), (0xFE, 0x508, None),
        (0x277, 0x0706_0504_0100_0706, 0x0706_0504_0100_0706), *((0x277, 2 << 8 * byte, None) for byte in range(8)),
        (0x277, 3, None), (0x277, 0x80, None),
        (0x179, 0, None), (0x17B, 0, 0), (0x17B, ODD, None), (0x17A, 7, 7),
        (0x400, 0, 0), (0x400, ALL, ALL), (0x410, ALL & ~(1 << 10), ALL & ~(1 << 10)), (0x400, ODD, None),
        (0x401, 0, 0), (0x401, 1, None), (0x402, ODD, ODD), (0x403, ODD, ODD), (0x426, ALL, ALL), (0x428, 0, None),
        (0x1D9, 0, 0), (0x1D9, 3, 0), (0x1D9, 1 << 6, None), (0x1DB, 0, None), (0x1A0, ALL, ALL & ~0x1880 | 0x1800),
        (0x48, 0, None), (0xC0010117, 0, None), (0xC0010140, 0, None), (0xC0010200, 0, None),
        (0xDA0, 0, None), (0x4B564D03, 0, None), (0x4B564D02, 3, 3), (0x4B564D02, 0x13, None),
        (0x186, 0, None), (0xC1, 0, None), (0x199, 0, None),
    ],
)  # fmt: skip
def test_writes(cpu: TcgVCpu, index: int, value: int, reads: int | None) -> None:
    """An MSR holds the bits that it has, and refuses (None) reserved ones, invalid types, and what is read-only."""
    before = cpu.msrs.read(index)
    assert cpu.msrs.write(index, value) == (reads is not None)
    assert cpu.msrs.read(index) == (before if reads is None else reads)


def test_reset_values(cpu: TcgVCpu) -> None:
    """After power-up all memory is write-back, PAT and machine check controls as the manuals have them."""
    expected = {
        0xFE: 0x508, 0x2FF: 0, 0x200: 0, 0x201: 0, 0x250: 0, 0x277: 0x0007040600070406, 0x179: 0x10A, 0x17B: ALL,
        0x400: ALL, 0x401: 0, 0x402: 0, 0x424: ALL, 0xC0010000: 0, 0xC0010007: 0, 0x1D9: 0, 0xC0010015: 0, 0x8B: 0,
    }  # fmt: skip
    assert {index: cpu.msrs.read(index) for index in expected} == expected


def test_status_can_be_written_when_hwcr_says_so(cpu: TcgVCpu) -> None:
    """HWCR.McStatusWrEn lets any value into MCi_STATUS."""
    assert not cpu.msrs.write(0x405, 1 << 63)
    assert cpu.msrs.write(0xC0010015, 1 << 18)
    assert (cpu.msrs.write(0x405, 1 << 63), cpu.msrs.read(0x405)) == (True, 1 << 63)


def test_init_keeps_them_and_reset_does_not(cpu: TcgVCpu) -> None:
    """INIT leaves MTRRs and PAT; the local APIC's registers are those of power-up after it, and a SIPI waits."""
    for index, value in ((0x2FF, 0xC06), (0x277, 6), (0x200, 6)):
        assert cpu.msrs.write(index, value)
    native = cpu.vm.native
    native.apic_write(cpu.pointer, 0xF0, 0x1FF)
    native.apic_write(cpu.pointer, 0x320, 0x300EC)
    cpu._init()
    assert [cpu.msrs.read(index) for index in (0x2FF, 0x277, 0x200)] == [0xC06, 6, 6]
    page = cpu.get_state().lapic
    assert page is not None
    assert [int.from_bytes(page[at : at + 4], "little") for at in (0x20, 0xF0, 0x320)] == [1 << 24, 0xFF, 0x10000]
    state = cpu.get_state()
    state.msrs = {}
    cpu.set_state(state)
    assert [cpu.msrs.read(index) for index in (0x2FF, 0x200)] == [0, 0]


def test_state_holds_them(cpu: TcgVCpu) -> None:
    """Each MSR that holds something is in the state and comes back; one that is unknown is refused."""
    state = cpu.get_state()
    state.msrs[0x2FF], state.msrs[0xC0010015] = 0xC00, 1 << 18
    cpu.set_state(state)
    assert (cpu.msrs.read(0x2FF), cpu.get_state().msrs[0xC0010015]) == (0xC00, 1 << 18)
    state.msrs[0x12345678] = 0
    for _ in range(2):
        with pytest.raises(UsageError, match="0x12345678"):
            cpu.set_state(state)


def test_the_same_state_again(cpu: TcgVCpu) -> None:
    """A state that is set again has what it has by then, and takes back what the guest wrote meanwhile."""
    state = cpu.get_state()
    for value in (0xC00, 0xC00, 0x800):
        state.msrs[0x2FF] = value
        cpu.set_state(state)
        assert cpu.msrs.read(0x2FF) == value
        cpu.msrs.write(0x2FF, 0x806)
        assert cpu.get_state().msrs[0x2FF] == 0x806


@pytest.mark.parametrize(("apart", "adjust", "differ"), [(10**6, 0, 0), (-(10**6), 5000, 5000), (10**14, 0, 10**14)])
def test_time_stamp_counters_agree(cpu: TcgVCpu, apart: int, adjust: int, differ: int) -> None:
    """Processors whose states were read and are set one after the other have equal counters, but for what the guest has
    added to one; counters that are far apart stay so."""
    first = cpu.vm.cpus[0]
    for one in (first, cpu):
        state = one.get_state()
        assert state.tsc is not None
        if one is cpu:
            state.tsc += apart
            state.msrs[0x3B] = adjust
        one.set_state(state)
    found = cpu.words[L.TSC_OFFSET // 8] - first.words[L.TSC_OFFSET // 8] & ALL
    assert found == differ or (differ == 10**14 and abs(found - differ) < 10**11)


def test_all_can_be_read(cpu: TcgVCpu) -> None:
    """Whatever the table names can be read, and takes its own value unless it is read-only."""
    for index, msr in MSRS.items():
        value = cpu.msrs.read(index)
        assert value == msr.reset
        assert cpu.msrs.write(index, value) != msr.readonly


def test_apic_bit_follows_its_base(cpu: TcgVCpu) -> None:
    """CPUID shows an APIC while APIC_BASE enables it, on both leaves; leaf 0xB shows its ID on all subleaves."""
    for base, bit in ((0xFEE00800, 1), (0xFEE00000, 0), (0xFEE00C00, 1)):
        state = cpu.get_state()
        state.system.apic_base = base
        cpu.set_state(state)
        assert [cpu.cpuid(leaf, 0)[3] >> 9 & 1 for leaf in (1, 0x80000001)] == [bit, bit]
    assert [cpu.cpuid(0xB, sub) for sub in (0, 1, 2)] == [(0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 2, 1)]


def test_mtrrs_are_announced(cpu: TcgVCpu) -> None:
    """MTRR and PAT are in both feature leaves, and 40 bits of physical address."""
    assert all(cpu.cpuid(leaf, 0)[3] >> 12 & 1 and cpu.cpuid(leaf, 0)[3] >> 16 & 1 for leaf in (1, 0x80000001))
    assert cpu.cpuid(0x80000008, 0)[0] & 0xFF == 40


def test_tsc_adjust(cpu: TcgVCpu) -> None:
    """TSC_ADJUST moves the TSC by what it changes, and a write of the TSC moves TSC_ADJUST."""
    before = cpu.registers.field(L.TSC_OFFSET)
    assert cpu.msrs.read(0x3B) == 0
    assert cpu.msrs.write(0x3B, 1 << 50)
    assert (cpu.registers.field(L.TSC_OFFSET) - before & ALL, cpu.msrs.read(0x3B)) == (1 << 50, 1 << 50)
    assert cpu.msrs.write(0x3B, ALL)
    assert cpu.registers.field(L.TSC_OFFSET) == before - 1 & ALL
    state = cpu.get_state()
    assert state.msrs[0x3B] == ALL
    cpu.set_state(state)
    assert cpu.msrs.read(0x3B) == ALL


def test_what_is_not_announced_faults() -> None:
    """A processor without TSC_ADJUST has no such MSR."""
    vm = Tcg().create_vm(VmSpec(cpus=1, irqchip="none", cpu="x86-64-v2"))
    try:
        cpu = vm.create_vcpu(0)
        assert (cpu.msrs.read(0x3B), cpu.msrs.write(0x3B, 0)) == (None, False)
    finally:
        vm.close()


@pytest.fixture
def pair() -> Iterator[tuple[PhysicalMemory, list[TcgVCpu]]]:
    vm = Tcg().create_vm(VmSpec(cpus=2, irqchip="split"))
    memory = PhysicalMemory()
    memory.add(RamRange(0, 1 << 20, RamBlock(1 << 20)))
    memory.attach(vm)
    yield memory, [vm.create_vcpu(index) for index in range(2)]
    vm.close()
    memory.close()


def kvmclock(memory: PhysicalMemory, address: int, tsc: int) -> int:
    """The nanoseconds that a guest works out of the structure at *address* and its counter."""
    _, _, zero, start, multiplier, shift, _ = struct.unpack("<IIQQIbB2x", memory.read(address, 32))
    ticks = tsc - zero & ALL
    return start + ((ticks << shift if shift >= 0 else ticks >> -shift) * multiplier >> 32)


def test_kvmclock_is_the_same_on_all_processors(pair: tuple[PhysicalMemory, list[TcgVCpu]]) -> None:
    """Processors that turned it on at different times say the same nanosecond at the same moment, whatever the guest
    added to one's TSC."""
    memory, cpus = pair
    assert cpus[1].msrs.write(0x3B, 12345)
    for index, cpu in enumerate(cpus):
        assert cpu.msrs.write(0x4B564D01, 0x1000 + 64 * index | 1)
    for tsc in (10**9, 10**12):
        assert kvmclock(memory, 0x1000, tsc) == kvmclock(memory, 0x1040, tsc + 12345)


def test_kvmclock_goes_on_in_another_machine(pair: tuple[PhysicalMemory, list[TcgVCpu]]) -> None:
    """A state that is put elsewhere has the clock that it had: it follows the TSC, and not the machine's age."""
    memory, (first, second) = pair
    assert first.msrs.write(0x4B564D01, 0x1001)
    before, state = kvmclock(memory, 0x1000, 10**12), first.get_state()
    second.set_state(state)
    assert kvmclock(memory, 0x1000, 10**12) == before


def test_reset_takes_back_what_was_added_to_the_tsc(cpu: TcgVCpu) -> None:
    """A state without TSC_ADJUST leaves the TSC as though the guest had never changed it; one with it, as it is."""
    before = cpu.registers.field(L.TSC_OFFSET)
    assert cpu.msrs.write(0x3B, 1 << 50)
    state = cpu.get_state()
    state.tsc = None
    cpu.set_state(state)
    assert cpu.registers.field(L.TSC_OFFSET) == before + (1 << 50) & ALL
    cpu.set_state(reset_state(bootstrap=False))
    assert (cpu.registers.field(L.TSC_OFFSET), cpu.msrs.read(0x3B)) == (before, 0)

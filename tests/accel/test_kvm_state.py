"""The accelerator kvm: memory slots, dirty pages, the state of a vCPU, CPU models."""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace

import pytest
from attrs import evolve
from cardcage.accelerator import MemorySlot
from cardcage.errors import AcceleratorError, ConfigError, StateError, UsageError
from cardcage.x86 import Registers
from cardcage_kvm import cpuid
from cardcage_kvm.accel import KvmOptions
from kvm_bench import MakeBench, Ops


def test_slots_are_checked_and_their_numbers_used_again(kvm_bench: MakeBench) -> None:
    """Slots must be whole pages, are removed exactly as they were added, and their numbers come back."""
    vm = kvm_bench().vm
    with pytest.raises(UsageError, match="whole pages"):
        vm.map_memory(MemorySlot(0x100800, 4096, 0))
    page = mmap.mmap(-1, 4096)
    slot = MemorySlot(0x100000, 4096, ctypes.addressof(ctypes.c_char.from_buffer(page)))
    for _ in range(3):
        vm.map_memory(slot)
        assert vm.slots.number(slot) == 1
        with pytest.raises(UsageError, match="not mapped"):
            vm.unmap_memory(evolve(slot, readonly=True))
        vm.unmap_memory(slot)
    with pytest.raises(AcceleratorError, match="KVM_SET_USER_MEMORY_REGION"):
        vm.map_memory(evolve(slot, address=0x1000))


@pytest.mark.parametrize("ring", [0, 1024])
def test_dirty_pages_are_those_written(kvm_bench: MakeBench, ring: int) -> None:
    """The dirty log, and the dirty ring, name exactly the pages written since the last fetch."""
    try:
        machine = kvm_bench(options=KvmOptions(dirty_ring=ring))
    except AcceleratorError as error:
        pytest.skip(str(error))
    code = "a3 00 50 00 00 a3 00 70 00 00 f4"  # mov [0x5000], eax; mov [0x7000], eax
    with pytest.raises(StateError, match="not started"):
        machine.vm.fetch_dirty_log(machine.slot)
    machine.vm.start_dirty_log()
    machine.load(code).run(Ops())
    assert machine.vm.fetch_dirty_log(machine.slot) == (1 << 5 | 1 << 7).to_bytes(2, "little")
    assert machine.vm.fetch_dirty_log(machine.slot) == bytes(2)
    machine.load(code).run(Ops())
    assert machine.vm.fetch_dirty_log(machine.slot) == (1 << 5 | 1 << 7).to_bytes(2, "little")
    machine.vm.stop_dirty_log()


def test_the_dirty_log_hears_of_other_writers(kvm_bench: MakeBench) -> None:
    """What memory_written is told, and what another process says it wrote, is in the next fetch, and only then."""
    machine = kvm_bench()
    switched: list[bool] = []
    wrote = [(0x2000, 1), (0x8FFF, 2)]  # the last page is the slot's end or past it
    writer = SimpleNamespace(log_writes=switched.append, collect_writes=lambda: [wrote.pop()] if wrote else [])
    machine.vm.memory_written(0x1000, 1)
    machine.vm.add_writer(writer)
    machine.vm.start_dirty_log()
    machine.vm.memory_written_many([(0x4FFF, 2), (1 << 40, 5)])
    pages = -(-machine.slot.size // 4096)
    expected = 1 << 4 | 1 << 5 | sum(1 << at for at in (8, 9) if at < pages)
    assert int.from_bytes(machine.vm.fetch_dirty_log(machine.slot), "little") == expected
    assert int.from_bytes(machine.vm.fetch_dirty_log(machine.slot), "little") == 1 << 2
    assert not any(machine.vm.fetch_dirty_log(machine.slot))
    machine.vm.stop_dirty_log()
    machine.vm.remove_writer(writer)
    assert switched == [True, False]


def test_state_that_cannot_be_held_is_refused(kvm_bench: MakeBench) -> None:
    """Values out of range, unknown MSRs, a local APIC page without a local APIC: each is refused by name."""
    vcpu = kvm_bench().vcpus[0]
    state = vcpu.get_state()
    assert state.lapic is None
    for change, problem in (
        (evolve(state, registers=Registers(rax=1 << 64)), "rax"),
        (evolve(state, msrs={0x12345: 0}), "0x12345"),
        (evolve(state, lapic=bytes(1024)), "no local APIC"),
        (evolve(state, fpu=evolve(state.fpu, xsave=bytes(10))), "XSAVE state of 10 bytes"),
        (evolve(state, events=evolve(state.events, startup="wait-for-sipi")), "SIPI"),
        (evolve(state, events=evolve(state.events, startup="asleep")), "asleep"),
    ):
        with pytest.raises(UsageError, match=problem):
            vcpu.set_state(change)


@pytest.mark.parametrize("irqchip", ["none", "split", "full"])
def test_state_comes_back_as_it_was_set(kvm_bench: MakeBench, irqchip: str) -> None:
    """All state read from one vCPU and set in a fresh one of another VM reads the same there."""
    first = kvm_bench(irqchip=irqchip).load("40 f4")
    state = first.get_state()
    state.registers.r9, state.debug = 0x1234, (1, 2, 3, 4, 0xFFFF0FF0, 0x400)
    state.msrs[0xC0000082], state.msrs[0x2FF] = 0x5678, 0xC06  # LSTAR; MTRRdefType, which KVM keeps and does not list
    first.set_state(state)
    before = first.get_state()
    second = kvm_bench(irqchip=irqchip).vcpus[0]
    second.set_state(before)
    after = second.get_state()
    assert after.registers == before.registers
    assert after.system == before.system
    assert after.fpu == before.fpu
    assert after.debug == before.debug
    assert after.lapic == before.lapic
    assert after.events == before.events
    assert (after.msrs[0xC0000082], after.msrs[0x2FF]) == (0x5678, 0xC06)
    moving = {0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x40000020, 0x6E0, 0x3B}  # clocks
    assert {k: v for k, v in after.msrs.items() if k not in moving} == {
        k: v for k, v in before.msrs.items() if k not in moving
    }


def leaf(leaves: list[cpuid.Leaf], function: int) -> cpuid.Leaf:
    return next(one for one in leaves if one.function == function)


def test_cpu_models_filter_and_features_switch() -> None:
    """x86-64-v2 hides AVX and more; features switch by name; what the host lacks or nobody knows is refused."""
    host = [
        cpuid.Leaf(0, 0, 0, 0xD, 0, 0, 0),
        cpuid.Leaf(1, 0, 0, 0, 0, 1 << 28 | 1 << 26 | 1 << 20 | 1 << 21, 1 << 9),
        cpuid.Leaf(7, 0, 1, 0, 1 << 5 | 1 << 7, 0, 0),
        cpuid.Leaf(0xD, 0, 1, 0xE7, 0, 2688, 0),
        cpuid.Leaf(0xD, 2, 1, 256, 576, 0, 0),
        cpuid.Leaf(0xD, 5, 1, 64, 832, 0, 0),
    ]

    def model(cpu: str, features: dict[str, bool] | None = None, irqchip: str = "split") -> list[cpuid.Leaf]:
        return cpuid.model(host, cpu, features or {}, irqchip=irqchip, deadline=True)

    assert leaf(model("max"), 1).ecx == host[1].ecx | 1 << 24 | 1 << 31
    assert leaf(model("x86-64-v2"), 1).ecx == 1 << 20 | 1 << 21 | 1 << 24 | 1 << 31
    assert leaf(model("x86-64-v2"), 7).ebx == 1 << 7
    assert not any(one.function == 0xD for one in model("x86-64-v2"))
    with_avx = model("x86-64-v2", {"avx2": True, "avx": True, "xsave": True})
    assert leaf(with_avx, 7).ebx == 1 << 5 | 1 << 7
    assert (leaf(with_avx, 0xD).eax, leaf(with_avx, 0xD).ecx) == (7, 832)
    assert leaf(model("x86-64-v3", {"avx": False}), 0xD).eax == 3
    assert leaf(model("max", {"sse4.2": False}), 1).ecx & 1 << 20 == 0
    none = leaf(model("max", irqchip="none"), 1)
    assert (none.ecx >> 21 & 1, none.ecx >> 24 & 1, none.edx >> 9 & 1) == (0, 0, 0)
    with pytest.raises(ConfigError, match="cannot offer"):
        model("max", {"avx512f": True})
    with pytest.raises(ConfigError, match='Did you mean "avx" or "avx2"'):
        model("max", {"avx3": True})
    with pytest.raises(ConfigError, match='Did you mean "host"'):
        model("hosst")


def test_topology_leaves_name_each_processor() -> None:
    """Leaf 1 and leaf 0xB give each vCPU its APIC ID, and the number of processors of the package."""
    host = [cpuid.Leaf(0, 0, 0, 0xD, 0, 0, 0), cpuid.Leaf(1, 0, 0, 0, 0xFF00FFFF, 0, 0)]
    found = cpuid.for_vcpu(host, 2, 3)
    entries = {(one.function, one.index): one for one in found.elements}
    assert entries[1, 0].ebx >> 24 == 2
    assert entries[1, 0].ebx >> 16 & 0xFF == 4
    assert entries[0xB, 1].edx == 2
    assert entries[0xB, 1].ebx == 3

"""The accelerator kvm: a VM that is parked, and one in a forked process, without the rest of a machine."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable

import pytest
from attrs import evolve
from cardcage.accelerator import VmSpec
from cardcage.errors import AcceleratorError
from cardcage.vcpu import Exit
from cardcage.x86 import VCpuState
from cardcage_kvm import abi, parking, state
from cardcage_kvm.accel import KvmOptions
from cardcage_kvm.vcpu import KvmVCpu
from cardcage_kvm.vm import KvmVm
from kvm_bench import CODE, Bench, MakeBench, Ops
from test_kvm_interrupts import enable_apic_and_wait

pytestmark = pytest.mark.once

CLOCKS = {0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x40000020, 0x6E0, 0x3B}
"""MSRs that say where the guest has its clocks, and what they show."""


def forked(bench: Bench, act: Callable[[], object]) -> str:
    """What *act* returns in a child, where the VM is that of the child; or what was raised."""
    vm = bench.vm
    vm.park()
    vm.before_fork()
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that other tests left
        pid = os.fork()
    if pid == 0:
        try:
            vm.after_fork(child=True)
            vm.unpark()
            os.write(theirs, repr(act()).encode())
        except BaseException as error:
            os.write(theirs, repr(error).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    vm.after_fork(child=False)
    vm.unpark()
    with os.fdopen(ours) as told:
        found = told.read()
    os.waitpid(pid, 0)
    return found


def seen(found: VCpuState) -> VCpuState:
    """A state but for its clocks, and the header of XSAVE, which says what is as after power-up, or says nothing."""
    fpu = evolve(found.fpu, xsave=found.fpu.xsave[:512] + found.fpu.xsave[576:])
    return evolve(found, tsc=None, fpu=fpu, msrs={at: value for at, value in found.msrs.items() if at not in CLOCKS})


def clock(vm: KvmVm) -> int:
    found = abi.ClockData()
    abi.ioctl(vm.fd, abi.GET_CLOCK, found)
    return found.clock


def test_kvmclock_stands(kvm_bench: MakeBench) -> None:
    """The clock that guests have of KVM goes on, after the VM was parked, from where it stood."""
    vm = kvm_bench(irqchip="split").vm
    began = clock(vm)
    vm.park()
    while clock(vm) < began + 50_000_000:
        pass
    later = clock(vm)
    vm.unpark()
    assert began <= clock(vm) < later


def test_time_stamp_counters_go_back_together(kvm_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each vCPU's counter is put back by the host's ticks that went by, whatever the difference between them."""
    vm = kvm_bench(irqchip="split", cpus=2).vm
    offsets, host = [1 << 40, 7], [5000]

    def attribute(vcpu: object, request: abi.Request, value: int) -> int:
        index = next(at for at, one in enumerate(vm.vcpus) if one is vcpu)
        if request is abi.SET_DEVICE_ATTR:
            offsets[index] = value
        return offsets[index]

    monkeypatch.setattr(parking, "_attribute", attribute)
    monkeypatch.setattr(state, "read_msrs", lambda fd, indices: {state.MSR_TSC: host[0] + offsets[0]})
    vm.park()
    host[0] += 1000
    vm.unpark()
    assert offsets == [(1 << 40) - 1000, (7 - 1000) & (1 << 64) - 1]


@pytest.mark.parametrize("ring", [0, 1024])
@pytest.mark.parametrize("irqchip", ["none", "split", "full"])
def test_a_forked_process_has_the_same_vm(kvm_bench: MakeBench, irqchip: str, ring: int) -> None:
    """In the child each vCPU has the parent's state, also a second that was never started, and goes on from there with
    memory of its own; the parent's goes on as if nothing had been."""
    try:
        bench = kvm_bench(irqchip=irqchip, cpus=2, options=KvmOptions(dirty_ring=ring))
    except AcceleratorError as error:
        pytest.skip(str(error))
    vcpu = bench.load("40 a3 00 50 00 00 e6 10 40 a3 00 50 00 00 e6 11 f4")  # inc eax; [0x5000] = eax; out 0x10, twice
    new = vcpu.get_state()
    new.registers.r9, new.debug = 0x1234, (1, 2, 3, 4, 0xFFFF0FF0, 0x400)
    new.msrs[0xC0000082] = 0x5678
    vcpu.set_state(new)
    assert vcpu.run(Ops(lambda port, value: vcpu.kick())).reason is Exit.KICKED
    before = [seen(one.get_state()) for one in bench.vcpus]
    inside = vcpu.fd, bench.vm.fd

    def goes_on() -> object:
        same = [seen(one.get_state()) == two for one, two in zip(bench.vcpus, before, strict=True)]
        ended = vcpu.run(Ops(lambda port, value: vcpu.kick())).reason
        return same, ended, bench.page[0x5000], inside[1] == bench.vm.fd

    assert forked(bench, goes_on) == repr(([True, True], Exit.KICKED, 2, True))
    assert bench.page[0x5000] == 1
    assert [seen(one.get_state()) for one in bench.vcpus] == before
    assert (vcpu.fd, bench.vm.fd) == inside
    assert vcpu.run(Ops(lambda port, value: vcpu.kick())).reason is Exit.KICKED
    assert bench.page[0x5000] == 2


def test_what_is_about_to_be_delivered_is_in_both(kvm_bench: MakeBench) -> None:
    """An NMI that waits, blocked by another, and the shadow of STI are in the child as KVM has them."""
    bench = kvm_bench(irqchip="split")
    vcpu = bench.load("f4")
    events = state.read_events(vcpu.fd)
    events.nmi_pending = events.nmi_masked = 1
    events.interrupt_shadow, events.flags = abi.SHADOW_STI, abi.EVENT_NMI_PENDING | abi.EVENT_SHADOW
    abi.ioctl(vcpu.fd, abi.SET_VCPU_EVENTS, events)
    before = bytes(state.read_events(vcpu.fd))
    assert forked(bench, lambda: bytes(state.read_events(vcpu.fd)) == before) == "True"


def ports_of(vcpu: KvmVCpu) -> list[int]:
    """Run until the handler has said so at a port: the ports."""
    ops = Ops(lambda port, value: vcpu.kick())
    assert vcpu.run(ops).reason is Exit.KICKED
    return [one[1] for one in ops.seen]


def test_the_irqchip_in_the_kernel_is_in_both(kvm_bench: MakeBench) -> None:
    """With irqchip full, a line that was programmed before the fork interrupts on both sides; so does the 8254."""
    bench = kvm_bench(irqchip="full")
    vcpu = enable_apic_and_wait(bench, 0x42)
    ioapic = "b0 ff e6 21 c7 05 00 00 c0 fe 18 00 00 00 c7 05 10 00 c0 fe 42 00 00 00"  # PIC masked, pin 4: vector 0x42
    start = bytes.fromhex(ioapic + "c7 05 f0 00 e0 fe ff 01 00 00 e6 11 fb f4 eb fd")
    bench.page[CODE : CODE + len(start)] = start
    assert vcpu.run(Ops(lambda port, value: vcpu.kick())).reason is Exit.KICKED  # at OUT 0x11

    def interrupted() -> list[int]:
        bench.vm.set_irq(4, True)
        bench.vm.set_irq(4, False)
        return ports_of(vcpu)

    assert forked(bench, interrupted) == "[16]"
    assert interrupted() == [16]


def test_the_timer_in_the_kernel_is_in_both(kvm_bench: MakeBench) -> None:
    """With irqchip full, the in-kernel 8254 that runs when the process forks interrupts on both sides."""
    bench = kvm_bench(irqchip="full")
    vcpu = enable_apic_and_wait(bench, 0x20)
    pic = "b0 11 e6 20 b0 20 e6 21 b0 04 e6 21 b0 01 e6 21 b0 fe e6 21"  # ICW1-4, only IRQ 0
    pit = "b0 30 e6 43 b0 ff e6 40 b0 ff e6 40"  # channel 0, mode 0: in 55 ms
    lint0 = "c7 05 50 03 e0 fe 00 07 00 00"  # ExtINT
    start = bytes.fromhex(f"c7 05 f0 00 e0 fe ff 01 00 00 {lint0} {pic} {pit} e6 11 fb f4 eb fd")
    bench.page[CODE : CODE + len(start)] = start
    assert vcpu.run(Ops(lambda port, value: vcpu.kick() if port == 0x11 else None)).reason is Exit.KICKED

    assert forked(bench, lambda: ports_of(vcpu)) == "[16]"
    assert ports_of(vcpu) == [16]


@pytest.mark.parametrize("mode", [0, 1 << 17])
def test_the_timer_of_a_local_apic_is_in_both(kvm_bench: MakeBench, mode: int) -> None:
    """A local APIC's timer, one-shot and periodic, that runs when the process forks interrupts on both sides."""
    bench = kvm_bench(irqchip="split")
    vcpu = enable_apic_and_wait(bench, 0x41)
    words = ((0xF0, 0x1FF), (0x3E0, 0xB), (0x320, 0x41 | mode), (0x380, 50_000_000))  # SVR; by one; timer; 50 ms
    stores = b"".join(b"\xc7\x05" + struct.pack("<II", 0xFEE00000 + at, value) for at, value in words)
    start = stores + bytes.fromhex("e6 11 fb f4 eb fd")
    bench.page[CODE : CODE + len(start)] = start
    assert vcpu.run(Ops(lambda port, value: vcpu.kick() if port == 0x11 else None)).reason is Exit.KICKED

    assert forked(bench, lambda: ports_of(vcpu)) == "[16]"
    assert ports_of(vcpu) == [16]


@pytest.mark.parametrize("ring", [0, 1024])
def test_a_dirty_log_is_in_both(kvm_bench: MakeBench, ring: int) -> None:
    """Pages that were written before the fork, and not fetched, are told on both sides; the child's log goes on."""
    try:
        bench = kvm_bench(options=KvmOptions(dirty_ring=ring))
    except AcceleratorError as error:
        pytest.skip(str(error))
    code = "a3 00 50 00 00 a3 00 70 00 00 f4"  # mov [0x5000], eax; mov [0x7000], eax
    both = (1 << 5 | 1 << 7).to_bytes(2, "little")
    bench.vm.start_dirty_log()
    bench.load(code).run(Ops())

    def told() -> list[bytes]:
        first = bench.vm.fetch_dirty_log(bench.slot)
        bench.load(code).run(Ops())
        return [first, bench.vm.fetch_dirty_log(bench.slot), bench.vm.fetch_dirty_log(bench.slot)]

    assert forked(bench, told) == repr([both, both, bytes(2)])
    assert told() == [both, both, bytes(2)]


def test_eventfds_are_refused() -> None:
    """A VM with a doorbell or an irqfd says why it cannot be forked, as long as it has one: two would answer it."""
    bench = Bench(VmSpec(irqchip="split"))
    fd = os.eventfd(0)
    try:
        assert bench.vm.may_fork() == ""
        bench.vm.add_doorbell(fd, 0x10, 1, pio=True, value=None)
        assert "eventfds" in bench.vm.may_fork()
        bench.vm.remove_doorbell(fd, 0x10, 1, pio=True, value=None)
        route = bench.vm.add_irqfd(fd, 0xFEE00000, 0x41)
        assert "eventfds" in bench.vm.may_fork()
        bench.vm.remove_irqfd(fd, route)
        assert bench.vm.may_fork() == ""
    finally:
        os.close(fd)
        bench.vm.close()

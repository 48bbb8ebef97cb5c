"""The accelerator kvm: its own rules, beyond what the conformance programs show."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from attrs import evolve
from cardcage.accelerator import MemorySlot, VmSpec
from cardcage.errors import AcceleratorError, ConfigError, StateError, UsageError
from cardcage.vcpu import Exit
from cardcage.x86 import CR0_ET, CR0_PE, Registers, Segment
from cardcage_kvm import abi, cpuid
from cardcage_kvm.accel import Kvm, KvmOptions
from cardcage_kvm.kick import kick_signal
from cardcage_kvm.vcpu import KvmVCpu
from cardcage_kvm.vm import KvmVm

RAM = 0x10000
CODE = 0x1000


class Ops:
    """Records accesses; answers reads with *answer*; calls *on_write* for port writes."""

    def __init__(self, on_write: Callable[[int, int], None] | None = None, answer: int = 0) -> None:
        self.seen: list[tuple[str, int, int, int]] = []
        self.on_write, self.answer = on_write, answer

    def pio_read(self, port: int, size: int, /) -> int:
        self.seen.append(("in", port, size, self.answer))
        return self.answer

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        self.seen.append(("out", port, size, value))
        if self.on_write is not None:
            self.on_write(port, value)

    def mmio_read(self, address: int, size: int, /) -> int:
        self.seen.append(("read", address, size, self.answer))
        return self.answer

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        self.seen.append(("write", address, size, value))

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None:
        self.seen.append(("eoi", vector, 0, 0))


class Bench:
    """A VM with 64 KiB of RAM whose vCPUs start in flat 32-bit protected mode."""

    def __init__(self, spec: VmSpec) -> None:
        self.page = mmap.mmap(-1, RAM)
        self.slot = MemorySlot(0, RAM, ctypes.addressof(ctypes.c_char.from_buffer(self.page)))
        self.vm: KvmVm = Kvm().create_vm(spec)
        self.vm.map_memory(self.slot)
        self.vcpus = [self.vm.create_vcpu(index) for index in range(spec.cpus)]

    def load(self, code: str, at: int = CODE, index: int = 0) -> KvmVCpu:
        data = bytes.fromhex(code)
        self.page[at : at + len(data)] = data
        vcpu = self.vcpus[index]
        state = vcpu.get_state()
        state.registers = Registers(rip=at, rsp=0x8000)
        system, flat = state.system, Segment.flat(16)
        system.cr0, system.cs = CR0_PE | CR0_ET, Segment.flat(8, code=True)
        system.ds = system.es = system.fs = system.gs = system.ss = flat
        state.events.startup, state.events.halted = "running", False
        vcpu.set_state(state)
        return vcpu


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    found = Kvm().probe()
    if not found.usable:
        pytest.skip(found.reason)
    made: list[Bench] = []

    def make(**spec: object) -> Bench:
        made.append(Bench(VmSpec(**{"irqchip": "none", **spec})))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.vm.close()


def test_request_numbers_are_the_kernels() -> None:
    """Numbers computed from names and sizes are those of the kernel's header."""
    assert abi.RUN.number == 0xAE80
    assert abi.GET_REGS.number == 0x8090AE81
    assert abi.SET_SREGS.number == 0x4138AE84
    assert abi.SET_USER_MEMORY_REGION.number == 0x4020AE46
    assert abi.GET_SUPPORTED_CPUID.number == 0xC008AE05
    assert abi.GET_MSRS.number == 0xC008AE88
    assert abi.GET_VCPU_EVENTS.number == 0x8040AE9F
    assert abi.SET_XSAVE.number == 0x5000AEA5
    assert abi.SIGNAL_MSI.number == 0x4020AEA5
    assert abi.IRQFD.number == 0x4020AE76
    assert abi.IOEVENTFD.number == 0x4040AE79
    assert abi.ENABLE_CAP.number == 0x4068AEA3
    assert abi.GET_LAPIC.number == 0x8400AE8E
    assert abi.SET_DEBUGREGS.number == 0x4080AEA2
    assert ctypes.sizeof(abi.RoutingEntry) == 48


def test_probe_says_in_one_line_why_not(tmp_path: object) -> None:
    """Without a device, or with a file that is none, the probe gives one line that names it."""
    missing = Kvm(f"{tmp_path}/kvm").probe()
    assert not missing.usable
    assert missing.reason.startswith(f"{tmp_path}/kvm: not there")
    with open(f"{tmp_path}/file", "w"):
        wrong = Kvm(f"{tmp_path}/file").probe()
    assert not wrong.usable
    assert "\n" not in wrong.reason
    with pytest.raises(AcceleratorError, match="not there"):
        Kvm(f"{tmp_path}/kvm").create_vm(VmSpec())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_probe_names_the_group_when_permission_is_missing() -> None:
    """An account without access to /dev/kvm is told the group to join."""
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm")
    script = "from cardcage_kvm.accel import Kvm\nimport os\nos.setuid(65534)\nprint(Kvm().probe().reason)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    if os.stat("/dev/kvm").st_mode & 0o006 == 6:
        pytest.skip("everyone may use /dev/kvm here")
    assert found.stdout.startswith("/dev/kvm: permission denied; join group kvm")


def test_probe_is_kept_for_the_process(bench: Callable[..., Bench]) -> None:
    """A second probe gives the first one's answer without running its guest again."""
    assert Kvm().probe() is Kvm().probe()


def test_a_kick_before_run_ends_the_next_run(bench: Callable[..., Bench]) -> None:
    """A kick that comes before run makes the next one return at once, and only that one."""
    vcpu = bench().load("40 f4")  # inc eax; hlt
    vcpu.kick()
    assert vcpu.run(Ops()).reason is Exit.KICKED
    assert vcpu.get_state().registers.rax == 0
    assert vcpu.run(Ops()).reason is Exit.HALTED
    assert vcpu.get_state().registers.rax == 1


def test_halted_stays_halted_until_woken(bench: Callable[..., Bench]) -> None:
    """Without a wake-up, run after HLT comes back halted and runs nothing; a kick is still heard; an NMI wakes."""
    machine = bench()
    vcpu = machine.load("f4 40 f4")
    ops = Ops()
    assert vcpu.run(ops).reason is Exit.HALTED
    assert vcpu.run(ops).reason is Exit.HALTED
    vcpu.kick()
    assert vcpu.run(ops).reason is Exit.KICKED
    assert vcpu.get_state().events.halted
    assert vcpu.get_state().registers.rax == 0


def test_many_kicks_from_another_thread_all_arrive(bench: Callable[..., Bench]) -> None:
    """Each of many kicks of a spinning vCPU ends a run; none is lost and none is needed twice."""
    vcpu = bench().load("eb fe")
    for _ in range(200):
        ready = threading.Event()

        def kick(ready: threading.Event = ready) -> None:
            ready.wait()
            vcpu.kick()

        thread = threading.Thread(target=kick)
        thread.start()
        ready.set()
        assert vcpu.run(Ops()).reason is Exit.KICKED
        thread.join()


def test_an_exception_in_ops_leaves_run_with_whole_state(bench: Callable[..., Bench]) -> None:
    """What a device raises comes out of run unchanged, with RIP behind the instruction, and the vCPU can go on."""
    vcpu = bench().load("b8 05 00 00 00 e6 10 40 f4")  # mov eax, 5; out 0x10, al; inc eax; hlt

    def broken(port: int, value: int) -> None:
        raise RuntimeError("the device is broken")

    with pytest.raises(RuntimeError, match="the device is broken"):
        vcpu.run(Ops(broken))
    assert vcpu.get_state().registers.rip == CODE + 7
    assert vcpu.run(Ops()).reason is Exit.HALTED
    assert vcpu.get_state().registers.rax == 6


def test_state_is_whole_after_a_kick_within_ops(bench: Callable[..., Bench]) -> None:
    """A kick while a port read is served ends the run with the value in the register."""
    vcpu = bench().load("e4 10 40 f4")  # in al, 0x10; inc eax; hlt
    ops = Ops(answer=0x41)
    read = ops.pio_read

    def kicking(port: int, size: int, /) -> int:
        vcpu.kick()
        return read(port, size)

    ops.pio_read = kicking  # type: ignore[method-assign]
    assert vcpu.run(ops).reason is Exit.KICKED
    registers = vcpu.get_state().registers
    assert (registers.rax, registers.rip) == (0x41, CODE + 2)


def test_quiesce_holds_spinning_vcpus_out(bench: Callable[..., Bench]) -> None:
    """Inside quiesce no vCPU is in guest code and none comes in; afterwards they run on by themselves."""
    machine = bench(cpus=2)
    counter = machine.page
    vcpus = [
        machine.load("ff 05 00 20 00 00 eb f8", 0x1000, 0),  # l: inc dword [0x2000]; jmp l
        machine.load("ff 05 04 20 00 00 eb f8", 0x1800, 1),
    ]
    threads = [threading.Thread(target=vcpu.run, args=(Ops(),)) for vcpu in vcpus]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with machine.vm.quiesce(), machine.vm.quiesce():
                assert not any(vcpu.inside for vcpu in vcpus)
                before = counter[0x2000:0x2008]
                machine.vm.unmap_memory(machine.slot)
                machine.vm.map_memory(machine.slot)
                assert counter[0x2000:0x2008] == before
            goal = int.from_bytes(before[:4], "little")
            while int.from_bytes(counter[0x2000:0x2004], "little") == goal and threads[0].is_alive():
                pass
        assert all(thread.is_alive() for thread in threads)
    finally:
        for vcpu in vcpus:
            vcpu.kick()
        for thread in threads:
            thread.join()


def test_quiesce_within_ops(bench: Callable[..., Bench]) -> None:
    """A device may quiesce the VM on the vCPU's own thread while the other vCPU spins."""
    machine = bench(cpus=2)
    other = machine.load("eb fe", 0x1800, 1)
    vcpu = machine.load("e6 10 e6 10 f4")
    thread = threading.Thread(target=other.run, args=(Ops(),))
    thread.start()

    def quiesce(port: int, value: int) -> None:
        with machine.vm.quiesce():
            assert not other.inside

    try:
        assert vcpu.run(Ops(quiesce)).reason is Exit.HALTED
    finally:
        other.kick()
        thread.join()


def test_slots_are_checked_and_their_numbers_used_again(bench: Callable[..., Bench]) -> None:
    """Slots must be whole pages, are removed exactly as they were added, and their numbers come back."""
    vm = bench().vm
    with pytest.raises(UsageError, match="whole pages"):
        vm.map_memory(MemorySlot(0x100800, 4096, 0))
    page = mmap.mmap(-1, 4096)
    slot = MemorySlot(0x100000, 4096, ctypes.addressof(ctypes.c_char.from_buffer(page)))
    for _ in range(3):
        vm.map_memory(slot)
        assert vm.slot_number(slot) == 1
        with pytest.raises(UsageError, match="not mapped"):
            vm.unmap_memory(evolve(slot, readonly=True))
        vm.unmap_memory(slot)
    with pytest.raises(AcceleratorError, match="KVM_SET_USER_MEMORY_REGION"):
        vm.map_memory(evolve(slot, address=0x1000))


def test_doorbell_takes_the_write_and_signals(bench: Callable[..., Bench]) -> None:
    """A doorbell's write signals its eventfd and never reaches the machine; others do; removed, it reaches it again."""
    machine = bench()
    assert "doorbells" in machine.vm.capabilities
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    code = "b0 07 e6 10 b0 08 e6 10 f4"  # out 0x10: 7, then 8
    try:
        machine.vm.add_doorbell(fd, 0x10, 1, pio=True, value=7)
        ops = Ops()
        machine.load(code).run(ops)
        assert ops.seen == [("out", 0x10, 1, 8)]
        assert os.eventfd_read(fd) == 1
        machine.vm.remove_doorbell(fd, 0x10, 1, pio=True, value=7)
        machine.load(code).run(ops)
        assert ops.seen[1:] == [("out", 0x10, 1, 7), ("out", 0x10, 1, 8)]
        machine.vm.add_doorbell(fd, 0xD0000000, 4, pio=False, value=None)
        machine.load("a3 00 00 00 d0 f4").run(ops)  # mov [0xD0000000], eax
        assert os.eventfd_read(fd) == 1
        with pytest.raises(UsageError, match="3 bytes"):
            machine.vm.add_doorbell(fd, 0x10, 3, pio=True, value=None)
    finally:
        os.close(fd)


def enable_apic_and_wait(machine: Bench, vector: int) -> KvmVCpu:
    """A program that enables the xAPIC, waits for *vector* halted, and writes port 0x10 from its handler."""
    gate = 0x2000 + vector * 8
    handler = 0x1800
    machine.page[gate : gate + 8] = (handler & 0xFFFF | 8 << 16 | 0x8E00 << 32).to_bytes(8, "little")
    machine.page[0x3000:0x3018] = bytes.fromhex("0000000000000000 ffff0000009bcf00 ffff00000093cf00")
    machine.page[handler : handler + 3] = bytes.fromhex("e610f4")  # out 0x10, al; hlt
    vcpu = machine.load("c7 05 f0 00 e0 fe ff 01 00 00 e6 11 fb f4 eb fd")  # SVR = 0x1FF; out 0x11; sti; l: hlt; jmp l
    state = vcpu.get_state()
    state.system.idt = evolve(state.system.idt, base=0x2000, limit=0x7FF)
    state.system.gdt = evolve(state.system.gdt, base=0x3000, limit=0x17)
    vcpu.set_state(state)
    return vcpu


def test_irqfd_interrupts_the_guest(bench: Callable[..., Bench]) -> None:
    """Signalling a routed eventfd delivers its MSI; after the route is removed it does not."""
    machine = bench(irqchip="split")
    assert "irqfds" in machine.vm.capabilities
    fd = os.eventfd(0)
    try:
        route = machine.vm.add_irqfd(fd, 0xFEE00000, 0x41)
        vcpu = enable_apic_and_wait(machine, 0x41)

        def act(port: int, value: int) -> None:
            if port == 0x11:
                os.eventfd_write(fd, 1)
            else:
                vcpu.kick()

        ops = Ops(act)
        assert vcpu.run(ops).reason is Exit.KICKED
        assert [one[1] for one in ops.seen] == [0x11, 0x10]
        machine.vm.remove_irqfd(fd, route)
        with pytest.raises(UsageError, match="no interrupt route"):
            machine.vm.remove_irqfd(fd, route)
    finally:
        os.close(fd)


def test_messages_to_nobody_go_nowhere(bench: Callable[..., Bench]) -> None:
    """Messages whose address or data the guest made up neither raise nor stop the VM, as message or as route."""
    for irqchip in ("none", "split"):
        vm = bench(irqchip=irqchip).vm
        for address in (0xFEE55000, 0, 0xFFFFFFFFFFFFFFFF, 0xFEE00000FEE00000):
            for data in (0x41, 0xC041, 0xFFFFFFFF, 0):
                vm.signal_msi(address, data)
    fd = os.eventfd(0)
    try:
        vm.remove_irqfd(fd, vm.add_irqfd(fd, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF))
    finally:
        os.close(fd)


def test_full_irqchip_takes_lines(bench: Callable[..., Bench]) -> None:
    """With irqchip full, a line programmed in the in-kernel IOAPIC interrupts; ExtINT and bad lines are refused."""
    machine = bench(irqchip="full")
    vm = machine.vm
    assert "irqchip-full" in vm.capabilities
    with pytest.raises(StateError, match="8259"):
        vm.set_extint(True)
    with pytest.raises(UsageError, match="0 to 23"):
        vm.set_irq(24, True)
    vcpu = enable_apic_and_wait(machine, 0x42)
    ioapic = "b0 ff e6 21 c7 05 00 00 c0 fe 18 00 00 00 c7 05 10 00 c0 fe 42 00 00 00"  # PIC masked, pin 4: vector 0x42
    start = bytes.fromhex(ioapic + "c7 05 f0 00 e0 fe ff 01 00 00 e6 11 fb f4 eb fd")
    machine.page[CODE : CODE + len(start)] = start

    def act(port: int, value: int) -> None:
        if port == 0x11:
            vm.set_irq(4, True)
            vm.set_irq(4, False)
        else:
            vcpu.kick()

    ops = Ops(act)
    assert vcpu.run(ops).reason is Exit.KICKED
    assert [one[1] for one in ops.seen] == [0x11, 0x10]


def test_full_irqchip_has_a_timer(bench: Callable[..., Bench]) -> None:
    """With irqchip full, the in-kernel 8254 interrupts through the in-kernel 8259."""
    machine = bench(irqchip="full")
    vcpu = enable_apic_and_wait(machine, 0x20)
    pic = "b0 11 e6 20 b0 20 e6 21 b0 04 e6 21 b0 01 e6 21 b0 fe e6 21"  # ICW1-4, only IRQ 0
    pit = "b0 30 e6 43 b0 ff e6 40 b0 10 e6 40"  # channel 0, mode 0, 0x10FF
    lint0 = "c7 05 50 03 e0 fe 00 07 00 00"  # ExtINT
    start = bytes.fromhex(f"c7 05 f0 00 e0 fe ff 01 00 00 {lint0} {pic} {pit} fb f4 eb fd")
    machine.page[CODE : CODE + len(start)] = start
    ops = Ops(lambda port, value: vcpu.kick())
    assert vcpu.run(ops).reason is Exit.KICKED
    assert [one[1] for one in ops.seen] == [0x10]


@pytest.mark.parametrize("ring", [0, 1024])
def test_dirty_pages_are_those_written(bench: Callable[..., Bench], ring: int) -> None:
    """The dirty log, and the dirty ring, name exactly the pages written since the last fetch."""
    try:
        machine = bench(options=KvmOptions(dirty_ring=ring))
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


def test_the_dirty_log_hears_of_other_writers(bench: Callable[..., Bench]) -> None:
    """What memory_written is told, and what another process says it wrote, is in the next fetch, and only then."""
    machine = bench()
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


def test_failure_names_registers_and_bytes(bench: Callable[..., Bench]) -> None:
    """Code that runs off into nowhere fails with a sentence, the registers and the bytes at RIP."""
    ended = bench().load("b8 78 56 34 12 ea 00 00 00 d0 08 00").run(Ops())  # jmp to an address that no slot has
    assert ended.reason in (Exit.FAILED, Exit.SHUTDOWN)
    assert ended.detail.startswith("vCPU 0: ")
    assert "rip=" in ended.detail
    assert "bytes at RIP" in ended.detail


def test_triple_fault_is_a_shutdown(bench: Callable[..., Bench]) -> None:
    """An exception without an interrupt table ends as SHUTDOWN."""
    machine = bench()
    vcpu = machine.load("0f 0b")
    state = vcpu.get_state()
    state.system.idt = evolve(state.system.idt, limit=0)
    vcpu.set_state(state)
    ended = vcpu.run(Ops())
    assert ended.reason is Exit.SHUTDOWN
    assert "triple fault" in ended.detail


def test_state_that_cannot_be_held_is_refused(bench: Callable[..., Bench]) -> None:
    """Values out of range, unknown MSRs, a local APIC page without a local APIC: each is refused by name."""
    vcpu = bench().vcpus[0]
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
def test_state_comes_back_as_it_was_set(bench: Callable[..., Bench], irqchip: str) -> None:
    """All state read from one vCPU and set in a fresh one of another VM reads the same there."""
    first = bench(irqchip=irqchip).load("40 f4")
    state = first.get_state()
    state.registers.r9, state.debug = 0x1234, (1, 2, 3, 4, 0xFFFF0FF0, 0x400)
    state.msrs[0xC0000082], state.msrs[0x2FF] = 0x5678, 0xC06  # LSTAR; MTRRdefType, which KVM keeps and does not list
    first.set_state(state)
    before = first.get_state()
    second = bench(irqchip=irqchip).vcpus[0]
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


def test_vcpu_numbers_are_checked(bench: Callable[..., Bench]) -> None:
    """Each vCPU is created once, within the number that was asked for; a host's limit is named."""
    machine = bench()
    with pytest.raises(UsageError, match="expected each of 0 to 0 once"):
        machine.vm.create_vcpu(0)
    with pytest.raises(UsageError, match="expected each of 0 to 0 once"):
        machine.vm.create_vcpu(1)
    with pytest.raises(ConfigError, match="at most"):
        Kvm().create_vm(VmSpec(cpus=100000))


def test_closing_gives_all_descriptors_back(bench: Callable[..., Bench]) -> None:
    """Close is idempotent and leaves no descriptor open, after a failed creation too."""
    before = set(os.listdir("/proc/self/fd"))
    vm = Kvm().create_vm(VmSpec(cpus=2, irqchip="split"))
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    vm.close()
    vm.close()
    with pytest.raises(ConfigError, match="no CPU model"):
        Kvm().create_vm(VmSpec(cpu="x86-64-v9"))
    assert set(os.listdir("/proc/self/fd")) == before


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


def test_the_kick_signal_has_a_handler_that_python_never_sees() -> None:
    """The kick signal is found again, is not Python's, and being sent one does nothing."""
    import signal

    number = kick_signal()
    assert kick_signal() == number
    assert signal.getsignal(number) is signal.SIG_DFL  # as far as Python knows: it was installed behind its back
    signal.raise_signal(number)

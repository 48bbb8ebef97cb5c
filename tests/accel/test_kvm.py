"""The accelerator kvm: its own rules, beyond what the conformance programs show."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import tempfile
import threading

import pytest
from attrs import evolve
from cardcage.accelerator import VmSpec
from cardcage.errors import AcceleratorError, ConfigError, UsageError
from cardcage.vcpu import Exit
from cardcage_kvm import abi
from cardcage_kvm.accel import Kvm
from cardcage_kvm.kick import kick_signal
from kvm_bench import CODE, MakeBench, Ops
from leftovers import Leftovers


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
    assert missing.reason.startswith(f"{tmp_path}/kvm: does not exist")
    with open(f"{tmp_path}/file", "w"):
        wrong = Kvm(f"{tmp_path}/file").probe()
    assert not wrong.usable
    assert "\n" not in wrong.reason
    with pytest.raises(AcceleratorError, match="does not exist"):
        Kvm(f"{tmp_path}/kvm").create_vm(VmSpec())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize(
    ("group", "mode", "groups", "advice"),
    [
        (0, 0o600, [], "sudo setfacl -m u:nobody:rw {}"),
        (0, 0o660, [], "sudo setfacl -m u:nobody:rw {}"),
        (1, 0o600, [], "sudo setfacl -m u:nobody:rw {}"),
        (1, 0o660, [], "sudo usermod -aG daemon nobody, then log in again"),
        (54321, 0o660, [], "sudo usermod -aG 54321 nobody, then log in again"),
        (1, 0o660, [1], ""),
        (0, 0o666, [], ""),
    ],
)
def test_doctor_looks_at_the_node(group: int, mode: int, groups: list[int], advice: str) -> None:
    """An account without access is told the node's own group, or what helps where no group has it; the boot is not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        device = f"{folder}/kvm"
        try:
            os.mknod(device, stat.S_IFCHR | mode, os.makedev(1, 3))  # /dev/null's number: only permission matters
        except PermissionError:
            pytest.skip("needs the right to make device nodes")
        os.chmod(folder, 0o755)
        os.chown(device, 0, group)
        os.chmod(device, mode)
        script = (
            "import os, sys; from cardcage_kvm.accel import Kvm; from cardcage_kvm.check import kvm_device\n"
            f"os.setgroups({groups}); os.setgid(65534); os.setuid(65534)\n"
            "print(*kvm_device(sys.argv[1]), Kvm(sys.argv[1]).probe().reason, sep='\\n')"
        )
        command = [sys.executable, "-c", script, device]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        if "can be opened" not in found[1] and not advice:
            pytest.skip("needs a file system that lets device nodes be opened")
        assert found[2] == advice.format(device)
        assert found[0] == str(not advice)
        if advice:
            assert found[1].endswith(f", mode {mode:04o}")
            assert found[3] == f"{device}: permission denied"


def test_probe_is_kept_for_the_process(kvm_bench: MakeBench) -> None:
    """A second probe gives the first one's answer without running its guest again."""
    assert Kvm().probe() is Kvm().probe()


def test_a_kick_before_run_ends_the_next_run(kvm_bench: MakeBench) -> None:
    """A kick that comes before run makes the next one return at once, and only that one."""
    vcpu = kvm_bench().load("40 f4")  # inc eax; hlt
    vcpu.kick()
    assert vcpu.run(Ops()).reason is Exit.KICKED
    assert vcpu.get_state().registers.rax == 0
    assert vcpu.run(Ops()).reason is Exit.HALTED
    assert vcpu.get_state().registers.rax == 1


def test_halted_stays_halted_until_woken(kvm_bench: MakeBench) -> None:
    """Without a wake-up, run after HLT comes back halted and runs nothing; a kick is still heard; an NMI wakes."""
    machine = kvm_bench()
    vcpu = machine.load("f4 40 f4")
    ops = Ops()
    assert vcpu.run(ops).reason is Exit.HALTED
    assert vcpu.run(ops).reason is Exit.HALTED
    vcpu.kick()
    assert vcpu.run(ops).reason is Exit.KICKED
    assert vcpu.get_state().events.halted
    assert vcpu.get_state().registers.rax == 0


def test_many_kicks_from_another_thread_all_arrive(kvm_bench: MakeBench) -> None:
    """Each of many kicks of a spinning vCPU ends a run; none is lost and none is needed twice."""
    vcpu = kvm_bench().load("eb fe")
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


def test_an_exception_in_ops_leaves_run_with_whole_state(kvm_bench: MakeBench) -> None:
    """What a device raises comes out of run unchanged, with RIP behind the instruction, and the vCPU can go on."""
    vcpu = kvm_bench().load("b8 05 00 00 00 e6 10 40 f4")  # mov eax, 5; out 0x10, al; inc eax; hlt

    def broken(port: int, value: int) -> None:
        raise RuntimeError("the device is broken")

    with pytest.raises(RuntimeError, match="the device is broken"):
        vcpu.run(Ops(broken))
    assert vcpu.get_state().registers.rip == CODE + 7
    assert vcpu.run(Ops()).reason is Exit.HALTED
    assert vcpu.get_state().registers.rax == 6


def test_state_is_whole_after_a_kick_within_ops(kvm_bench: MakeBench) -> None:
    """A kick while a port read is served ends the run with the value in the register."""
    vcpu = kvm_bench().load("e4 10 40 f4")  # in al, 0x10; inc eax; hlt
    ops = Ops(answer=0x41)
    read = ops.pio_read

    def kicking(port: int, size: int, /) -> int:
        vcpu.kick()
        return read(port, size)

    ops.pio_read = kicking  # type: ignore[method-assign]  # kicks before it answers
    assert vcpu.run(ops).reason is Exit.KICKED
    registers = vcpu.get_state().registers
    assert (registers.rax, registers.rip) == (0x41, CODE + 2)


def test_quiesce_holds_spinning_vcpus_out(kvm_bench: MakeBench) -> None:
    """Inside quiesce no vCPU is in guest code and none comes in; afterwards they run on by themselves."""
    machine = kvm_bench(cpus=2)
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


def test_quiesce_within_ops(kvm_bench: MakeBench) -> None:
    """A device may quiesce the VM on the vCPU's own thread while the other vCPU spins."""
    machine = kvm_bench(cpus=2)
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


def test_failure_names_registers_and_bytes(kvm_bench: MakeBench) -> None:
    """Code that runs off into nowhere fails with a sentence, the registers and the bytes at RIP."""
    ended = kvm_bench().load("b8 78 56 34 12 ea 00 00 00 d0 08 00").run(Ops())  # jmp to an address that no slot has
    assert ended.reason in (Exit.FAILED, Exit.SHUTDOWN)
    assert ended.detail.startswith("vCPU 0: ")
    assert "rip=" in ended.detail
    assert "bytes at RIP" in ended.detail


def test_triple_fault_is_a_shutdown(kvm_bench: MakeBench) -> None:
    """An exception without an interrupt table ends as SHUTDOWN."""
    machine = kvm_bench()
    vcpu = machine.load("0f 0b")
    state = vcpu.get_state()
    state.system.idt = evolve(state.system.idt, limit=0)
    vcpu.set_state(state)
    ended = vcpu.run(Ops())
    assert ended.reason is Exit.SHUTDOWN
    assert "triple fault" in ended.detail


def test_vcpu_numbers_are_checked(kvm_bench: MakeBench) -> None:
    """Each vCPU is created once, within the number that was asked for; a host's limit is named."""
    machine = kvm_bench()
    with pytest.raises(UsageError, match="expected each of 0 to 0 once"):
        machine.vm.create_vcpu(0)
    with pytest.raises(UsageError, match="expected each of 0 to 0 once"):
        machine.vm.create_vcpu(1)
    with pytest.raises(ConfigError, match="at most"):
        Kvm().create_vm(VmSpec(cpus=100000))


def test_closing_gives_all_descriptors_back(kvm_bench: MakeBench) -> None:
    """Close is idempotent and leaves no descriptor open, after a failed creation too."""
    left = Leftovers()
    vm = Kvm().create_vm(VmSpec(cpus=2, irqchip="split"))
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    vm.close()
    vm.close()
    with pytest.raises(ConfigError, match="no CPU model"):
        Kvm().create_vm(VmSpec(cpu="x86-64-v9"))
    assert left() == []


def test_the_kick_signal_has_a_handler_that_python_never_sees() -> None:
    """The kick signal is found again, is not Python's, and being sent one does nothing."""
    import signal

    number = kick_signal()
    assert kick_signal() == number
    assert signal.getsignal(number) is signal.SIG_DFL  # as far as Python knows: it was installed behind its back
    signal.raise_signal(number)

"""vCPUs of the translator that are held between two instructions, while their threads run on."""

from __future__ import annotations

import threading
from struct import pack, unpack_from
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.accelerator import VmSpec
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.x86 import Segment, reset_state
from cardcage_tcg import layout as L
from cardcage_tcg.cpu.msr import TSC_DEADLINE
from cardcage_tcg.vm import TcgVm

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOP = bytes.fromhex("40 e680 ebfb")  # inc ax; out 0x80, al; jmp back


class Guest:
    """A vCPU that writes to a port for ever, on a thread of its own; *open* lets it do so."""

    def __init__(self, vm: TcgVm) -> None:
        self.vm, self.cpu = vm, vm.cpus[0]
        self.open, self.inside, self.over = threading.Event(), threading.Event(), False
        self.writes = 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        ops: Any = self
        while not self.over:
            self.cpu.run(ops)

    def pio_write(self, port: int, size: int, value: int) -> None:
        """What the guest does."""
        self.writes += 1
        self.inside.set()
        self.open.wait()

    def end(self) -> None:
        """End the thread."""
        if not self.over:
            self.over = True
            self.open.set()
            self.cpu.kick()
            self.thread.join()


@pytest.fixture
def guest() -> Iterator[Guest]:
    """It is about to be in its first write."""
    vm, memory = TcgVm(VmSpec(irqchip="split")), PhysicalMemory()
    cpu = vm.create_vcpu(0)
    memory.add(RamRange(0, 16 * 4096, RamBlock(16 * 4096)))
    memory.attach(vm)
    memory.report_to(vm)
    memory.write(0x1000, LOOP)
    state = reset_state()
    state.system.cs = Segment(selector=0, base=0, type=11)
    state.registers.rip = 0x1000
    cpu.set_state(state)
    made = Guest(vm)
    yield made
    made.end()
    vm.close()
    memory.close()


def test_a_vcpu_that_is_held_does_nothing(guest: Guest) -> None:
    """It is held again and again, each time between two instructions: it has no effect meanwhile, its registers stay
    and take what is set, and then it goes on from there."""
    guest.open.set()
    turn = 0
    while turn < 200:
        before = guest.writes
        while guest.writes == before:
            pass
        with guest.vm.hold() as still:
            if not still:  # a host that is busy may keep its thread from coming out for longer than it is waited for
                continue
            turn += 1
            count, state = guest.writes, guest.cpu.get_state()
            state.registers.rbx = turn
            guest.cpu.set_state(state)
            now = guest.cpu.get_state()
            assert (now.registers, guest.writes) == (state.registers, count)
    guest.end()
    assert guest.cpu.get_state().registers.rbx == 200


def test_one_in_the_middle_of_an_access_is_not_still(guest: Guest) -> None:
    """While a device has the vCPU's access, whoever holds it is told that its state cannot be set."""
    guest.inside.wait()
    with guest.vm.hold() as still:
        assert not still
    guest.open.set()
    while True:
        with guest.vm.hold() as still:
            if still:
                break


def test_who_holds_and_who_stops_the_world_do_not_meet(guest: Guest) -> None:
    """Threads that change memory slots' world, and others that hold, take turns with nobody left standing."""
    guest.open.set()
    stop = threading.Event()

    def stops() -> None:
        while not stop.is_set():
            with guest.vm.quiesce():
                pass

    threads = [threading.Thread(target=stops) for _ in range(2)]
    for one in threads:
        one.start()
    for _ in range(200):
        with guest.vm.hold():
            pass
    stop.set()
    for one in threads:
        one.join()
    before = guest.writes
    while guest.writes == before:
        pass


def test_a_timer_that_expires_while_a_state_is_saved_is_in_it(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late in the saving a deadline passes, the state has the deadline, or the interrupt, or both."""
    guest.inside.wait()
    cpu = guest.cpu
    state = cpu.get_state()
    state.msrs[TSC_DEADLINE] = 0
    page = bytearray(state.lapic or b"")
    page[0xF0:0xF4], page[0x320:0x324] = pack("<I", 0x1FF), pack("<I", 2 << 17 | 0x50)  # on; TSC deadline, vector 0x50
    state.lapic = bytes(page)
    cpu.set_state(state)
    image, alls = cpu.msrs.lapic_image, cpu.msrs.all

    def expire() -> None:
        while not unpack_from("<I", image(), 0x200 + 0x10 * (0x50 // 32))[0] >> 0x50 % 32 & 1:
            pass

    def late_image() -> bytes:
        found = image()
        expire()
        return found

    def late_all() -> dict[int, int]:
        found = alls()
        expire()
        return found

    for name, late in (("lapic_image", late_image), ("all", late_all)):
        cpu.set_state(state)
        cpu.msrs.tsc_deadline(cpu.native.tsc() + cpu.registers.field(L.TSC_OFFSET) + 20_000_000 & (1 << 64) - 1)
        with monkeypatch.context() as patch:
            patch.setattr(cpu.msrs, name, late)
            saved = cpu.get_state()
        assert saved.lapic is not None
        requested = unpack_from("<I", saved.lapic, 0x200 + 0x10 * (0x50 // 32))[0] >> 0x50 % 32 & 1
        assert saved.msrs[TSC_DEADLINE] or requested, name

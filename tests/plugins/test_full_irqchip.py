"""Interrupt controllers that are the accelerator's own: part of a machine's state, and of its checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from cardcage.errors import ConfigError, StateError, UsageError
from cardcage_conformance import RemoteGuest
from cardcage_fork import checkpoint, revert
from cardcage_kvm.accel import Kvm
from cardcage_snapshot.state import MachineState, capture, dumps, loads, restore

pytestmark = pytest.mark.once

SELECT, WINDOW = 0xFEC00000, 0xFEC00010
PIN, VECTOR = 0x10 + 2 * 4, 0x55
"""The IOAPIC's entry of pin 4, and what it delivers."""


@pytest.fixture(autouse=True)
def usable() -> None:
    """Skip where KVM is not."""
    found = Kvm().probe()
    if not found.usable:
        pytest.skip(found.reason)


def guest() -> RemoteGuest:
    return RemoteGuest("kvm", machine={"platform": "none", "irqchip": "full"})


def write(one: RemoteGuest, register: int, value: int) -> None:
    one.store(SELECT, 4, register)
    one.store(WINDOW, 4, value)


def interrupted(one: RemoteGuest) -> None:
    """A device raises pin 4, and the guest is interrupted."""
    before, vm = one.interrupts(VECTOR), one.machine.vm
    vm.set_irq(4, True)
    vm.set_irq(4, False)
    one.until(lambda: one.interrupts(VECTOR) > before, "the pin interrupts nobody")


def saved(one: RemoteGuest) -> tuple[MachineState, list[tuple[int, bytes]]]:
    ram = [(slot.address, one.memory.read(slot.address, slot.size)) for slot in one.memory.slots]
    return loads(dumps(capture(one.machine))), ram


def test_they_outlive_the_machine() -> None:
    """What the guest has programmed interrupts it in the machine that goes on from its state."""
    with guest() as first, guest() as second:
        first.start()
        write(first, PIN, VECTOR)
        write(first, PIN + 1, 0)
        interrupted(first)
        first.machine.pause()
        state, ram = saved(first)
        for address, data in ram:
            second.memory.write(address, data)
        restore(second.machine, state)
        second.start(boot=False)
        interrupted(second)


def test_they_are_put_back() -> None:
    """A way back to a checkpoint undoes what the guest has programmed since."""
    with guest() as one:
        one.start()
        write(one, PIN, VECTOR)
        write(one, PIN + 1, 0)
        checkpoint(one.machine)
        write(one, PIN, 1 << 16 | VECTOR)  # masked
        revert(one.machine)
        interrupted(one)


def test_what_does_not_fit_is_refused() -> None:
    """A state without them, of another length, or with another chip in its place is refused in one line."""
    with guest() as one:
        one.start()
        one.machine.pause()
        state, _ = saved(one)
        for chips in (b"", state.chips[:-1], bytes(len(state.chips) - 1) + b"\1", b"\7" + state.chips[1:]):
            with pytest.raises(
                ConfigError, match='interrupt controllers of the accelerator "kvm" does not fit'
            ) as caught:
                restore(one.machine, evolve(state, chips=chips))
            assert "\n" not in str(caught.value)


def test_an_accelerator_that_cannot_keep_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way to save them, neither a state nor a checkpoint is made."""
    with guest() as one:
        one.start()
        one.machine.pause()
        vm: Any = one.machine.vm
        monkeypatch.delattr(type(vm), "save_chips")
        monkeypatch.delattr(type(vm), "load_chips")
        with pytest.raises(StateError, match='interrupt controllers of the accelerator "kvm" cannot be saved'):
            capture(one.machine)
        with pytest.raises(StateError, match="would not be put back"):
            checkpoint(one.machine)


def test_others_have_none() -> None:
    """With a split irqchip there are none to keep, nor are there any in the file, which earlier releases read."""
    with RemoteGuest("kvm", machine={"platform": "none", "irqchip": "split"}) as one:
        one.start()
        one.machine.pause()
        state, _ = saved(one)
        assert state.chips == b""
        assert '"chips"' not in dumps(state)
        vm: Any = one.machine.vm
        with pytest.raises(UsageError, match="irqchip split"):
            vm.load_chips(b"\0")

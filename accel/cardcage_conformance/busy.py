"""``check_busy_eventfds``: doorbells and irqfds that stay busy while a machine pauses, resets and is saved."""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define
from cardcage.device import Mmio
from cardcage.hookspecs import hookimpl
from cardcage_snapshot.state import capture, dumps, loads, restore

from cardcage_conformance.accelerator import find
from cardcage_conformance.remote import RemoteGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot
    from cardcage.registry import Registry

__all__ = ["check_busy_eventfds"]

BELL, VECTOR, MESSAGE = 0xD0000000, 0x41, 0xFEE00000
NEEDED = frozenset({"doorbells", "irqfds"})


@define
class _State:
    version: ClassVar[int] = 1
    connected: bool = False


class _Answerer:
    """A device that another thread serves: rung by a doorbell, it answers and interrupts by an irqfd.

    Any store at offset 0x10 connects it. The thread interrupts for no reason, too, connected or not, paused or not:
    there is always an interrupt on its way.
    """

    def __init__(self, answer: Callable[[], None]) -> None:
        self._answer = answer
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.connected = False
        self.missed = self.noise = 0
        self._route, self._serving = 0, threading.Lock()
        self._paused, self._ending = True, False
        self._thread: threading.Thread | None = None

    def plug(self, slot: Slot) -> None:
        self._vm: Any = slot.interrupts.vm
        self.unpark()

    def may_park(self) -> str:
        return ""

    def unpark(self) -> None:
        self._ending = False
        self._thread = threading.Thread(target=self._serve, name="answerer", daemon=True)
        self._thread.start()

    def park(self) -> None:
        self._ending = True
        if self._thread is not None:
            self._thread.join()

    def unplug(self) -> None:
        self.park()
        self._disconnect()
        os.close(self.kick)
        os.close(self.call)

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        if offset == 0x10:
            self._connect()
        elif offset == 0 and self.connected:
            self.missed += 1  # a store that the doorbell should have taken

    def _connect(self) -> None:
        if not self.connected:
            self._vm.add_doorbell(self.kick, BELL, 2, pio=False, value=None)
            self._route = self._vm.add_irqfd(self.call, MESSAGE, VECTOR)
            self.connected = True

    def _disconnect(self) -> None:
        if self.connected:
            self._vm.remove_irqfd(self.call, self._route)
            self._vm.remove_doorbell(self.kick, BELL, 2, pio=False, value=None)
            self.connected = False

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.kick, select.POLLIN)
        while not self._ending:
            rung = poll.poll(1)
            with self._serving:
                if rung and not self._paused:
                    os.eventfd_read(self.kick)
                    self._answer()
                if not self.connected:  # nobody reads: it may not count up without end
                    self._forget()
                os.eventfd_write(self.call, 1)
                self.noise += 1

    def _forget(self) -> None:
        try:
            os.eventfd_read(self.call)
        except BlockingIOError:
            return

    def pause(self) -> None:
        with self._serving:
            self._paused = True

    def resume(self) -> None:
        self._paused = False

    def reset(self) -> None:
        self._disconnect()

    def save(self) -> _State:
        return _State(self.connected)

    def load(self, state: _State, /) -> None:
        if state.connected:
            self._connect()
            os.eventfd_write(self.kick, 1)  # what was rung before it was saved


class _AnswererCard:
    def __init__(self) -> None:
        self.guest: RemoteGuest
        self.device: _Answerer

    def _make(self) -> _Answerer:
        self.device = _Answerer(lambda: self.guest.answer())
        return self.device

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("answerer", self._make, regions=(Mmio(0x1000, BELL),))


def _guest(accel: str) -> tuple[RemoteGuest, _Answerer]:
    card = _AnswererCard()
    keys = {"platform": "none", "irqchip": "split"}
    card.guest = RemoteGuest(accel, cards=(card,), devices=({"type": "answerer"},), machine=keys)
    return card.guest, card.device


def check_busy_eventfds(accel: str, *, rounds: int = 20) -> str:
    """Hold the accelerator called *accel*, inside a whole machine, to what its doorbells and irqfds promise.

    While a guest rings a doorbell, and HLTs until another thread's irqfd wakes it, the machine is paused and resumed,
    parked where it can be, reset, and saved and continued in a second machine, *rounds* times. No kick and no interrupt
    is lost over it, the guest does nothing while it is paused, no interrupt comes to a device that was reset, and
    nothing waits for ever.

    Returns why it had to be skipped, or an empty string. Raises AssertionError with what was broken.
    """
    found = find(accel).probe()
    if not found.usable:
        return found.reason
    guest, device = _guest(accel)
    with guest:
        missing = NEEDED - guest.machine.vm.capabilities
        if missing:
            return f"{accel} has no {', '.join(sorted(missing))}"
        try:
            guest.start()
            for _ in range(rounds):
                _begin(guest)
                _pause(guest, device)
                _pause(guest, device)
                if "parking" in guest.machine.vm.capabilities:
                    _park(guest, device)
                _save(guest, accel)
                _reset(guest, device)
            _begin(guest)
            _goes_on(guest, "after the last reset")
            guest.ask_no_more()
        except TimeoutError as error:
            raise AssertionError(f"{accel}: {error}") from error
        assert not device.missed, f"{accel}: {device.missed} stores went past their doorbell"
    return ""


def _begin(guest: RemoteGuest) -> None:
    guest.store(BELL + 0x10, 4, 1)
    guest.ask_forever(BELL)
    _goes_on(guest, "at the start")


def _goes_on(guest: RemoteGuest, when: str) -> None:
    wanted = guest.asked + 3
    guest.until(lambda: guest.asked >= wanted, f"a kick or an interrupt was lost {when}")


def _pause(guest: RemoteGuest, device: _Answerer) -> None:
    guest.machine.pause()
    before = guest.asked, guest.interrupts(VECTOR), guest.machine.vcpus[0].get_state().registers
    os.eventfd_write(device.call, 1)
    os.eventfd_write(device.call, 1)
    after = guest.asked, guest.interrupts(VECTOR), guest.machine.vcpus[0].get_state().registers
    assert before == after, f"the guest went on while it was paused: {before}, then {after}"
    guest.machine.resume()
    _goes_on(guest, "over a pause")


def _park(guest: RemoteGuest, device: _Answerer) -> None:
    """Park it with an interrupt on its way, which comes afterwards, and no other."""
    with guest.machine.parked():
        before = guest.asked, guest.interrupts(VECTOR)
        os.eventfd_write(device.call, 1)
        after = guest.asked, guest.interrupts(VECTOR)
    assert before == after, f"the guest went on while it was parked: {before}, then {after}"
    _goes_on(guest, "while it was parked")


def _save(guest: RemoteGuest, accel: str) -> None:
    """Save in the middle of it, and go on here and there."""
    guest.machine.pause()
    text = dumps(capture(guest.machine))
    ram = [(slot.address, guest.memory.read(slot.address, slot.size)) for slot in guest.memory.slots]
    other, _ = _guest(accel)
    with other:
        for address, data in ram:
            other.memory.write(address, data)
        restore(other.machine, loads(text))
        other.start(boot=False)
        _goes_on(other, "over a saved state")
        other.ask_no_more()
        assert other.interrupts(VECTOR) >= guest.interrupts(VECTOR)
    guest.machine.resume()
    _goes_on(guest, "over saving")


def _reset(guest: RemoteGuest, device: _Answerer) -> None:
    guest.reset()
    wanted = device.noise + 20
    guest.until(lambda: device.noise >= wanted, "the device's thread stands still")
    guest.load(BELL, 4)
    taken = guest.interrupts(VECTOR)
    assert not taken, f"the guest took {taken} interrupts of a device that was reset"

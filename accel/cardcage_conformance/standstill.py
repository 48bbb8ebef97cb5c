"""``check_parking``: the time of a parked machine's guest stands still, and its timers go on from there."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from cardcage_conformance.accelerator import find
from cardcage_conformance.remote import RemoteGuest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.x86 import VCpuState

__all__ = ["check_parking"]

APIC, LVT_TIMER, INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0xFEE00000, 0x320, 0x380, 0x390, 0x3E0
BY_ONE, PERIODIC, DEADLINE = 0xB, 1 << 17, 2 << 17
MSR_DEADLINE = 0x6E0
MOMENT, STRETCH = 50_000_000, 200_000_000
"""Nanoseconds of the host's that rates are measured in, and that the machine is parked at least."""
AHEAD = 100_000_000
"""Nanoseconds, about, that a timer is ahead when the machine is parked, which are over before it is unparked."""


@frozen
class Clocks:
    """Readings of a paused machine, between two moments of the host."""

    first: int
    tsc: int
    count: int
    last: int


def check_parking(accel: str) -> str:
    """Hold the accelerator called *accel*, inside a whole machine, to what it promises by ``parking``.

    While the machine is parked, its time-stamp counter and the timers of its local APIC stand still: one-shot, periodic
    and, where there are such, for a value of the counter. None interrupts early, or twice, or never.

    Returns what had to be skipped, or an empty string: an accelerator that is emulated may show guests the host's own
    counter, which stands for nobody. Raises AssertionError with what was broken.
    """
    found = find(accel).probe()
    if not found.usable:
        return found.reason
    with RemoteGuest(accel, machine={"platform": "none", "irqchip": "split"}) as guest:
        if "parking" not in guest.machine.vm.capabilities:
            return f"{accel} has no parking"
        try:
            guest.start()
            guest.store(APIC + DIVIDE, 4, BY_ONE)
            rates = _rates(guest)
            shifts = found.speed != "emulated" or _can_be_set(guest)
            if not shifts:
                rates = float("inf"), rates[1]
            _one_shot(guest, rates)
            _periodic(guest)
            if shifts:
                _deadline(guest, rates)
        except TimeoutError as error:
            raise AssertionError(f"{accel}: {error}") from error
    return "" if shifts else f"{accel}: {found.reason}, and guests see the host's own time-stamp counter"


def _can_be_set(guest: RemoteGuest) -> bool:
    """True where the TSC shows what it was set to: set back by half, it shows less."""
    guest.machine.pause()
    state = _state(guest)
    before = state.tsc or 0
    guest.machine.vcpus[0].set_state(evolve(state, tsc=before // 2))
    after = _state(guest).tsc or 0
    guest.machine.resume()
    return after < before


def _state(guest: RemoteGuest) -> VCpuState:
    return guest.machine.vcpus[0].get_state()


def _clocks(guest: RemoteGuest) -> Clocks:
    first = time.monotonic_ns()
    state = _state(guest)
    last, page = time.monotonic_ns(), state.lapic or bytes(1024)
    return Clocks(first, state.tsc or 0, int.from_bytes(page[CURRENT_COUNT : CURRENT_COUNT + 4], "little"), last)


def _rates(guest: RemoteGuest) -> tuple[float, float]:
    """Ticks of the TSC, and of the timer, in a nanosecond of the host's: not less than there are."""
    guest.store(APIC + LVT_TIMER, 4, 0x10000)
    guest.store(APIC + INITIAL_COUNT, 4, 0xFFFFFFFF)
    guest.machine.pause()
    before = _clocks(guest)
    _pass(MOMENT)
    after = _clocks(guest)
    guest.machine.resume()
    guest.store(APIC + INITIAL_COUNT, 4, 0)
    passed = (after.first - before.last) * 0.99
    assert after.tsc > before.tsc, "the TSC stands while the machine is paused"
    return (after.tsc - before.tsc) / passed, (before.count - after.count) / passed


def _pass(nanoseconds: int) -> None:
    end = time.monotonic_ns() + nanoseconds
    while time.monotonic_ns() < end:
        pass


@contextmanager
def _standing(guest: RemoteGuest, rates: tuple[float, float]) -> Iterator[None]:
    """The paused machine is parked for a stretch: clocks went on by no more than the time before and after it."""
    before = _clocks(guest)
    with guest.machine.parked():
        first = time.monotonic_ns()
        _pass(STRETCH)
        yield
        last = time.monotonic_ns()
    after = _clocks(guest)
    moved = first - before.first + after.last - last
    assert 0 <= after.tsc - before.tsc <= moved * rates[0], "the TSC went on while the machine was parked"
    if before.count:
        assert 0 <= before.count - after.count <= moved * rates[1], "the timer went on while the machine was parked"


def _one_shot(guest: RemoteGuest, rates: tuple[float, float]) -> None:
    vector, ahead = 0x50, AHEAD
    guest.store(APIC + LVT_TIMER, 4, vector)
    left, taken = 0, 0
    while not left:  # on a busy host it may be over before the machine stands
        guest.until(partial(_took, guest, vector, taken), "a timer never interrupts")
        guest.store(APIC + INITIAL_COUNT, 4, min(int(ahead * rates[1]), 0xFFFFFFFF))
        guest.machine.pause()
        left, ahead = _clocks(guest).count, 2 * ahead
        if not left:
            guest.machine.resume()
            taken += 1
    with _standing(guest, rates):
        pass
    left = _clocks(guest).count
    assert not left or guest.interrupts(vector) == taken, "a timer interrupts while the machine is paused"
    guest.machine.resume()
    guest.until(lambda: guest.interrupts(vector) > taken, "a timer that was parked never interrupts")
    guest.machine.pause()
    with guest.machine.parked():
        pass
    guest.machine.resume()
    guest.store(APIC + INITIAL_COUNT, 4, 0)
    assert guest.interrupts(vector) == taken + 1, "a timer that ran off before the machine was parked interrupts again"


def _periodic(guest: RemoteGuest) -> None:
    vector = 0x51
    guest.store(APIC + LVT_TIMER, 4, vector | PERIODIC)
    guest.store(APIC + INITIAL_COUNT, 4, AHEAD // 10)
    for _ in range(3):
        wanted = guest.interrupts(vector) + 2
        guest.until(partial(_took, guest, vector, wanted), "a periodic timer has stopped")
        guest.machine.pause()
        with guest.machine.parked():
            taken = guest.interrupts(vector)
            _pass(AHEAD)
        assert guest.interrupts(vector) == taken, "a timer interrupts a machine that is parked"
        guest.machine.resume()
    guest.store(APIC + INITIAL_COUNT, 4, 0)


def _took(guest: RemoteGuest, vector: int, wanted: int) -> bool:
    return guest.interrupts(vector) >= wanted


def _deadline(guest: RemoteGuest, rates: tuple[float, float]) -> None:
    vector = 0x52
    guest.store(APIC + LVT_TIMER, 4, vector | DEADLINE)
    guest.machine.pause()
    state = _state(guest)
    if MSR_DEADLINE not in state.msrs:
        guest.machine.resume()
        return
    deadline = (state.tsc or 0) + int(AHEAD * rates[0])
    guest.machine.vcpus[0].set_state(evolve(state, msrs={**state.msrs, MSR_DEADLINE: deadline}))
    with _standing(guest, rates):
        pass
    guest.machine.resume()
    guest.machine.pause()
    taken = guest.interrupts(vector)  # before the clock is looked at
    assert not taken or (_state(guest).tsc or 0) >= deadline, "a timer interrupts before its time"
    guest.machine.resume()
    guest.until(lambda: guest.interrupts(vector) > 0, "a deadline that was parked never comes")

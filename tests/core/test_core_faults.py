"""What a card does wrong and a machine goes on from: a wild address let out, a read that does not fit, a lock held."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cardcage._machine import faults, life
from cardcage.device import Mmio, Pio
from cardcage.errors import CardError
from cardcage.hookspecs import hookimpl
from cardcage.machine import Machine
from cardcage_cli.running import threads_watched
from machine_kit import Steps

if TYPE_CHECKING:
    from cardcage.device import Slot
    from cardcage.registry import Registry
    from scripted import ScriptedVCpu

WILD = 0xDEAD_0000
"""No machine of these tests has RAM there."""


class Fetcher:
    """Reads guest memory where the guest says, as anyone would write it, from each place where a card's code runs."""

    def plug(self, slot: Slot, /) -> None:
        self.slot, self.fetched = slot, threading.Event()
        self.rude = self.calm = False
        self.line = slot.interrupts.line(5)
        self.timer = slot.clock.timer(self.fetch)
        self.other = slot.clock.timer(self.fetched.set)
        self.reading, self.writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        slot.loop.add_reader(self.reading, self.readable)
        slot.host.open("char", "console").start(lambda data: self.fetch())
        board = slot.board.controllers
        board.set_extint_source(self.acknowledge)
        board.add_eoi_listener(self.ended)

    def unplug(self) -> None:
        os.close(self.reading)
        os.close(self.writing)

    def fetch(self) -> bytes:
        self.fetched.set()
        if self.calm:
            return bytes(4)
        return self.slot.memory.read(WILD, 4)

    def readable(self) -> None:
        os.read(self.reading, 8)
        self.fetch()

    def acknowledge(self) -> int | None:
        return self.fetch()[0]

    def ended(self, vector: int) -> None:
        self.fetch()

    def reset(self) -> None:
        if self.rude:
            self.fetch()

    def pause(self) -> None:
        if self.rude:
            self.fetch()

    def resume(self) -> None:
        if self.rude:
            self.fetch()

    def read(self, offset: int, size: int, /) -> int:
        return self.fetch()[0]

    def write(self, offset: int, size: int, value: int, /) -> None:
        match value:
            case 0:
                self.slot.memory.write(WILD, b"mine")
            case 1:
                self.timer.arm(1)
                self.other.arm(2)
            case 2:
                os.write(self.writing, b"x")
            case 3:
                self.slot.loop.call_soon(self.fetch)
            case 4:
                thread = threading.Thread(target=self.fetch)
                thread.start()
                thread.join()
            case 5:
                self.fetch()
            case 6:
                self.fetched.set()
                self.slot.ranges.mappings[0].move(0x50)
            case 9:
                self.slot.power.exit(7)


class Odd:
    """Its reads give what does not fit, as the guest says by the offset and size."""

    def read(self, offset: int, size: int, /) -> int:
        return (-1, 0x1234, True, 1 << 5000)[offset]

    def write(self, offset: int, size: int, value: int, /) -> None: ...


class Cards:
    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("fetcher", Fetcher, regions=(Pio(4, 0x40), Mmio(4, 0xF000_0000)))
        registry.device("odd", Odd, regions=(Pio(4, 0x50),))


Build = Callable[..., Machine]
PORT = 0x40


@pytest.fixture
def build(make_machine: Build) -> Build:
    """Makes a machine with a fetcher and an odd device. Its guest takes the steps that are given, and ends with code 7:
    what it read comes into *seen*; after writing a value that makes the fetcher fetch later, it waits until it has.
    """

    def make(*steps: tuple[Any, ...], seen: list[Any] | None = None) -> Machine:
        def script(_: ScriptedVCpu) -> Steps:
            device = machine.devices["fetcher"].device
            for step in steps:
                device.fetched.clear()
                found = yield step
                if seen is not None:
                    seen.append(found)
                assert step[0] != "out" or not step[-1] or device.fetched.wait(20)
            yield ("out", PORT, 1, 9)

        machine = make_machine(script, cards=(Cards(),), devices=[{"type": "fetcher"}, {"type": "odd"}])
        return machine

    return make


def fetcher(machine: Machine) -> Fetcher:
    found: Fetcher = machine.devices["fetcher"].device
    return found


def line_of(text: str) -> str:
    """``file:line`` of the only line of this file that reads so."""
    lines = Path(__file__).read_text().splitlines()
    (found,) = [at for at, line in enumerate(lines, 1) if line.strip() == text]
    return f"{__file__}:{found}"


FETCH, WRITE = "return self.slot.memory.read(WILD, 4)", 'self.slot.memory.write(WILD, b"mine")'


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Lines about a card that came to standard error, without colours."""
    lines = re.sub(r"\x1b\[\d*m", "", capfd.readouterr().err).splitlines()
    assert not [line for line in lines if "card" not in line]
    return lines


def test_an_access_that_lets_a_wild_address_out_finds_the_bus_open(
    build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    """A read gives all ones and a write is dropped, by port and memory; one line names device, card, file and line."""
    seen: list[Any] = []
    steps = [("in", PORT, 4), ("out", PORT, 1, 0), ("load", 0xF000_0000, 2), ("store", 0xF000_0000, 4, 0)]
    machine = build(*steps, *steps, seen=seen)
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    assert seen == [0xFFFFFFFF, None, 0xFFFF, None] * 2
    lines = said(capfd)
    assert len(lines) == 2
    for line, text in zip(lines, (FETCH, WRITE), strict=True):
        for word in ("GuestMemoryError", "device=fetcher", "Cards", f"at={line_of(text)}", f"{WILD:#x}"):
            assert word in line


def test_a_region_that_a_guest_moves_onto_another_stays(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """What `move` raises is the guest's doing too: the device answers where it did, and the log says so once."""
    seen: list[Any] = []
    machine = build(("out", PORT, 1, 6), ("out", PORT, 1, 6), ("in", 0x52, 1), seen=seen)
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    assert seen == [None, None, 1]
    (line,) = said(capfd)
    for word in (
        "ConfigError",
        "device=fetcher",
        "overlaps odd",
        f"at={line_of('self.slot.ranges.mappings[0].move(0x50)')}",
    ):
        assert word in line


@pytest.mark.parametrize("value", [1, 2, 3], ids=["timer", "reader", "call_soon"])
def test_a_callback_that_lets_a_wild_address_out_ends_nothing(
    build: Build, capfd: pytest.CaptureFixture[str], value: int
) -> None:
    """The guest goes on when a timer, a reader or what call_soon runs raises so; it is said once, with the device."""
    machine = build(*[("out", PORT, 1, value)] * 3)
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    (line,) = said(capfd)
    assert "device=fetcher" in line
    assert f"at={line_of(FETCH)}" in line


def test_a_wild_address_in_an_interrupt_cycle_ends_nothing(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """A controller that raises so has no vector, and does not hear of an EOI."""
    seen: list[Any] = []
    machine = build(("inta",), ("eoi", 0x20), seen=seen)
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    assert seen == [None, None]
    assert len(said(capfd)) == 1


def test_a_wild_address_in_a_transition_ends_nothing(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """Reset, pause and resume of a device that raises so are done for the machine, and for the devices after it."""
    machine = build(("wait",), ("wait",))
    machine.devices["fetcher"].device.rude = True
    machine.start()
    machine.reset()
    machine.pause()
    machine.resume()
    assert machine.state == "running"
    machine.stop()
    assert "device=fetcher" in said(capfd)[0]


def test_a_wild_address_in_a_cards_own_thread_ends_that_thread_alone(
    build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under `cardcage run` the machine goes on without it, and the log says so."""
    machine = build(("out", PORT, 1, 4), ("out", PORT, 1, 4))
    with threads_watched([], machine):
        assert str(machine.start().wait(20)) == "debug exit with code 7"
    (line,) = said(capfd)
    assert f"at={line_of(FETCH)}" in line


def test_a_wild_address_in_back_ends_and_observers_ends_nothing(
    build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the console brings may raise so in a device, and so may an observer, which is kept."""
    machine = build(*[("out", PORT, 1, 3)] * 2)
    kept: list[int] = []

    def observer(*access: Any) -> None:
        kept.append(access[0])
        machine.memory.read(WILD, 1)

    machine.observers.add("pio", observer)
    machine.console.send("typed")
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    assert kept == [PORT] * 3
    assert any(f"at={line_of('machine.memory.read(WILD, 1)')}" in line for line in said(capfd))


def test_another_exception_ends_the_machine_as_before(build: Build) -> None:
    """Only a wild address is the guest's doing: whatever else a card raises is its own fault."""
    machine = build(("out", PORT, 1, 3))
    device = fetcher(machine)
    device.fetch = lambda: device.fetched.set() or int("x")  # type: ignore[assignment, func-returns-value, method-assign, return-value]
    with pytest.raises(ValueError, match="invalid literal"):
        machine.start().wait(20)


def test_a_wild_address_before_the_guest_runs_is_refused(make_machine: Build) -> None:
    """Where no guest has run yet, it is no guest's: a device that raises so in `plug` refuses the machine."""

    class Early(Fetcher):
        def plug(self, slot: Slot, /) -> None:
            slot.memory.read(WILD, 4)

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("early", Early)

    with pytest.raises(CardError, match=r"early.*GuestMemoryError"):
        make_machine(cards=(Card(),), devices=[{"type": "early"}])


def test_a_read_that_does_not_fit_is_told_once(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    """The guest sees the lowest bytes; one line names device, card, file and line, what came and what was expected."""
    seen: list[Any] = []
    machine = build(*[("in", 0x50 + at, 1) for at in range(4)] * 2, seen=seen)
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    assert seen == [0xFF, 0x34, 1, 0] * 2
    (line,) = said(capfd)
    for word in ("device=odd", "Cards", f"at={__file__}:", "read(0x0, 1) gave -0x1, expected 0 to 0xff"):
        assert word in line


def test_who_holds_the_lock_long_is_told_once(
    build: Build, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback of a timer, a reader or call_soon that takes longer than it may is named: device, file and line."""
    monkeypatch.setattr(life, "HELD", -1)
    machine = build(*[("out", PORT, 1, value) for value in (1, 2, 3)] * 2)
    fetcher(machine).calm = True
    assert str(machine.start().wait(20)) == "debug exit with code 7"
    lines = [line for line in said(capfd) if "device=fetcher" in line]
    assert len(lines) == 3
    assert all("holds the machine's lock" in line and "seconds=0.0" in line for line in lines)
    assert {f"at={line_of(text)}" for text in ("def fetch(self) -> bytes:", "def readable(self) -> None:")} <= {
        word for line in lines for word in line.split()
    }


@pytest.mark.parametrize("value", [3, 5], ids=["on the loop thread", "on a vCPU's"])
def test_who_never_gives_the_lock_back_is_told_of(
    build: Build, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    """While a callback or an access does not return, who waits for the machine hears of card, thread, file and line."""
    monkeypatch.setattr(life, "LOOK", 0.001)
    monkeypatch.setattr(faults, "HELD", 0.01)
    machine, released = build(("out", PORT, 1, value)), threading.Event()
    device = fetcher(machine)
    device.fetch = lambda: (device.fetched.set(), released.wait(20))  # type: ignore[assignment, method-assign, return-value]
    machine.start()
    lines: list[str] = []
    while not lines:
        machine.wait(0.1)
        lines = said(capfd)
    released.set()
    assert str(machine.wait(20)) == "debug exit with code 7"
    assert len(lines) == 1
    for word in ("holds the machine's lock", "Cards", f"at={__file__}:", f"thread={machine.name}-"):
        assert word in lines[0]


def test_a_timer_that_is_always_due_keeps_nobody_out(build: Build) -> None:
    """A callback that arms its timer for the past again and again leaves the machine's lock in between."""
    machine = build(("out", PORT, 1, 3))
    device = fetcher(machine)

    def again() -> None:
        timer.arm(0)
        device.fetched.set()

    timer = device.slot.clock.timer(again)
    device.fetch = again  # type: ignore[assignment, method-assign]
    assert str(machine.start().wait(20)) == "debug exit with code 7"

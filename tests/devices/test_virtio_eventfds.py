"""A virtio device whose eventfds are connected, over PCI, driven by accesses of real guest code."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_conformance import RemoteGuest
from cardcage_conformance.accelerator import find
from cardcage_virtio.transport.pci import PciTransport

QUEUES, RINGS, BAR, TABLE = 2, 0x100000, 0xE2000000, 0xE2010000
NOTIFY, MSI = 0x3000, 0xFEE00000


class Connected:
    """A device that hands each queue's eventfds to its transport, as vhost-user does, and leaves them to the test."""

    device_id = 42
    queue_sizes = (8,) * QUEUES

    def __init__(self) -> None:
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kicks = [os.eventfd(0, flags) for _ in range(QUEUES)]
        self.calls = [os.eventfd(0, flags) for _ in range(QUEUES)]
        self.running = False

    def plug_virtio(self, io: Any) -> None:
        self.io = io

    def notified(self, index: int) -> None:
        return

    def start(self) -> None:
        self.running = True
        for at in range(QUEUES):
            self.io.transport.connect(at, self.kicks[at], self.calls[at])

    def stop(self) -> None:
        if self.running:
            for at in range(QUEUES):
                self.io.transport.disconnect(at)
        self.running = False

    def unplug(self) -> None:
        for fd in (*self.kicks, *self.calls):
            os.close(fd)


class Card:
    """Offers the device as "connected"."""

    def __init__(self) -> None:
        self.made: list[Connected] = []

    def _make(self) -> PciTransport:
        self.made.append(Connected())
        return PciTransport(self.made[-1])

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("connected", self._make, bus="pci")


class Lab(RemoteGuest):
    """The guest with two such devices, and a driver's acts."""

    def __init__(self, accel: str) -> None:
        card = Card()
        tables = [{"type": "connected", "address": "05.0"}, {"type": "connected", "id": "second", "address": "06.0"}]
        super().__init__(accel, cards=(card,), devices=tables)
        self.device, self.second = card.made

    def config(self, offset: int, size: int, value: int, *, slot: int = 5) -> None:
        self.output(0xCF8, 4, 1 << 31 | slot << 11 | offset & ~3)
        self.output(0xCFC + (offset & 3), size, value)

    def config_read(self, offset: int, size: int, *, slot: int = 5) -> int:
        self.output(0xCF8, 4, 1 << 31 | slot << 11 | offset & ~3)
        return self.input(0xCFC + (offset & 3), size)

    def msix(self, control: int, *, slot: int = 5) -> None:
        at = self.config_read(0x34, 1, slot=slot)
        while self.config_read(at, 1, slot=slot) != 0x11:
            at = self.config_read(at + 1, 1, slot=slot)
        self.config(at + 2, 2, control, slot=slot)

    def move(self, bar: int, *, slot: int = 5) -> None:
        self.config(0x24, 4, 0, slot=slot)
        self.config(0x20, 4, bar, slot=slot)

    def drive(self, vectors: tuple[int, ...] = (0, 1), *, slot: int = 5, bar: int = BAR, table: int = TABLE) -> None:
        """Place BARs, switch MSI-X on with message 0x40 + n for vector n, and start the device."""
        self.move(bar, slot=slot)
        self.config(0x14, 4, table, slot=slot)
        self.config(4, 2, 6, slot=slot)
        for vector in range(3):
            self.store(table + 16 * vector, 8, MSI)
            self.store(table + 16 * vector + 8, 8, 0x40 + slot * 16 - 80 + vector)
        self.msix(0x8000, slot=slot)
        for value in (0, 1, 3):
            self.store(bar + 0x14, 1, value)
        self.store(bar + 0x08, 4, 1)
        self.store(bar + 0x0C, 4, 1)  # VERSION_1
        self.store(bar + 0x14, 1, 11)
        for queue in range(QUEUES):
            self.store(bar + 0x16, 2, queue)
            self.store(bar + 0x18, 2, 8)
            self.store(bar + 0x1A, 2, vectors[queue])
            for offset in (0x20, 0x28, 0x30):
                self.store(bar + offset, 8, RINGS + slot * 0x10000 + queue * 0x4000 + (offset - 0x20 << 9))
            self.store(bar + 0x1C, 2, 1)
        self.store(bar + 0x14, 1, 15)
        assert self.load(bar + 0x14, 1) == 15

    def kick(self, queue: int = 0, *, bar: int = BAR) -> int:
        """The driver's notification; returns what the eventfd counted."""
        self.store(bar + NOTIFY + 4 * queue, 2, queue)
        try:
            return os.eventfd_read(self.device.kicks[queue])
        except BlockingIOError:
            return 0

    def call(self, queue: int = 0) -> None:
        os.eventfd_write(self.device.calls[queue], 1)

    def interrupted(self, vector: int, count: int) -> None:
        self.until(lambda: self.interrupts(vector) >= count, f"no interrupt {vector:#x}")
        assert self.interrupts(vector) == count


@pytest.fixture(params=["tcg", "kvm"])
def lab(request: Any) -> Iterator[Lab]:
    found = find(request.param).probe()
    if not found.usable:
        pytest.skip(found.reason)
    with Lab(request.param) as made:
        made.start()
        made.drive()
        yield made


def test_kicks_and_calls_go_past_the_machine(lab: Lab) -> None:
    """A notification rings the queue's eventfd and no other; a call raises the queue's vector and no other."""
    for queue in (0, 1, 0):
        assert lab.kick(queue) == 1
        with pytest.raises(BlockingIOError):
            os.eventfd_read(lab.device.kicks[queue ^ 1])
    lab.call(1)
    lab.interrupted(0x41, 1)
    lab.call(0)
    lab.interrupted(0x40, 1)
    assert lab.interrupts(0x41) == 1


def test_two_queues_share_a_vector(lab: Lab) -> None:
    """Each queue's call raises the vector that both have, also after it was masked, and after one of them left it."""
    lab.drive((2, 2))
    lab.call(0)
    lab.interrupted(0x42, 1)
    lab.call(1)
    lab.interrupted(0x42, 2)
    lab.store(TABLE + 44, 4, 1)
    lab.store(TABLE + 44, 4, 0)
    lab.call(0)
    lab.interrupted(0x42, 3)
    lab.store(BAR + 0x16, 2, 0)
    lab.store(BAR + 0x1A, 2, 1)
    lab.call(1)
    lab.interrupted(0x42, 4)
    lab.call(0)
    lab.interrupted(0x41, 1)
    assert lab.interrupts(0x42) == 4


def test_the_doorbells_move_with_the_bar(lab: Lab) -> None:
    """Where the BAR is the eventfd is rung, where it was or is not decoded it is not; also on top of another's BAR."""
    for bar in (BAR + 0x4000, BAR, BAR + 0x100000):
        lab.move(bar)
        assert lab.kick(1, bar=bar) == 1
        assert lab.kick(1, bar=bar + 0x4000) == 0
        assert lab.load(bar + 0x14, 1) == 15
    assert lab.kick() == 0
    lab.config(4, 2, 4)
    assert lab.kick(bar=BAR + 0x100000) == 0
    lab.config(4, 2, 6)
    assert lab.kick(bar=BAR + 0x100000) == 1
    other = BAR + 0x200000
    lab.drive(slot=6, bar=other, table=TABLE + 0x1000)
    lab.move(other)  # there is no room: it answers nowhere, and the one that is there goes on
    assert lab.kick(bar=other) == 0
    assert os.eventfd_read(lab.second.kicks[0]) == 1
    lab.move(BAR)
    assert lab.kick() == 1
    lab.move(RINGS & ~0x3FFF)  # over RAM, which wins
    assert lab.kick(bar=RINGS & ~0x3FFF) == 0
    lab.move(BAR)
    assert lab.kick() == 1


@pytest.mark.parametrize("how", ["vector", "function"])
def test_a_masked_call_is_pending_until_it_is_unmasked(lab: Lab, how: str) -> None:
    """Masked by vector or by function, calls set the pending bit at once and interrupt once when unmasked."""

    def mask(on: bool) -> None:
        if how == "function":
            lab.msix(0xC000 if on else 0x8000)
        else:
            lab.store(TABLE + 12, 4, int(on))

    for turn in range(5):
        mask(True)
        lab.call()
        lab.call()
        assert lab.load(TABLE + 0x800, 8) == 1
        assert lab.interrupts(0x40) == turn
        mask(False)
        lab.interrupted(0x40, turn + 1)
        assert lab.load(TABLE + 0x800, 8) == 0
    mask(True)
    mask(False)
    lab.call(1)
    lab.interrupted(0x41, 1)
    assert lab.interrupts(0x40) == 5


def test_without_msix_calls_are_a_pin(lab: Lab) -> None:
    """With MSI-X off a call sets the ISR and the pin, which reading the ISR clears; with it on again, messages come."""
    lab.msix(0)
    lab.call()
    lab.until(lambda: bool(lab.config_read(6, 2) & 8), "the pin is low")
    assert lab.load(BAR + 0x1000, 1) == 1
    assert not lab.config_read(6, 2) & 8
    lab.msix(0x8000)
    lab.call()
    lab.interrupted(0x40, 1)


def test_no_call_is_lost_between_masking_and_unmasking(lab: Lab) -> None:
    """While another thread calls without end and the driver masks, moves and unmasks, the last call always arrives."""
    going = threading.Event()
    ended = threading.Event()

    def storm() -> None:
        while not ended.is_set():
            if going.wait(0.01):
                lab.call()
                going.clear()

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        for turn in range(40):
            going.set()
            lab.store(TABLE + 12, 4, 1)
            if turn % 3 == 0:
                lab.msix(0xC000)
                lab.msix(0x8000)
            if turn % 3 == 1:
                lab.move(BAR + 0x4000 * (turn & 4))
                lab.move(BAR)
            lab.until(lambda: not going.is_set(), "no call")
            before = lab.interrupts(0x40)
            lab.call()
            lab.store(TABLE + 12, 4, 0)
            lab.until(lambda before=before: lab.interrupts(0x40) > before, "a call was lost")  # type: ignore[misc]  # binds this turn's
            assert lab.kick() == 1
    finally:
        ended.set()
        thread.join()


def test_a_reset_device_hears_and_says_nothing(lab: Lab) -> None:
    """After a reset, by its driver or the machine's, notifications and calls go nowhere; driven again, they arrive."""
    lab.store(BAR + 0x14, 1, 0)
    lab.call()
    assert lab.kick() == 0
    lab.drive()
    lab.interrupted(0x40, 1)  # what it called before
    lab.reset()
    lab.call()
    lab.config(4, 2, 6)
    assert lab.kick() == 0
    assert (lab.interrupts(0x40), lab.interrupts(0x41)) == (0, 0)
    lab.drive()
    lab.interrupted(0x40, 1)
    lab.call(1)
    lab.interrupted(0x41, 1)
    assert lab.kick(1) == 1

"""virtio-pci and virtio-mmio, register by register, as a driver sets a device up."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from cardcage.registry import DeviceOffer, Registry
from cardcage_pci.host import PciHost
from cardcage_testing import TestSlot
from cardcage_virtio import cardcage_register
from cardcage_virtio.testing import Driver, ram
from cardcage_virtio.transport.mmio import MmioTransport
from cardcage_virtio.transport.pci import PciTransport
from hypothesis import example, given
from hypothesis import strategies as st


def level(slot: TestSlot) -> bool:
    """True while the device drives any of its lines."""
    return any(one.level for one in slot.interrupts.lines)


class Echo:
    """Writes back what it read; its configuration space is four bytes that the driver may write."""

    device_id = 42
    queue_sizes = (64, 64)

    def __init__(self) -> None:
        self.bytes = bytearray(b"abcd")

    def config(self) -> bytes:
        return bytes(self.bytes)

    def config_written(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data

    def handle(self, request: Any) -> None:
        request.done(request.write(request.read()))


class Pci:
    """A guest's view of a device in slot 2."""

    def __init__(self) -> None:
        self.memory = ram(4 << 20)
        self.slot = TestSlot(memory=self.memory)
        self.device = Echo()
        self.transport = PciTransport(self.device)
        self.host = PciHost()
        self.transport.plug(self.slot)
        self.host.attach(self.transport, self.slot, None)
        self.read, self.write = self.transport.read, self.transport.write

    def config(self, offset: int, size: int = 4) -> int:
        return self.host.config_read(16, offset, size)

    def set_config(self, offset: int, value: int, size: int = 4) -> None:
        self.host.config_write(16, offset, size, value)

    def capabilities(self) -> list[int]:
        found, at = [], self.config(0x34, 1)
        while at:
            found.append(at)
            at = self.config(at + 1, 1)
        return found

    def msix(self, queue: int) -> None:
        at = next(at for at in self.capabilities() if self.config(at, 1) == 0x11)
        self.set_config(at + 2, 0x8000, 2)
        table = self.transport.function.msix
        assert table is not None
        for vector in range(3):
            table.write(16 * vector, 8, 0xFEE00000)
            table.write(16 * vector + 8, 8, 0x40 + vector)
        self.write(0x10, 2, 0)
        self.write(0x16, 2, queue)
        self.write(0x1A, 2, queue + 1)

    def start(self, queue: int = 0) -> Driver:
        write = self.write
        write(0x14, 1, 0)
        write(0x14, 1, 3)
        offered = 0
        for half in (0, 1):
            write(0x00, 4, half)
            offered |= self.read(0x04, 4) << 32 * half
        for half in (0, 1):
            write(0x08, 4, half)
            write(0x0C, 4, offered >> 32 * half & 0xFFFFFFFF)
        write(0x14, 1, 11)
        assert self.read(0x14, 1) == 11
        driver = Driver(self.memory, 1 << 20, 32)
        write(0x16, 2, queue)
        assert self.read(0x18, 2) == 64
        write(0x18, 2, 32)
        write(0x20, 4, driver.table)
        write(0x24, 4, 0)
        write(0x28, 8, driver.driver)
        write(0x30, 8, driver.device)
        write(0x1C, 2, 1)
        write(0x14, 1, 15)
        return driver


@pytest.fixture
def pci() -> Pci:
    return Pci()


def test_pci_ids_and_capabilities(pci: Pci) -> None:
    """The function is a modern virtio device whose five areas lie inside BAR 4."""
    assert pci.config(0) == 0x106A1AF4
    assert pci.config(8, 1) == 1
    kinds = []
    for at in pci.capabilities():
        if pci.config(at, 1) == 9:
            length, kind, bar = pci.config(at + 2, 1), pci.config(at + 3, 1), pci.config(at + 4, 1)
            kinds.append((kind, length))
            if kind != 5:
                assert bar == 4
                assert pci.config(at + 8) + pci.config(at + 12) <= 0x4000
    assert kinds == [(1, 16), (3, 16), (4, 16), (2, 20), (5, 20)]


def test_pci_round_trip_with_intx(pci: Pci) -> None:
    """A request goes through notify; without MSI-X the pin rises, and reading ISR lowers it."""
    driver = pci.start()
    driver.add([b"hello"], [5])
    pci.write(0x3000, 2, 0)
    pci.slot.loop.poll()
    assert [data for _, data in driver.used()] == [b"hello"]
    assert level(pci.slot)
    assert pci.read(0x1000, 1) == 1
    assert not level(pci.slot)
    assert pci.read(0x1000, 1) == 0


def test_pci_round_trip_with_msix(pci: Pci) -> None:
    """With MSI-X each queue sends its own message, and configuration changes theirs."""
    driver = pci.start(1)
    pci.msix(1)
    driver.add([b"hello"], [5])
    pci.write(0x3004, 2, 1)
    assert pci.slot.interrupts.messages == [(0xFEE00000, 0x42)]
    generation = pci.read(0x15, 1)
    pci.transport.virtio.config_changed()
    assert pci.slot.interrupts.messages[1:] == [(0xFEE00000, 0x40)]
    assert pci.read(0x15, 1) != generation
    assert not level(pci.slot)


def test_pci_refuses_vectors_it_has_not(pci: Pci) -> None:
    """A vector past the table reads back as NO_VECTOR."""
    pci.write(0x16, 2, 0)
    pci.write(0x1A, 2, 3)
    assert pci.read(0x1A, 2) == 0xFFFF
    pci.write(0x16, 2, 9)
    assert pci.read(0x18, 2) == 0


def test_pci_configuration_access_window(pci: Pci) -> None:
    """The fifth capability reads and writes the BAR through configuration space."""
    at = pci.capabilities()[4]
    pci.set_config(at + 4, 4, 1)
    pci.set_config(at + 8, 0x2000)
    pci.set_config(at + 12, 4)
    assert pci.config(at + 16) == int.from_bytes(b"abcd", "little")
    pci.set_config(at + 16, int.from_bytes(b"wxyz", "little"))
    assert pci.read(0x2000, 4) == int.from_bytes(b"wxyz", "little")
    pci.set_config(at + 8, 0x3FFE)
    pci.config(at + 16)


def test_pci_queue_reset(pci: Pci) -> None:
    """queue_reset disables the queue at once, and it can be enabled again."""
    driver = pci.start()
    pci.write(0x16, 2, 0)
    pci.write(0x3A, 2, 1)
    assert (pci.read(0x3A, 2), pci.read(0x1C, 2)) == (0, 0)
    driver = Driver(pci.memory, 2 << 20, 16)
    pci.write(0x18, 2, 16)
    for offset, address in ((0x20, driver.table), (0x28, driver.driver), (0x30, driver.device)):
        pci.write(offset, 8, address)
    pci.write(0x1C, 2, 1)
    driver.add([b"again"], [5])
    pci.write(0x3000, 2, 0)
    assert [data for _, data in driver.used()] == [b"again"]


def test_pci_state(pci: Pci) -> None:
    """Bus and device state bring a running device back over the same memory."""
    driver = pci.start()
    pci.msix(0)
    host, device = pci.host.save(), pci.transport.save()
    other = Pci()
    other.slot.memory = pci.memory
    other.host.load(host)
    other.transport.load(device)
    driver.add([b"moved"], [5])
    other.write(0x3000, 2, 0)
    assert [data for _, data in driver.used()] == [b"moved"]
    assert other.slot.interrupts.messages == [(0xFEE00000, 0x41)]


class Mmio:
    """A guest's view of a virtio-mmio window."""

    def __init__(self) -> None:
        self.memory = ram(4 << 20)
        self.slot = TestSlot(memory=self.memory)
        self.transport = MmioTransport(Echo())
        self.transport.plug(self.slot)

    def read(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.transport.write(offset, size, value)

    def start(self) -> Driver:
        for value in (0, 1, 3):
            self.write(0x70, value)
        for half in (0, 1):
            self.write(0x14, half)
            self.write(0x24, half)
            self.write(0x20, self.read(0x10))
        self.write(0x70, 11)
        assert self.read(0x70) == 11
        driver = Driver(self.memory, 1 << 20, 32)
        self.write(0x30, 0)
        self.write(0x38, 32)
        for offset, address in ((0x80, driver.table), (0x90, driver.driver), (0xA0, driver.device)):
            self.write(offset, address)
            self.write(offset + 4, 0)
        self.write(0x44, 1)
        self.write(0x70, 15)
        return driver


def test_mmio_round_trip() -> None:
    """Identity, set-up, notify, interrupt status and acknowledge work as the specification has them."""
    guest = Mmio()
    assert struct.pack("<III", guest.read(0), guest.read(4), guest.read(8)) == b"virt\x02\0\0\0\x2a\0\0\0"
    driver = guest.start()
    driver.add([b"hello"], [5])
    guest.write(0x50, 0)
    guest.slot.loop.poll()
    assert [data for _, data in driver.used()] == [b"hello"]
    assert (level(guest.slot), guest.read(0x60)) == (True, 1)
    guest.write(0x64, 1)
    assert (level(guest.slot), guest.read(0x60)) == (False, 0)
    assert guest.read(0x100) == int.from_bytes(b"abcd", "little")
    guest.write(0x101, 0x5A, 1)
    assert guest.read(0x100, 2) == 0x5A61
    guest.write(0x70, 0)
    assert (guest.read(0x70), guest.read(0x44)) == (0, 0)


ACCESS = st.tuples(st.booleans(), st.integers(0, 0x3FFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
NEAR = st.tuples(st.booleans(), st.integers(0, 0x3C), st.sampled_from([1, 2, 4]), st.integers(0, 40))
WIDE = st.tuples(st.booleans(), st.integers(0, 0x3C), st.sampled_from([4, 8]), st.integers(0, (1 << 64) - 1))


@given(st.lists(ACCESS | NEAR | WIDE, max_size=60))
@example([(True, 0, 8, 1 << 32), (False, 0, 4, 0)])
@example([(True, 8, 8, 1 << 32), (False, 8, 4, 0)])
def test_no_register_access_hurts(accesses: list[tuple[bool, int, int, int]]) -> None:
    """Any accesses to either transport raise nothing, and a reset brings the device back."""
    pci, mmio = Pci(), Mmio()
    pci.start()
    mmio.start()
    for write, offset, size, value in accesses:
        value &= (1 << 8 * size) - 1
        if write:
            pci.write(offset, size, value)
            mmio.write(offset % 0x200, value, size)
        else:
            pci.read(offset, size)
            mmio.read(offset % 0x200, size)
    driver = pci.start()
    driver.add([b"fine"], [4])
    pci.write(0x3000, 2, 0)
    assert [data for _, data in driver.used()] == [b"fine"]


def test_each_device_is_offered_on_both_transports() -> None:
    """Each virtio device has a name on the pci bus and one for machines without."""
    registry = Registry()
    cardcage_register(registry)
    names = set(registry.names(DeviceOffer))
    for name in names:
        offer = registry.get(DeviceOffer, name)
        assert (offer.bus == "pci") is not name.endswith("-mmio")
        assert name.endswith("-mmio") or f"{name}-mmio" in names

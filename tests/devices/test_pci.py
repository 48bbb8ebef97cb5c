"""The PCI host bridge and its functions, seen from the guest's side."""

from __future__ import annotations

import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from cardcage._machine.bus import Claim
from cardcage.errors import AcceleratorError, CardError, ConfigError
from cardcage_pci.host import PciHost, PciHostOptions
from cardcage_testing import TestSlot
from hypothesis import given
from hypothesis import strategies as st


class Cage:
    """A host bridge on buses, with guest-side helpers."""

    def __init__(self) -> None:
        self.host = PciHost(PciHostOptions())
        self.slot = TestSlot(id="pci0")
        self.pio, self.mmio, self.lines = self.slot.ranges.ports, self.slot.ranges.space, self.slot.interrupts.lines
        self.sent = self.slot.interrupts.messages
        self.host.plug(self.slot)
        self.pio.add(Claim(0xCF8, 4, self.host.read_address, self.host.write_address))
        self.pio.add(Claim(0xCFC, 4, self.host.read_data, self.host.write_data))

    def new_slot(self, id: str) -> TestSlot:
        return TestSlot(id=id, beside=self.slot)

    def add(self, device: Any, address: str | None = None) -> TestSlot:
        slot = self.new_slot(f"dev{len(self.host.functions)}")
        self.host.attach(device, slot, address)
        return slot

    def get(self, slot: int, offset: int, size: int = 4) -> int:
        self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        return self.pio.read(0xCFC + (offset & 3), size)

    def put(self, slot: int, offset: int, value: int, size: int = 4) -> None:
        self.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        self.pio.write(0xCFC + (offset & 3), size, value)


class Plain:
    """A function with one BAR of each kind, MSI and MSI-X."""

    def __init__(self, **more: Any) -> None:
        self.pci = {
            "vendor": 0x1AF4,
            "device": 0x10F0,
            "class_code": 0x080300,
            "pin": 1,
            "bars": [
                {"index": 0, "size": 4096},
                {"index": 2, "size": 1 << 14, "kind": "memory64", "prefetch": True},
                {"index": 4, "size": 32, "kind": "io"},
            ],
            "msix": 3,
            **more,
        }
        self.seen: list[tuple[int, ...]] = []
        self.written: list[tuple[int, int]] = []

    def plug_pci(self, function: Any) -> None:
        self.function = function

    def config_written(self, offset: int, size: int) -> None:
        self.written.append((offset, size))

    def read(self, offset: int, size: int) -> int:
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


@pytest.fixture
def cage() -> Cage:
    return Cage()


def capability(cage: Cage, slot: int, id: int) -> int:
    at = cage.get(slot, 0x34, 1)
    while at and cage.get(slot, at, 1) != id:
        at = cage.get(slot, at + 1, 1)
    return at


def test_an_absent_function_reads_as_ones(cage: Cage) -> None:
    """Configuration space of what is not there reads as all ones, through ports and ECAM."""
    assert cage.get(5, 0) == 0xFFFFFFFF
    assert cage.mmio.read(0xE0000000 + (5 << 15), 4) == 0xFFFFFFFF


def test_ports_and_ecam_show_the_same_space(cage: Cage) -> None:
    """A write through one mechanism is read through the other."""
    cage.add(Plain(), "03.0")
    assert cage.get(3, 0) == 0x10F01AF4
    cage.put(3, 0x3C, 0x42, 1)
    assert cage.mmio.read(0xE0000000 + (3 << 15) + 0x3C, 1) == 0x42
    assert cage.mmio.read(0xE0000000 + (3 << 15) + 0x100, 4) == 0xFFFFFFFF


@pytest.mark.parametrize(("bar", "size", "bits"), [(0, 4096, 0), (2, 1 << 14, 12), (4, 32, 1)])
def test_bars_are_sized_by_writing_ones(cage: Cage, bar: int, size: int, bits: int) -> None:
    """All ones written to a BAR read back as its size mask and type bits."""
    cage.add(Plain(), "03.0")
    cage.put(3, 0x10 + 4 * bar, 0xFFFFFFFF)
    assert cage.get(3, 0x10 + 4 * bar) == (-size & 0xFFFFFFFF) | bits
    if bits == 12:
        cage.put(3, 0x14 + 4 * bar, 0xFFFFFFFF)
        assert cage.get(3, 0x14 + 4 * bar) == 0xFFFFFFFF


def test_bars_answer_only_where_and_when_the_guest_says(cage: Cage) -> None:
    """A BAR is decoded after the command register says so, and follows its register."""
    device = Plain()
    cage.add(device, "03.0")
    cage.put(3, 0x10, 0xE2000000)
    assert cage.mmio.read(0xE2000010, 4) == 0xFFFFFFFF
    cage.put(3, 4, 2, 2)
    assert cage.mmio.read(0xE2000010, 4) == 0x10
    cage.put(3, 0x10, 0xE3000000)
    assert cage.mmio.read(0xE2000010, 4) == 0xFFFFFFFF
    cage.mmio.write(0xE3000020, 4, 7)
    assert device.seen == [(0x20, 4, 7)]
    cage.put(3, 0x20, 0xD000)
    assert cage.pio.read(0xD004, 4) == 0xFFFFFFFF
    cage.put(3, 4, 3, 2)
    assert cage.pio.read(0xD004, 4) == 4


def test_a_64_bit_bar_goes_above_4_gib(cage: Cage) -> None:
    """Both halves of a 64-bit BAR make its address."""
    cage.add(Plain(), "03.0")
    cage.put(3, 4, 2, 2)
    cage.put(3, 0x18, 0x00004000)
    cage.put(3, 0x1C, 0x40)
    assert cage.mmio.read(0x4000004123, 1) == 0x23


def test_presets_do_not_overlap(cage: Cage) -> None:
    """BARs of several functions have distinct addresses before any guest assigns them."""
    for _ in range(4):
        cage.add(Plain())
    for slot in range(2, 6):
        cage.put(slot, 4, 3, 2)
    spans = [(one.base, one.end) for one in cage.mmio]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert len([one for one in cage.mmio if "BAR" in one.name]) == 4 * 3


def test_an_overlapping_bar_waits_until_there_is_room(cage: Cage) -> None:
    """A BAR moved onto another answers nowhere, is logged, and comes up once the other has left."""
    cage.add(Plain(), "03.0")
    other = cage.add(Plain(), "04.0")
    for slot in (3, 4):
        cage.put(slot, 4, 2, 2)
    cage.put(3, 0x10, 0xE8000000)
    cage.put(4, 0x10, 0xE8000000)
    assert other.log.entries
    assert cage.host.functions[4 << 3].mappings[0].address is None
    cage.put(3, 0x10, 0xE9000000)
    assert cage.host.functions[4 << 3].mappings[0].address == 0xE8000000


def test_read_only_fields_keep_their_values(cage: Cage) -> None:
    """Ids, class, header type, pin and capability pointers cannot be written."""
    cage.add(Plain(), "03.0")
    before = [cage.get(3, at) for at in (0, 8, 0x2C, 0x34)]
    for at in (0, 8, 0x2C, 0x34):
        cage.put(3, at, 0xFFFFFFFF)
    assert [cage.get(3, at) for at in (0, 8, 0x2C, 0x34)] == before
    assert cage.get(3, 0x3D, 1) == 1


def test_intx_follows_level_command_and_swizzle(cage: Cage) -> None:
    """INTx drives the line of slot and pin, is silenced by INTx disable, and shows in the status register."""
    device = Plain()
    cage.add(device, "03.0")
    line = cage.lines[cage.host.gsi(3, 0)]
    assert cage.get(3, 0x3C, 1) == cage.host.gsi(3, 0) == 11
    device.function.intx(True)
    assert line.level
    assert cage.get(3, 6, 2) & 8
    cage.put(3, 4, 1 << 10, 2)
    assert not line.level
    cage.put(3, 4, 0, 2)
    assert line.level
    device.function.intx(False)
    assert not line.level


def test_msix_delivers_masks_and_keeps_pending(cage: Cage) -> None:
    """A masked vector is pending and is sent when unmasked; while MSI-X is on, INTx is silent."""
    device = Plain()
    cage.add(device, "03.0")
    at = capability(cage, 3, 0x11)
    assert cage.get(3, at + 2, 2) == 2
    table = cage.get(3, 0x14) & ~15
    cage.put(3, 4, 6, 2)
    device.function.intx(True)
    cage.put(3, at + 2, 0x8000, 2)
    assert not cage.lines[11].level
    cage.mmio.write(table + 16, 4, 0xFEE01000)
    cage.mmio.write(table + 24, 4, 0x41)
    device.function.notify(1)
    half = cage.get(3, at + 8) & ~7
    assert (cage.sent, cage.mmio.read(table + half, 8)) == ([], 2)
    cage.mmio.write(table + 28, 4, 0)
    assert cage.sent == [(0xFEE01000, 0x41)]
    assert cage.mmio.read(table + half, 8) == 0
    cage.put(3, at + 2, 0xC000, 2)
    device.function.notify(1)
    assert len(cage.sent) == 1
    cage.put(3, at + 2, 0x8000, 2)
    assert len(cage.sent) == 2


def test_msi_delivers_granted_vectors(cage: Cage) -> None:
    """MSI folds vectors onto those the guest granted and honours its mask bits."""
    device = Plain(msix=0, msi=4)
    cage.add(device, "03.0")
    at = capability(cage, 3, 5)
    cage.put(3, at + 4, 0xFEE00000)
    cage.put(3, at + 12, 0x40, 2)
    cage.put(3, at + 2, 0x0011, 2)
    for vector in range(4):
        device.function.notify(vector)
    assert [data for _, data in cage.sent] == [0x40, 0x41, 0x40, 0x41]
    cage.put(3, at + 16, 2)
    device.function.notify(1)
    assert len(cage.sent) == 4
    cage.put(3, at + 16, 0)
    assert len(cage.sent) == 5


def test_an_eventfd_is_routed_while_its_vector_is_open(cage: Cage) -> None:
    """With irqfds the accelerator gets the route of an unmasked vector, and loses it when masked."""
    routes: dict[int, tuple[int, int, int]] = {}
    slot = cage.new_slot("fast")
    slot.interrupts.vm = SimpleNamespace(
        capabilities=frozenset({"irqfds"}),
        add_irqfd=lambda fd, address, data: routes.__setitem__(7, (fd, address, data)) or 7,
        remove_irqfd=lambda fd, route: routes.pop(route),
    )
    device = Plain()
    cage.host.attach(device, slot, "03.0")
    device.function.msix.bind(1, 99)
    assert slot.loop.readers.keys() == {99}
    cage.put(3, 4, 6, 2)
    table = cage.get(3, 0x14) & ~15
    cage.put(3, capability(cage, 3, 0x11) + 2, 0x8000, 2)
    cage.mmio.write(table + 16, 8, 0xFEE02000)
    cage.mmio.write(table + 24, 8, 0x33)
    assert routes == {7: (99, 0xFEE02000, 0x33)}
    assert not slot.loop.readers
    cage.mmio.write(table + 28, 4, 1)
    assert not routes
    assert device.function.msix.unbind(99)
    assert not slot.loop.readers
    assert not device.function.msix.unbind(99)


def test_port_cf9_resets_on_a_rising_bit(cage: Cage) -> None:
    """Writing 6 to 0xCF9 asks for a reset once."""
    cage.pio.write(0xCF9, 1, 2)
    cage.pio.write(0xCF9, 1, 6)
    cage.pio.write(0xCF9, 1, 6)
    assert len(cage.slot.power.requests) == 1


def test_devices_may_own_bytes_of_configuration_space(cage: Cage) -> None:
    """Initial bytes, write masks and the write call let a platform card keep PAM registers there."""
    device = Plain(config={0x59: b"\x30"}, writable={0x59: b"\xff" * 7}, multifunction=True)
    cage.add(device, "00.0")
    assert cage.get(0, 0x59, 1) == 0x30
    cage.put(0, 0x5A, 0x33, 1)
    assert device.written == [(0x5A, 1)]
    assert device.function.config[0x5A] == 0x33
    assert cage.get(0, 0x0E, 1) == 0x80


def test_a_configuration_read_that_does_not_fit_is_told_once(cage: Cage) -> None:
    """The guest reads the lowest bytes, and no neighbour of theirs is another for it; one line names file and line."""

    class Wide(Plain):
        def config_read(self, offset: int, size: int) -> int | None:
            return {0x40: -1, 0x41: 0x1234}.get(offset)

    slot = cage.add(Wide(msix=0), "03.0")
    where = 3 << 3
    for _ in range(2):
        assert cage.host.config_read(where, 0x3F, 4) == 0x0034FF00
        assert cage.get(3, 0x41, 1) == 0x34
    ((_, event, values),) = slot.log.entries
    assert event == "card's read gave what does not fit"
    assert f"{__file__}:" in values["at"]
    assert "config_read(0x40, 1) gave more or less than 0 to 0xff" in values["why"]


@pytest.mark.parametrize("address", ["40", "1.8", "x", "-1", "03.0"])
def test_a_bad_or_taken_address_is_a_configuration_error(cage: Cage, address: str) -> None:
    """Addresses are checked, and say what was expected or who is there."""
    cage.add(Plain(), "03.0")
    with pytest.raises(ConfigError):
        cage.add(Plain(), address)


@pytest.mark.parametrize(
    "wrong",
    [
        {"vendor": -1},
        {"colour": 1},
        {"bars": [{"index": 0, "size": 3}]},
        {"bars": [{"index": 5, "size": 4096, "kind": "memory64"}]},
        {"bars": [{"index": 1, "size": 4096}]},
        {"msi": 3},
    ],
)
def test_a_wrong_statement_blames_the_card(cage: Cage, wrong: dict[str, Any]) -> None:
    """What a device states is checked key by key."""
    with pytest.raises(CardError, match="pci"):
        cage.add(Plain(**wrong))


def test_reset_and_state_bring_everything_back(cage: Cage) -> None:
    """Reset gives the preset state; a saved state loads into an equal bus."""
    device = Plain()
    cage.add(device, "03.0")
    fresh = cage.host.save()
    cage.put(3, 0x10, 0xE7000000)
    cage.put(3, 4, 3, 2)
    device.function.intx(True)
    used = cage.host.save()
    cage.host.reset()
    assert cage.host.save() == fresh
    cage.host.load(used)
    assert cage.mmio.read(0xE7000004, 4) == 4
    assert cage.host.save() == used


def test_bars_that_changed_places_are_brought_back(cage: Cage) -> None:
    """Each BAR is where it was saved, though another has that place when the state is loaded."""
    for slot, place in ((3, 0xE8000000), (4, 0xE9000000)):
        cage.add(Plain(), f"0{slot}.0")
        cage.put(slot, 4, 2, 2)
        cage.put(slot, 0x10, place)
    saved = cage.host.save()
    for slot, place in ((3, 0xEA000000), (4, 0xE8000000), (3, 0xE9000000)):
        cage.put(slot, 0x10, place)
    cage.host.load(saved)
    assert [cage.host.functions[slot << 3].mappings[0].address for slot in (3, 4)] == [0xE8000000, 0xE9000000]


@pytest.mark.parametrize("restored", [False, True])
def test_a_bar_without_room_waits_for_an_unplugged_one_too(cage: Cage, restored: bool) -> None:
    """A BAR that overlaps another comes up once that is unplugged, also after the bus was saved and loaded."""
    first = Plain()
    cage.add(first, "03.0")
    cage.add(Plain(), "04.0")
    for slot in (3, 4):
        cage.put(slot, 4, 2, 2)
        cage.put(slot, 0x10, 0xE8000000)
    if restored:
        cage.host.load(cage.host.save())
    cage.host.detach(first)
    assert cage.host.functions[4 << 3].mappings[0].address == 0xE8000000


ACCESS = st.tuples(
    st.sampled_from(["pio", "ecam", "msix"]),
    st.integers(0, 4095),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1),
)


@given(st.lists(ACCESS, max_size=40))
def test_no_configuration_access_hurts_the_host(accesses: list[tuple[str, int, int, int]]) -> None:
    """Any writes to configuration space and the MSI-X BAR leave ids intact and raise nothing."""
    cage = Cage()
    device = Plain(msi=8)
    cage.add(device, "03.0")
    for how, at, size, value in accesses:
        value &= (1 << 8 * size) - 1
        if how == "pio":
            cage.put(3, at & 0xFF, value & 0xFFFFFFFF, min(size, 4))
        elif how == "ecam":
            cage.mmio.write(0xE0000000 + (3 << 15) + at, size, value)
            cage.mmio.read(0xE0000000 + (3 << 15) + at, size)
        else:
            device.function.msix.write(at, size, value)
            device.function.msix.read(at, size)
        device.function.notify(at & 7)
    assert cage.get(3, 0) == 0x10F01AF4
    cage.host.reset()


def test_an_accelerator_without_room_for_a_route_leaves_it_to_the_loop(cage: Cage) -> None:
    """A route that is refused is no failure: the eventfd is read on the loop thread and interrupts all the same."""

    def refuse(fd: int, address: int, data: int) -> int:
        raise AcceleratorError("no more routes")

    slot = cage.new_slot("many")
    slot.interrupts.vm = SimpleNamespace(capabilities=frozenset({"irqfds"}), add_irqfd=refuse)
    device = Plain()
    cage.host.attach(device, slot, "03.0")
    cage.put(3, 4, 6, 2)
    table = cage.get(3, 0x14) & ~15
    cage.put(3, capability(cage, 3, 0x11) + 2, 0x8000, 2)
    cage.mmio.write(table, 8, 0xFEE02000)
    cage.mmio.write(table + 8, 8, 0x33)
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    device.function.msix.bind(0, fd)
    slot.loop.readers[fd]()
    slot.loop.readers[fd]()
    assert cage.sent == [(0xFEE02000, 0x33)]
    device.function.msix.unbind(fd)
    os.close(fd)

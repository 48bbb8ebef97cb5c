r"""ACPI hot-plug of PCI devices: the registers of QEMU's ``pc`` (``docs/specs/acpi_pci_hotplug``), and their AML.

Twenty ports from 0xAE00, in doublewords of one bit for each slot of the bus:

- 0, up (read): slots with a device that the guest has not been told of; reading clears it.
- 4, down (read): slots whose device the guest is asked to let go of.
- 8, eject (write): the guest is done with the devices in these slots.
- 12, removable (read): slots that the guest may eject.
- 16, bus selector: there is one bus, 0. With another selected, the others read as 0 and eject nothing.

A change of *up* or *down* raises general-purpose event 1, whose method ``\_GPE._E01`` has the guest look at both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.errors import Denied
from cardcage.values import define

from cardcage_pc.acpi import aml
from cardcage_pc.chips.bytewise import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage.device import Slot

__all__ = ["BASE", "SIZE", "PciHotplug", "PciHotplugState", "events", "slots"]

BASE, SIZE, GPE = 0xAE00, 20, 1
EJECT, BUS = 8, 16


@define
class PciHotplugState:
    """The registers, as masks of slots, and the bus selector."""

    version: ClassVar[int] = 1
    up: int = 0
    down: int = 0
    bus: int = 0


class PciHotplug:
    """On the ``pci`` bus, but no function of it: its controller (:class:`cardcage_pci.spec.HotplugController`)."""

    slots: Iterable[int] = range(2, 32)
    """Slots 0 and 1 are the chipset's own."""

    def __init__(self) -> None:
        self.state = PciHotplugState()
        self._bus: Any = None

    def plug_bus(self, bus: Any, /) -> None:
        """*bus* is the one that is controlled: its ``occupants(slot)`` and ``removable(slot)`` are asked for."""
        self._bus = bus

    def plug(self, slot: Slot, /) -> None:
        self._board, self._log = slot.board, slot.log

    def reset(self) -> None:
        """Devices that were to go are gone after a reset, whatever the guest does with the request."""
        down, self.state = self.state.down, PciHotplugState()
        self._eject(down)

    def save(self) -> PciHotplugState:
        state = self.state
        return PciHotplugState(state.up, state.down, state.bus)

    def unchanged(self, state: PciHotplugState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: PciHotplugState, /) -> None:
        self.state = PciHotplugState(state.up, state.down, state.bus)

    # the bus's side

    def arrived(self, slot: int, /) -> None:
        """A device was plugged into *slot*."""
        self.state.up |= 1 << slot
        self._event()

    def leaving(self, slot: int, /) -> None:
        """The guest is to let go of the device in *slot*."""
        self.state.down |= 1 << slot
        self._event()

    def emptied(self, slot: int, /) -> None:
        """*slot* is empty now."""
        self.state.up &= ~(1 << slot)
        self.state.down &= ~(1 << slot)

    def _event(self) -> None:
        for one in self._board.devices.values():
            if callable(signal := getattr(one.device, "general_event", None)):
                signal(GPE)
                return
        self._log.warning("no device raises the general-purpose event: the guest is not told")

    # the guest's side

    def read(self, offset: int, size: int, /) -> int:
        value = read_bytes(self._read, offset, size)
        if offset < 4 and self.state.bus == 0:
            self.state.up = 0
        return value

    def _read(self, offset: int) -> int:
        state = self.state
        if offset >= BUS:
            register = state.bus
        elif state.bus:
            register = 0
        elif offset >= EJECT + 4:
            register = sum(1 << slot for slot in self.slots if self._bus is not None and self._bus.removable(slot))
        else:
            register = (state.up, state.down, 0)[offset >> 2]
        return register >> 8 * (offset & 3) & 0xFF

    def write(self, offset: int, size: int, value: int, /) -> None:
        if offset == BUS and size == 4:
            self.state.bus = value
        elif EJECT <= offset < EJECT + 4 and self.state.bus == 0:
            self._eject(value << 8 * (offset - EJECT) & 0xFFFFFFFF)

    def _eject(self, mask: int) -> None:
        for slot in self.slots:
            if mask >> slot & 1 and self._bus is not None and self._bus.removable(slot):
                try:
                    for id in self._bus.occupants(slot):
                        self._board.unplug(id)
                except Denied as error:
                    self._log.warning("denied", why=str(error))


# AML


def _name(slot: int) -> str:
    return f"S{slot << 3:02X}_"


def slots() -> bytes:
    r"""The terms in ``\_SB.PCI0``: registers, a device for each slot, and the method that tells their drivers."""
    eject = aml.method(
        "PCEJ",
        1,
        aml.acquire("BLCK"),
        aml.store(aml.integer(0), "BNUM"),
        aml.store(aml.shift_left(aml.integer(1), aml.argument(0)), "B0EJ"),
        aml.release("BLCK"),
    )
    devices = [
        aml.device(
            _name(slot),
            aml.name("_ADR", aml.integer(slot << 16)),
            aml.name("_SUN", aml.integer(slot)),
            aml.method("_EJ0", 1, aml.path("PCEJ") + aml.integer(slot)),
        )
        for slot in PciHotplug.slots
    ]
    tell = [
        aml.when(aml.both(aml.argument(0), aml.integer(1 << slot)), aml.notify(_name(slot), aml.argument(1)))
        for slot in PciHotplug.slots
    ]
    look = aml.method(
        "PCNT",
        0,
        aml.acquire("BLCK"),
        aml.store(aml.integer(0), "BNUM"),
        aml.path("DVNT") + aml.path("PCIU") + aml.integer(1),  # device check
        aml.path("DVNT") + aml.path("PCID") + aml.integer(3),  # eject request
        aml.release("BLCK"),
    )
    return b"".join(
        (
            aml.ports("PCST", BASE, 8),
            aml.fields("PCST", ("PCIU", 32), ("PCID", 32)),
            aml.ports("SEJ_", BASE + EJECT, 4),
            aml.fields("SEJ_", ("B0EJ", 32)),
            aml.ports("BNMR", BASE + BUS, 4),
            aml.fields("BNMR", ("BNUM", 32)),
            aml.mutex("BLCK"),
            eject,
            *devices,
            aml.method("DVNT", 2, *tell),
            look,
        )
    )


def events() -> bytes:
    r"""``\_GPE``: the method of the event, edge-triggered."""
    return aml.scope("\\_GPE", aml.method(f"_E{GPE:02X}", 0, aml.path("\\_SB.PCI0.PCNT")))

"""Machines for tests of the verbs: with a console and a power button, and no guest but a script."""

from __future__ import annotations

from typing import Any

import cardcage_fleet
import cardcage_verbs
from cardcage.device import Pio, Slot
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage_fleet.control import find
from cardcage_fleet.roster import RosterEntry
from scripted import Scripted


class Front:
    """A power button that powers off, and a console; class attributes say how the guest is."""

    hears, obeys = True, True

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        self.typed = bytearray()
        self.pressed = 0
        self.char = slot.host.open("char", "console")
        self.char.start(self.typed.extend)

    @property
    def button_enabled(self) -> bool:
        return self.hears

    def power_button(self) -> None:
        self.pressed += 1
        if self.obeys:
            self.slot.power.off()

    def resize(self, columns: int, rows: int) -> None:
        self.size = columns, rows

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        pass


class Fronts:
    """Offers the device ``front``, and whatever popen it is given."""

    def __init__(self, popen: Any = None) -> None:
        self.popen = popen

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("front", Front, regions=(Pio(0x500, 1),))
        if self.popen is not None:
            registry.verb("popen", self.popen)


def machine(popen: Any = None, **keys: Any) -> Machine:
    """A machine on the roster, which the verbs reach."""
    host = Host([Scripted(), cardcage_fleet, cardcage_verbs, Fronts(popen)], installed=False)
    table = {"name": "vm", "memory": "2M", "platform": "none", "accel": ["scripted"], **keys}
    return Machine(host=host, machine=table, devices=[{"type": "front"}])


def front(vm: Machine) -> Front:
    """Its device."""
    device: Front = vm.devices["front"].device
    return device


def entry(name: str = "vm") -> RosterEntry:
    """Its place on the roster."""
    return find(name)

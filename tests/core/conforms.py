"""What mypy checks beside the shelves: the concrete classes satisfy the protocols that cards are written against."""

from __future__ import annotations

from cardcage.backends import CharBackend
from cardcage.boot import MachineBoot
from cardcage.clock import Clock
from cardcage.console import Console
from cardcage.device import BootContext, Control, Mapping, Slot
from cardcage.eventloop import MachineClock
from cardcage.granted import GrantedLine, GrantedMemory
from cardcage.interrupts import IrqLine, Line
from cardcage.machine import Machine
from cardcage.memory import GuestMemory, PhysicalMemory
from cardcage.ops import MachineOps
from cardcage.slot import DeviceSlot, MappedRegion, Requests
from cardcage.testing.slot import TestChar, TestClock, TestSlot
from cardcage.vcpu import Ops


def slots(machine: DeviceSlot, test: TestSlot) -> tuple[Slot, Slot]:
    return machine, test


def regions(mapped: MappedRegion) -> Mapping:
    return mapped


def machines(machine: Machine, boot: MachineBoot, ops: MachineOps) -> tuple[Control, Control, BootContext, Ops]:
    return machine, Requests(machine), boot, ops


def memories(physical: PhysicalMemory, mediated: GrantedMemory) -> tuple[GuestMemory, GuestMemory]:
    return physical, mediated


def lines(line: Line) -> IrqLine:
    return GrantedLine(line.source())


def clocks(machine: MachineClock, test: TestClock) -> tuple[Clock, Clock]:
    return machine, test


def characters(console: Console, test: TestChar) -> tuple[CharBackend, CharBackend]:
    return console, test

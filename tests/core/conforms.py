"""What mypy checks beside the shelves: the concrete classes satisfy the protocols that cards are written against."""

from __future__ import annotations

from cardcage._machine.board import Board as MachineBoard
from cardcage._machine.booting import MachineBoot
from cardcage._machine.console import Console
from cardcage._machine.eventloop import MachineClock
from cardcage._machine.granted import GrantedMemory, LineGate
from cardcage._machine.life import Life, Steps
from cardcage._machine.life import Power as MachinePower
from cardcage._machine.ops import MachineOps
from cardcage._machine.plugged import PluggedDevice
from cardcage._machine.ranges import MappedRegion
from cardcage._machine.slot import DeviceSlot
from cardcage._machine.wiring import Wiring
from cardcage.backends import CharBackend
from cardcage.boot import BootContext
from cardcage.clock import Clock
from cardcage.device import Controllers, Plugged, Power, RegionMapping, Slot
from cardcage.host import Dismantled
from cardcage.interrupts import IrqLine, Line
from cardcage.machine import Machine
from cardcage.memory import GuestMemory, PhysicalMemory
from cardcage.vcpu import Ops
from cardcage_testing.slot import TestChar, TestClock, TestSlot


def slots(machine: DeviceSlot, test: TestSlot) -> tuple[Slot, Slot]:
    return machine, test


def regions(mapped: MappedRegion) -> RegionMapping:
    return mapped


def machines(
    life: Life, board: MachineBoard, boot: MachineBoot, ops: MachineOps
) -> tuple[Power, Steps, Controllers, BootContext, Ops]:
    return MachinePower(life, "id"), board, board.wiring, boot, ops


def plugged(device: PluggedDevice, wiring: Wiring) -> tuple[Plugged, Controllers]:
    return device, wiring


def hosts(machine: Machine) -> Dismantled:
    return machine


def memories(physical: PhysicalMemory, mediated: GrantedMemory) -> tuple[GuestMemory, GuestMemory]:
    return physical, mediated


def lines(line: Line) -> IrqLine:
    return LineGate(line).source


def clocks(machine: MachineClock, test: TestClock) -> tuple[Clock, Clock]:
    return machine, test


def characters(console: Console, test: TestChar) -> tuple[CharBackend, CharBackend]:
    return console, test

"""A device and a boot protocol for tests of the machine, whose vCPUs follow scripts."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from attrs import define, field, frozen
from cardcage.boot import BootContext, E820Entry
from cardcage.device import Slot
from cardcage.machine import Machine
from cardcage.x86 import VCpuState, reset_state
from scripted import Script, ScriptedVCpu

Steps = Generator[tuple[Any, ...], Any, None]


class Panel:
    """A device for tests: writes ask the machine for things, reads tell what happened."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        self.char = slot.host.open("char", "console")
        self.char.start(lambda data: self.calls.append(data))

    def unplug(self) -> None:
        self.calls.append("unplug")

    def reset(self) -> None:
        self.calls.append("reset")

    def power_button(self) -> None:
        self.calls.append("button")
        self.slot.power.off()

    def contribute(self, context: BootContext, /) -> None:
        self.calls.append("contribute")
        context.reserve(0x9000, 0x1000, 4)

    def read(self, offset: int, size: int, /) -> int:
        return len(self.calls)

    def write(self, offset: int, size: int, value: int, /) -> None:
        power = self.slot.power
        match offset:
            case 0:
                power.off()
            case 1:
                power.reset("asked")
            case 2:
                power.panic("oops")
            case 3:
                power.exit(value)
            case 4:
                raise ZeroDivisionError("a card's bug")
            case 5:
                self.char.write(bytes([value]))
            case 6:
                self.calls.append(value)
            case 7:
                power.panic("why", soon=True)


@frozen
class RawOptions:
    fill: int = 0xAB


@define
class RawBoot:
    """A boot protocol that fills a page and counts how often it was loaded."""

    options: RawOptions
    loads: int = 0
    e820: list[E820Entry] = field(factory=list)

    def open(self) -> RawBoot:
        return self

    def load(self, context: BootContext, /) -> VCpuState:
        self.loads += 1
        context.memory.write(0x1000, bytes([self.options.fill, self.loads]))
        self.e820 = list(context.e820)
        state = reset_state()
        state.registers.rip = 0x1000
        return state


def out(offset: int, value: int = 1) -> Script:
    """A guest that writes once to the panel."""

    def script(_: ScriptedVCpu) -> Steps:
        yield ("out", 0x80 + offset, 1, value)

    return script


def panel(machine: Machine) -> Panel:
    """The machine's panel."""
    found: Panel = machine.devices["panel"].device
    return found

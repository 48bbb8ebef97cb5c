"""A slot for the tests of cardcage_pc, with devices beside the one that is tested."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cardcage_testing import TestSlot

if TYPE_CHECKING:
    from cardcage.device import Region
    from cardcage_testing.slot import TestChar

T = TypeVar("T")
SECOND = 1_000_000_000


class KitMapping:
    """A region that is mapped nowhere really."""

    def __init__(self, region: Region | None, address: int | None) -> None:
        self.region, self.address = region, address

    def move(self, address: int | None, /) -> None:
        self.address = address


class Kit(TestSlot):
    """A slot whose number of rising edges, lines and buses are at hand.

    Args:
        bases: where the device's regions are.
    """

    def __init__(self, *bases: int) -> None:
        super().__init__(irq=None)
        self.ranges.mappings = cast(Any, [KitMapping(None, base) for base in bases])
        self.devices, self.lines = self.board.devices, self.interrupts.lines
        self.messages, self.requests = self.interrupts.messages, self.power.requests
        self.pio, self.mmio = self.ranges.ports, self.ranges.space
        self.opened = self.host.opened

    @property
    def edges(self) -> list[int]:
        """Rising edges so far, by GSI."""
        return [sum(self.interrupts.levels.get(gsi, [])) for gsi in range(24)]

    @property
    def extint(self) -> bool:
        """The 8259's output."""
        return bool(self.board.extint and self.board.extint[-1])

    @property
    def wire(self) -> TestChar:
        """The back end that was opened."""
        (opened,) = self.opened.values()
        return cast("TestChar", opened)

    def plugged(self, device: T, name: str = "") -> T:
        """Plug *device* in and return it."""
        self.devices[name or str(len(self.devices))] = SimpleNamespace(device=device, slot=self, type=name)
        cast(Any, device).plug(self)
        return device

    def level(self, gsi: int) -> bool:
        """The level of line *gsi* now."""
        return self.lines[gsi].level

"""What the tests of cardcage_pc plug devices into: a slot that is its own machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cardcage.testing import TestSlot

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Region
    from cardcage.memory import RamRange
    from cardcage.testing.slot import TestChar

T = TypeVar("T")
SECOND = 1_000_000_000


class KitMapping:
    """A region that is mapped nowhere really."""

    def __init__(self, region: Region | None, address: int | None) -> None:
        self.region, self.address = region, address

    def move(self, address: int | None, /) -> None:
        self.address = address


class Kit(TestSlot):
    """``edges[gsi]`` counts rising edges; ``extint`` is the 8259's output; ``wire`` the end of the cable.

    Args:
        bases: where the device's regions are.
    """

    def __init__(self, *bases: int) -> None:
        self.edges = [0] * 24
        super().__init__(irq=None)
        self.mappings = cast(Any, [KitMapping(None, base) for base in bases])
        self.controllers: list[Callable[[int, bool], None]] = []
        self.eoi_listeners: list[Callable[[int], None]] = []
        self.extint = False
        self.acknowledge: Callable[[], int | None] | None = None

    @property
    def wire(self) -> TestChar:
        """The back end that was opened."""
        (opened,) = self.opened.values()
        return cast("TestChar", opened)

    def _changed(self, gsi: int) -> Callable[[bool], None]:
        def changed(level: bool) -> None:
            self.edges[gsi] += level
            for controller in self.controllers:
                controller(gsi, level)

        return changed

    def plugged(self, device: T, name: str = "") -> T:
        """Plug *device* in and return it."""
        self.devices[name or str(len(self.devices))] = SimpleNamespace(device=device, slot=self, type=name)
        cast(Any, device).plug(self)
        return device

    def level(self, gsi: int) -> bool:
        """The level of line *gsi* now."""
        return self.lines[gsi].level

    # the machine's side

    def add_controller(self, set_irq: Callable[[int, bool], None]) -> None:
        self.controllers.append(set_irq)

    def add_eoi_listener(self, listener: Callable[[int], None]) -> None:
        self.eoi_listeners.append(listener)

    def set_extint_source(self, acknowledge: Callable[[], int | None]) -> None:
        self.acknowledge = acknowledge

    def set_extint(self, level: bool) -> None:
        self.extint = level

    def change_memory(self, add: tuple[RamRange, ...] = (), remove: tuple[RamRange, ...] = ()) -> None:
        self.memory.change(add, remove)

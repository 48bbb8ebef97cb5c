"""Devices that come and go while the guest runs: the bus's side, which a hot-plug controller tells the guest of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage_pci.function import Function
    from cardcage_pci.spec import HotplugController

__all__ = ["ComingAndGoing"]


class ComingAndGoing:
    """A bus of 32 slots; satisfies the part of :class:`~cardcage.device.HotplugBus` that is not attaching."""

    functions: dict[int, Function]
    _controller: HotplugController | None

    if TYPE_CHECKING:

        def _choose(self, address: str | None) -> int:
            """The number that *address* names, or a free one. Raises ConfigError."""

    def occupants(self, slot: int) -> list[str]:
        """The ids of the devices in *slot*."""
        return [one.slot.id for where, one in self.functions.items() if where >> 3 == slot]

    def removable(self, slot: int) -> bool:
        """True if the device in *slot* can be taken out: one that has the slot for itself."""
        return slot in self._coming_and_going and len(self.occupants(slot)) == 1

    @property
    def _coming_and_going(self) -> Iterable[int]:
        return self._controller.slots if self._controller is not None else ()

    def check_arrival(self, address: str | None, /) -> None:
        """See :class:`~cardcage.device.HotplugBus`."""
        if self._controller is None:
            raise StateError("the PCI bus of this machine has no hot-plug controller: add devices before it starts")
        where = self._choose(address)
        if where & 7 or self.occupants(where >> 3) or where >> 3 not in self._coming_and_going:
            slots = [f"{one:02x}.0" for one in self._coming_and_going if not self.occupants(one)]
            raise ConfigError(
                f'address "{address}": while the machine runs, a device goes into an empty slot '
                f"({f'{slots[0]} to {slots[-1]}' if slots else 'there is none'})",
                key="address",
            )

    def arrived(self, device: Any, /) -> None:
        """See :class:`~cardcage.device.HotplugBus`."""
        if self._controller is not None:
            self._controller.arrived(self._function(device).address >> 3)

    def request_removal(self, device: Any, /) -> None:
        """See :class:`~cardcage.device.HotplugBus`."""
        function = self._function(device)
        if self._controller is None or not self.removable(function.address >> 3):
            why = "the bus has no hot-plug controller" if self._controller is None else "its slot is not its own"
            raise StateError(f'device "{function.slot.id}" at {self.place_of(device)} cannot be taken out: {why}')
        self._controller.leaving(function.address >> 3)

    def place_of(self, device: Any, /) -> str | None:
        """Where *device* is, as ``05.0``; None for the hot-plug controller."""
        if device is self._controller:
            return None
        address = self._function(device).address
        return f"{address >> 3:02x}.{address & 7}"

    def _function(self, device: Any) -> Function:
        found = next((one for one in self.functions.values() if one.device is device), None)
        if found is None:
            raise StateError("the device is no function of the PCI bus")
        return found

"""A device in its slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cardcage._machine.slot import DeviceSlot
    from cardcage.config import DeviceConfig


class PluggedDevice:
    """A device in its slot: ``machine.devices[id]``; satisfies :class:`~cardcage.device.Plugged`.

    Attributes:
        id, type: as configured. device: the card's object. slot: its :class:`DeviceSlot`.
        abilities: what was found, see :mod:`cardcage.abilities`. config: its table, as it was given.
        carrier: the device that carries it; None for one that needs no bus.
    """

    __slots__ = ("abilities", "carrier", "config", "device", "id", "slot", "type", "who")

    def __init__(
        self, device: Any, slot: DeviceSlot, type: str, who: str, abilities: frozenset[str], *more: Any
    ) -> None:
        self.device, self.slot, self.abilities = device, slot, abilities
        self.config: DeviceConfig
        self.config, self.carrier = more
        self.id, self.type, self.who = slot.id, type, who


def able(devices: Mapping[str, PluggedDevice], ability: str) -> list[Any]:
    """The devices of a machine that have *ability*, in the order in which they were plugged in."""
    return [one.device for one in devices.values() if ability in one.abilities]

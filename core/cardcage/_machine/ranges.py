"""Ranges that a device answers at: the concrete :class:`~cardcage.device.Ranges`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage._machine.bus import Claim
from cardcage.abilities import check_signature
from cardcage.device import Mmio, Pio
from cardcage.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._machine.asking import Asking
    from cardcage._machine.bus import Bus
    from cardcage.config import DeviceConfig
    from cardcage.device import Region, Resource
    from cardcage.registry import DeviceOffer


class MappedRegion:
    """A region of a device on a bus, or not on it for now; satisfies :class:`~cardcage.device.RegionMapping`.

    Args:
        moved: asked before it moves; raises what keeps it where it is.
    """

    __slots__ = ("_claim", "_moved", "_read", "_write", "address", "bus", "name", "region")

    def __init__(
        self,
        bus: Bus,
        region: Region,
        device: Any,
        name: str,
        moved: Callable[[MappedRegion, int], None],
    ) -> None:
        self.region, self.name, self.bus = region, name, bus
        self._moved = moved
        self._read = check_signature(device, region.read, 2, name)
        self._write = check_signature(device, region.write, 3, name)
        self.address: int | None = None
        self._claim: Claim | None = None

    def overlaps(self, address: int, size: int) -> bool:
        """True when it answers anywhere in that range."""
        return self.address is not None and self.address < address + size and address < self.address + self.region.size

    def move(self, address: int | None, /) -> None:
        """Answer at *address*, or nowhere. Raises ConfigError on overlap (then nothing changed)."""
        if address == self.address:
            return
        if address is not None:
            self._moved(self, address)
        old, new = self._claim, None
        if old is not None:
            self.bus.remove(old)
        try:
            if address is not None:
                new = Claim(address, self.region.size, self._read, self._write, self.name)
                self.bus.add(new)
        except ConfigError:
            if old is not None:
                self.bus.add(old)
            raise
        self._claim, self.address = new, address


class DeviceRanges:
    """One device's ranges on the two buses.

    Args:
        occupant: the label of another device that answers in a range; None when it is free.
        refuse: called with a name, an address and a size of memory before the machine runs; raises ConfigError where
            RAM is.
    """

    def __init__(
        self,
        asking: Asking,
        pio: Bus,
        mmio: Bus,
        occupant: Callable[[Bus, MappedRegion, int, int], str | None],
        refuse: Callable[[str, int, int], None],
    ) -> None:
        self._asking, self._pio, self._mmio, self._occupant, self._refuse = asking, pio, mmio, occupant, refuse
        self.mappings: list[MappedRegion] = []
        self.resources: list[Resource] = []

    def pio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        """Claim one more range of ports."""
        return self._map(self._pio, region, base, device)

    def mmio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        """Claim one more range of guest-physical addresses."""
        return self._map(self._mmio, region, base, device)

    def announce(self, resource: Resource, /) -> None:
        """State what the device claims, for ACPI and e820."""
        self.resources.append(resource)

    def _map(self, bus: Bus, region: Region, base: int | None, device: Any) -> MappedRegion:
        id = self._asking.device
        mapping = MappedRegion(bus, region, device, f"{id}.{region.name}" if region.name else id, self._moving)
        if base is not None:
            mapping.move(base)
        self.mappings.append(mapping)
        return mapping

    def _moving(self, mapping: MappedRegion, address: int) -> None:
        bus, size = mapping.bus, mapping.region.size
        if self._asking.active:
            there = self._occupant(bus, mapping, address, size) or self._asking.machine_label
            permission = "claim" if mapping not in self.mappings else "move"
            self._asking.check(there, "bus", (permission,), bus=bus.name, address=hex(address), size=size)
        if bus is self._mmio:
            self._refuse(mapping.name, address, size)

    def bind(self, device: Any, config: DeviceConfig, offer: DeviceOffer) -> None:
        """Map the regions that the registration declared, at the configured or default addresses."""
        place, system = config.place, offer.bus == "system"
        for kind, word, value in ((Pio, "port", config.port), (Mmio, "address", config.address)):
            regions = [one for one in offer.regions if isinstance(one, kind)]
            if kind is Mmio and not system:
                if not isinstance(value, str | None):
                    raise place.below(word).error(f'expected text such as "03.0", the place on the {offer.bus} bus')
                value = None  # the bus reads it
            if isinstance(value, str):
                raise place.below(word).error(f'expected a number, got "{value}"')
            bases = [value] if isinstance(value, int) else list(value or ())
            if len(bases) > len(regions):
                raise place.below(word).error(f'"{offer.name}" has {len(regions)} to give, got {len(bases)}')
            for at, region in enumerate(regions):
                base = bases[at] if at < len(bases) else region.base
                if base is None and system:
                    raise place.error(f'device "{self._asking.device}" needs the key {word}')
                try:
                    (self.pio if kind is Pio else self.mmio)(region, base, device)
                except ConfigError as error:
                    raise place.error(error.problem) from error

    def owns(self, pio: bool, address: int, size: int) -> bool:
        """True when one of its ranges answers at all of that range of ports, or else of addresses, now."""
        bus = self._pio if pio else self._mmio
        return any(
            one.bus is bus
            and one.address is not None
            and one.address <= address
            and address + size <= one.address + one.region.size
            for one in self.mappings
        )

    def close(self) -> None:
        """Answer nowhere."""
        for mapping in self.mappings:
            mapping.move(None)

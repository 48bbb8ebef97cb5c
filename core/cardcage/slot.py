"""The slot: what one plugged-in device holds of its machine (:class:`~cardcage.device.Slot`, the concrete one)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.abilities import check_signature
from cardcage.bus import Claim
from cardcage.device import Mmio, Pio, Region, Resource
from cardcage.errors import ConfigError
from cardcage.security import MediatedMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.bus import Bus
    from cardcage.clock import Clock
    from cardcage.config import DeviceConfig
    from cardcage.device import Control
    from cardcage.interrupts import IrqLine
    from cardcage.machine import Machine
    from cardcage.memory import GuestMemory
    from cardcage.policy import MemoryBalloon
    from cardcage.registry import Offer

__all__ = ["DeviceSlot", "MappedRegion", "PluggedDevice", "spec_table"]


class MappedRegion:
    """A region of a device on a bus, or not on it for now; satisfies :class:`~cardcage.device.Mapping`."""

    __slots__ = ("_bus", "_claim", "_moved", "_read", "_write", "address", "name", "region")

    def __init__(
        self,
        bus: Bus,
        region: Region,
        device: Any,
        name: str,
        moved: Callable[[MappedRegion, int], None],
    ) -> None:
        self.region, self.name = region, name
        self._bus, self._moved = bus, moved
        self._read = check_signature(device, region.read, 2, name)
        self._write = check_signature(device, region.write, 3, name)
        self.address: int | None = None
        self._claim: Claim | None = None

    def move(self, address: int | None, /) -> None:
        """Answer at *address*, or nowhere. Raises ConfigError on overlap (then nothing changed)."""
        if address == self.address:
            return
        if address is not None:
            self._moved(self, address)
        old, new = self._claim, None
        if old is not None:
            self._bus.remove(old)
        try:
            if address is not None:
                new = Claim(address, self.region.size, self._read, self._write, self.name)
                self._bus.add(new)
        except ConfigError:
            if old is not None:
                self._bus.add(old)
            raise
        self._claim, self.address = new, address


def spec_table(spec: Any, *, file: str | None = None, key: str | None = None) -> tuple[str, dict[str, Any] | str]:
    """Split a spec into its type and the rest: ``"file:log.txt"`` -> ("file", "log.txt"), ``{type="file", path=...}``.

    Raises ConfigError when it is neither text nor a table with ``type``.
    """
    if isinstance(spec, str):
        name, colon, rest = spec.partition(":")
        return (name, rest) if colon else (name, {})
    if isinstance(spec, dict) and isinstance(spec.get("type"), str):
        return spec["type"], {name: value for name, value in spec.items() if name != "type"}
    raise ConfigError(f'expected text such as "stdio" or a table with "type", got {spec!r}', file=file, key=key)


class DeviceSlot:
    """Made by the machine for each device. See :class:`~cardcage.device.Slot` for what each member means."""

    def __init__(self, machine: Machine, config: DeviceConfig, offer: Offer, id: str) -> None:
        self.machine = machine
        self.config, self.offer, self.id = config, offer, id
        self.label = config.label or offer.name
        self.mappings: list[MappedRegion] = []
        self.resources: list[Resource] = []
        self.irqs: list[int] = []
        self.clock: Clock = machine.clock
        self.control: Control = machine
        self.log: Any = machine.log.bind(device=id)
        self.irqchip: str = machine.irqchip
        self.vm: Any = machine.vm
        self._physical: GuestMemory = machine.memory
        self.has_console = False
        self._opened: list[Any] = []
        self._balloon: MemoryBalloon | None = None
        self._readers: set[int] = set()

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM; asks the security checkers at each access when there are any."""
        if not self.machine.mediator.checkers:
            return self._physical
        return MediatedMemory(self._physical, self.machine.mediator, self.label, self.machine.label)

    def _allow(self, target: str, tclass: str, permission: str) -> None:
        self.machine.mediator.check(self.label, target, tclass, permission)

    # interrupts

    def irq(self, gsi: int | None = None, /) -> IrqLine:
        """A source of line *gsi* (0 to 23), by default of the ``irq`` key's."""
        gsi = self.config.irq if gsi is None else gsi
        if gsi is None:
            raise self.config.place.error(f'device "{self.id}" needs an interrupt: give it the key irq')
        if not 0 <= gsi < len(self.machine.lines):
            raise self.config.place.error(
                f'device "{self.id}": interrupt {gsi}: expected 0 to {len(self.machine.lines) - 1}'
            )
        self._allow(self.machine.label, "interrupt", "raise")
        self.irqs.append(gsi)
        return self.machine.lines[gsi].source()

    @property
    def irq_number(self) -> int | None:
        """The ``irq`` key, None where the configuration has none."""
        return self.config.irq

    def msi(self, address: int, data: int, /) -> None:
        """Send a message-signalled interrupt."""
        if self.machine.mediator.checkers:
            self._allow(self.machine.label, "interrupt", "message")
        self.vm.signal_msi(address, data)

    # ranges

    def map_pio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        """Claim one more range of ports."""
        return self._map(self.machine.pio, region, base, device)

    def map_mmio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        """Claim one more range of guest-physical addresses."""
        return self._map(self.machine.mmio, region, base, device)

    def _map(self, bus: Bus, region: Region, base: int | None, device: Any) -> MappedRegion:
        self._allow(bus.name, "bus", "claim")
        name = f"{self.id}.{region.name}" if region.name else self.id
        mapping = MappedRegion(bus, region, device, name, self._moving)
        if base is not None:
            mapping.move(base)
        self.mappings.append(mapping)
        return mapping

    def _moving(self, mapping: MappedRegion, address: int) -> None:
        if self.machine.mediator.checkers:
            self._allow(mapping._bus.name, "bus", "move")
        if mapping._bus is self.machine.mmio and self.machine.state == "built":
            # Later the guest may place a BAR over RAM: RAM wins, as on a PC, and nothing is refused.
            for slot in self.machine.memory.slots:
                if address < slot.address + slot.size and slot.address < address + mapping.region.size:
                    raise ConfigError(
                        f"{mapping.name}: memory {address:#x}-{address + mapping.region.size - 1:#x} overlaps RAM at "
                        f"{slot.address:#x}-{slot.address + slot.size - 1:#x}"
                    )

    def bind(self, device: Any) -> None:
        """Map the regions that the registration declared, at the configured or default addresses."""
        place, system = self.config.place, self.offer.bus == "system"
        for kind, word, value in ((Pio, "port", self.config.port), (Mmio, "address", self.config.address)):
            regions = [one for one in self.offer.regions if isinstance(one, kind)]
            if kind is Mmio and not system:
                if not isinstance(value, str | None):
                    raise place.below(word).error(
                        f'expected text such as "03.0", the place on the {self.offer.bus} bus'
                    )
                value = None  # the bus reads it
            if isinstance(value, str):
                raise place.below(word).error(f'expected a number, got "{value}"')
            bases = [value] if isinstance(value, int) else list(value or ())
            if len(bases) > len(regions):
                raise place.below(word).error(f'"{self.offer.name}" has {len(regions)} to give, got {len(bases)}')
            for at, region in enumerate(regions):
                base = bases[at] if at < len(bases) else region.base
                if base is None and system:
                    raise place.error(f'device "{self.id}" needs the key {word}')
                try:
                    (self.map_pio if kind is Pio else self.map_mmio)(region, base, device)
                except ConfigError as error:
                    raise place.error(error.problem) from error

    # back ends

    def open(self, kind: str, spec: Any, /) -> Any:
        """Open a back end of *kind* ``char``, ``block`` or ``net``; closed with the machine. Raises ConfigError."""
        place = self.config.place
        name, rest = self._choose(kind, spec)
        self._allow(f"{kind}:{name}", "backend", "open")
        if kind == "char" and name == "console":
            opened: Any = self.machine.console.claim(self.id)
            self.has_console = True
        else:
            offer = self.machine.host.registry.get("backend", f"{kind}:{name}", file=place.file, key=place.key)
            options = self.machine.host.options(offer, rest, file=place.file, key=f"{place.key or self.id}.{name}")
            factory = offer.load()
            try:
                opened = factory(self, options) if options is not None else factory(self)
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
                raise place.error(f'{kind} back end "{name}" of device "{self.id}": {what}') from error
        self._opened.append(opened)
        return opened

    def _choose(self, kind: str, spec: Any) -> tuple[str, dict[str, Any] | str]:
        """The back end's name and what is for it; the default one of its kind takes what names none."""
        place = self.config.place
        registry = self.machine.host.registry
        for offer in registry:
            if offer.kind != "backend" or not offer.extra.get("default") or not offer.name.startswith(f"{kind}:"):
                continue
            default = offer.name.removeprefix(f"{kind}:")
            if isinstance(spec, dict) and "type" not in spec:
                return default, dict(spec)
            if isinstance(spec, str) and f"{kind}:{spec.partition(':')[0]}" not in registry.names("backend"):
                return default, spec
        return spec_table(spec, file=place.file, key=place.key)

    # the loop thread

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        """Call *callback* on the loop thread, under the machine's lock, whenever *fd* is readable."""
        self._readers.add(fd)
        self.machine.events.add_reader(fd, callback)

    def remove_reader(self, fd: int, /) -> None:
        self._readers.discard(fd)
        self.machine.events.remove_reader(fd)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Run *callback* on the loop thread under the machine's lock. Thread-safe."""
        self.machine.events.call_soon(callback)

    # announcements

    def balloon(self, balloon: MemoryBalloon, /) -> None:
        """The device is the machine's memory balloon, for its policies. Raises ConfigError when there is one."""
        if self.machine.balloon is not None:
            raise self.config.place.error(f'device "{self.id}": the machine has a memory balloon already')
        self.machine.balloon = self._balloon = balloon

    def announce(self, resource: Resource, /) -> None:
        """State what the device claims, for ACPI and e820."""
        self.resources.append(resource)

    def close(self) -> None:
        """Take the device's ranges, readers and back ends away. Under the machine's lock."""
        if self._balloon is not None:
            self.machine.balloon = self._balloon = None
        for mapping in self.mappings:
            mapping.move(None)
        for fd in list(self._readers):
            self.remove_reader(fd)
        opened, self._opened = self._opened, []
        for backend in opened:
            backend.close()


class PluggedDevice:
    """A device in its slot: ``machine.devices[id]``.

    Attributes:
        id, type: as configured. device: the card's object. slot: its :class:`DeviceSlot`.
        abilities: what was found, see :mod:`cardcage.abilities`.
    """

    __slots__ = ("abilities", "device", "slot")

    def __init__(self, device: Any, slot: DeviceSlot, abilities: frozenset[str]) -> None:
        self.device, self.slot, self.abilities = device, slot, abilities

    @property
    def id(self) -> str:
        return self.slot.id

    @property
    def type(self) -> str:
        return self.slot.offer.name

    @property
    def who(self) -> str:
        """For errors: the device, its card and distribution."""
        offer = self.slot.offer
        return f'device "{self.id}" (card {offer.card}, {offer.distribution})'

"""The slot: what one plugged-in device holds of its machine (:class:`~cardcage.device.Slot`, the concrete one)."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from cardcage.abilities import check_backend, check_signature
from cardcage.bus import Claim
from cardcage.config import Place, spec_table
from cardcage.device import Mmio, Pio, Region, Resource
from cardcage.errors import CardcageError, CardError, ConfigError, in_words
from cardcage.granted import GrantedBackend, GrantedLine, GrantedMemory, GrantedVm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cardcage.bus import Bus
    from cardcage.clock import Clock
    from cardcage.config import DeviceConfig
    from cardcage.device import Control
    from cardcage.interrupts import IrqLine
    from cardcage.machine import Machine
    from cardcage.memory import GuestMemory, PhysicalMemory
    from cardcage.policy import MemoryBalloon
    from cardcage.registry import Offer
    from cardcage.security import Grant

__all__ = ["DeviceSlot", "MappedRegion", "PluggedDevice"]


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

    def overlaps(self, address: int, size: int) -> bool:
        """Whether it answers anywhere in that range."""
        return self.address is not None and self.address < address + size and address < self.address + self.region.size

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


class Requests:
    """What a device may ask of its machine; satisfies :class:`~cardcage.device.Control`."""

    __slots__ = ("request_debug_exit", "request_panic", "request_poweroff", "request_reset")

    def __init__(self, machine: Machine) -> None:
        self.request_reset, self.request_poweroff = machine.request_reset, machine.request_poweroff
        self.request_panic, self.request_debug_exit = machine.request_panic, machine.request_debug_exit


def _nothing() -> None:
    pass


def key_of(table: Any, value: Any) -> str | None:
    """The path of *value* inside a configuration's *table* (``ports[1]``, ``net.behind``), None where it is not."""
    pairs = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, one in pairs:
        name = f"[{key}]" if isinstance(table, list) else str(key)
        if one == value:
            return name
        if (below := key_of(one, value)) is not None:
            return name + below if below.startswith("[") else f"{name}.{below}"
    return None


class DeviceSlot:
    """Made by the machine for each device. See :class:`~cardcage.device.Slot` for what each member means."""

    def __init__(self, machine: Machine, config: DeviceConfig, offer: Offer, id: str, label: str) -> None:
        self._machine = machine
        self.config, self.offer, self.id, self.label = config, offer, id, label
        self.mappings: list[MappedRegion] = []
        self.resources: list[Resource] = []
        self.irqs: list[int] = []
        self.clock: Clock = machine.clock
        self.control: Control = Requests(machine)
        self.log: Any = machine.log.bind(device=id)
        self.irqchip: str = machine.irqchip
        self.machine_name: str = machine.name
        self.vm: Any = GrantedVm(machine.vm, self._route)
        self._memory: GuestMemory | None = None
        self._messages: Callable[[int, int], None] | None = None
        self.has_console = False
        self._opened: list[Any] = []
        self._balloon: MemoryBalloon | None = None
        self._gate: GrantedBackend | None = None
        self._grants: dict[Grant, None] = {}
        self._readers: set[int] = set()

    # security

    def _facts(self, facts: Mapping[str, object]) -> dict[str, object]:
        return {"machine": self._machine.name, "device": self.id, **facts}

    def ask(
        self,
        tclass: str,
        name: str,
        permissions: tuple[str, ...],
        /,
        revoke: Callable[[], None] | None = None,
        restore: Callable[[], None] | None = None,
        **facts: object,
    ) -> Callable[[], None]:
        """See :class:`cardcage.device.Slot`."""
        mediator = self._machine.mediator
        if not mediator.checkers:
            return _nothing
        told = self._facts({"name": name, **facts})
        target = mediator.label(self.label, self._machine.label, tclass, name, permissions, told)
        gate = self._gate
        if gate is not None and revoke is None:  # a back end that is being opened: the gate before it shuts
            why = f"{tclass} {permissions} {target} {name}"
            grant = self._grant(target, tclass, permissions, told, gate.shut(why), gate.open(why))
        elif revoke is not None:
            grant = self._grant(target, tclass, permissions, told, revoke, restore or _nothing)
        else:
            grant = None
            mediator.check(self.label, target, tclass, permissions, told)
        return _nothing if grant is None else partial(self._drop, grant)

    def _drop(self, grant: Grant) -> None:
        """Idempotent, on any thread."""
        self._grants.pop(grant, None)
        grant.drop()

    def _grant(
        self,
        target: str,
        tclass: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object],
        revoke: Callable[[], None],
        restore: Callable[[], None],
        *,
        must: bool = True,
    ) -> Grant | None:
        grant = self._machine.mediator.grant(self.label, target, tclass, permissions, facts, revoke, restore, must=must)
        if grant is not None:
            self._grants[grant] = None
        return grant

    @property
    def machine(self) -> Machine:
        """The whole machine, for platform cards: asks for ``management reach``."""
        machine = self._machine
        machine.mediator.check(self.label, machine.label, "management", ("reach",), self._facts({}))
        return machine

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM, as far as it is granted."""
        if self._memory is None:
            machine = self._machine
            if not machine.mediator.checkers:
                self._memory = machine.memory
            else:
                memory = GrantedMemory(machine.memory, self.log)
                for permission, which in (("dma_read", "reads"), ("dma_write", "writes")):
                    off, on = memory.switch(which, False), memory.switch(which, True)
                    self._grant(machine.label, "memory", (permission,), self._facts({}), off, on, must=False)
                self._memory = memory
        return self._memory

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> PhysicalMemory:
        """The RAM's blocks, whose file descriptors another process may be given. Raises Denied."""
        machine = self._machine
        self._grant(machine.label, "memory", ("share",), self._facts({}), revoke, restore)
        return machine.memory

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        """See :meth:`cardcage.host.Host.share`; asks for ``backend open``."""
        self.ask("backend", key, ("open",))
        return self._machine.host.share(key, make)

    # interrupts

    def irq(self, gsi: int | None = None, /) -> IrqLine:
        """A source of line *gsi* (0 to 23), by default of the ``irq`` key's."""
        machine = self._machine
        gsi = self.config.irq if gsi is None else gsi
        if gsi is None:
            raise self.config.place.error(f'device "{self.id}" needs an interrupt: give it the key irq')
        if not 0 <= gsi < len(machine.lines):
            raise self.config.place.error(
                f'device "{self.id}": interrupt {gsi}: expected 0 to {len(machine.lines) - 1}'
            )
        source = machine.lines[gsi].source()
        self.irqs.append(gsi)
        if not machine.mediator.checkers:
            return source
        line, facts = GrantedLine(source), self._facts({"gsi": gsi})
        own = gsi == self.config.irq  # the operator gave it this one
        target = (
            self.label
            if own
            else machine.mediator.label(self.label, machine.label, "interrupt", f"gsi{gsi}", ("raise",))
        )
        self._grant(target, "interrupt", ("raise",), facts, line.revoke, line.restore)
        return line

    @property
    def irq_number(self) -> int | None:
        """The ``irq`` key, None where the configuration has none."""
        return self.config.irq

    def msi(self, address: int, data: int, /) -> None:
        """Send a message-signalled interrupt; lost while it is not granted."""
        if self._messages is None:
            self._messages = self._machine.vm.signal_msi
            self._route(lambda: self._send_by(self._lose), lambda: self._send_by(self._machine.vm.signal_msi))
        self._messages(address, data)

    def _send_by(self, messages: Callable[[int, int], None]) -> None:
        self._messages = messages

    def _lose(self, address: int, data: int, /) -> None:
        self.log.warning("security: message refused", address=hex(address))

    def _route(self, revoke: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        grant = self._grant(self._machine.label, "interrupt", ("route",), self._facts({}), revoke, restore, must=False)
        return _nothing if grant is None else partial(self._drop, grant)

    # ranges

    def map_pio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        """Claim one more range of ports."""
        return self._map(self._machine.pio, region, base, device)

    def map_mmio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        """Claim one more range of guest-physical addresses."""
        return self._map(self._machine.mmio, region, base, device)

    def _map(self, bus: Bus, region: Region, base: int | None, device: Any) -> MappedRegion:
        name = f"{self.id}.{region.name}" if region.name else self.id
        mapping = MappedRegion(bus, region, device, name, self._moving)
        if base is not None:
            mapping.move(base)
        self.mappings.append(mapping)
        return mapping

    def _moving(self, mapping: MappedRegion, address: int) -> None:
        machine, bus, size = self._machine, mapping._bus, mapping.region.size
        if machine.mediator.checkers:
            there = (
                one.slot.label
                for one in machine.devices.values()
                for other in one.slot.mappings
                if other._bus is bus and other is not mapping and other.overlaps(address, size)
            )
            permission = "claim" if mapping not in self.mappings else "move"
            facts = self._facts({"bus": bus.name, "address": hex(address), "size": size})
            machine.mediator.check(self.label, next(there, machine.label), "bus", (permission,), facts)
        if bus is machine.mmio and machine.state == "built":
            # Later the guest may place a BAR over RAM: RAM wins, as on a PC, and nothing is refused.
            for slot in machine.memory.slots:
                if address < slot.address + slot.size and slot.address < address + size:
                    raise ConfigError(
                        f"{mapping.name}: memory {address:#x}-{address + size - 1:#x} overlaps RAM at "
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
        key, here = key_of(self.config.options, spec), self.config.place
        return self.open_at(kind, spec, here.below(key) if key else here)

    def open_at(self, kind: str, spec: Any, place: Place) -> Any:
        """The same for a *spec* that stands at *place* of the configuration."""
        name, rest = self._choose(kind, spec, place)
        outer, self._gate = self._gate, GrantedBackend(kind) if self._machine.mediator.checkers else None
        try:
            self.ask("backend", f"{kind}:{name}", ("open",))
            opened = self._make(kind, name, rest, place)
            if self._gate is not None:
                opened = self._gate.before(opened)
        finally:
            self._gate = outer
        self._opened.append(opened)
        return opened

    def _make(self, kind: str, name: str, rest: dict[str, Any] | str, place: Place) -> Any:
        machine = self._machine
        if kind == "char" and name == "console":
            self.has_console = True
            return machine.console.claim(self.id)
        offer = machine.host.registry.get("backend", f"{kind}:{name}", file=place.file, key=place.key)
        options = machine.host.options(offer, rest, file=place.file, key=place.key)
        factory, who = offer.load(), f'{kind} back end "{name}" of device "{self.id}"'
        card = f"{who} (card {offer.card}, {offer.distribution})"
        try:
            made = factory(self, options) if options is not None else factory(self)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
            raise place.error(f"{who}: {what}") from error
        except CardcageError:
            raise
        except Exception as error:  # a stranger's code: whatever it raises is the card's fault, and named so
            raise CardError(f"{card}: {in_words(error)}") from error
        check_backend(kind, made, card)
        return made

    def _choose(self, kind: str, spec: Any, place: Place) -> tuple[str, dict[str, Any] | str]:
        """The back end's name and what is for it; the default one of its kind takes what names none."""
        registry = self._machine.host.registry
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
        self._machine.events.add_reader(fd, callback)

    def remove_reader(self, fd: int, /) -> None:
        self._readers.discard(fd)
        self._machine.events.remove_reader(fd)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Run *callback* on the loop thread under the machine's lock. Thread-safe."""
        self._machine.events.call_soon(callback)

    # announcements

    def balloon(self, balloon: MemoryBalloon, /) -> None:
        """The device is the machine's memory balloon, for its policies. Raises ConfigError when there is one."""
        if self._machine.balloon is not None:
            raise self.config.place.error(f'device "{self.id}": the machine has a memory balloon already')
        self._machine.balloon = self._balloon = balloon

    def announce(self, resource: Resource, /) -> None:
        """State what the device claims, for ACPI and e820."""
        self.resources.append(resource)

    def close(self) -> None:
        """Take the device's ranges, readers and back ends away, all of them. Under the machine's lock.

        Raises what the last back end to fail at it raised.
        """
        if self._balloon is not None:
            self._machine.balloon = self._balloon = None
        for mapping in self.mappings:
            mapping.move(None)
        for fd in list(self._readers):
            self.remove_reader(fd)
        with ExitStack() as end:
            while self._grants:
                end.callback(self._grants.popitem()[0].drop)
            while self._opened:
                end.callback(self._opened.pop().close)


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

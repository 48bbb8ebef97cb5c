"""The parts of a :class:`~cardcage_testing.TestSlot`, each with what a test wants to look at or bring."""

from __future__ import annotations

import os
import select
from collections import deque
from contextlib import suppress
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any

from attrs import define, field
from cardcage._machine.bus import Bus
from cardcage._machine.ranges import MappedRegion
from cardcage.device import Pio, Region, Resource
from cardcage.errors import ConfigError, Denied
from cardcage.interrupts import IrqSource, Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.memory import PhysicalMemory, RamRange, SharedRange

__all__ = ["TestBoard", "TestChar", "TestHost", "TestInterrupts", "TestLog", "TestLoop", "TestPower", "TestRanges"]


class TestChar:
    """A char back end: ``output`` is what the guest wrote, :meth:`type` what it receives."""

    __test__ = False

    def __init__(self) -> None:
        self.output = bytearray()
        self.received: Callable[[bytes], None] | None = None
        self.closed = False

    def start(self, received: Callable[[bytes], None], /) -> None:
        self.received = received

    def write(self, data: bytes, /) -> None:
        self.output += data

    def type(self, data: bytes) -> None:
        """Bytes for the guest."""
        if self.received is not None:
            self.received(data)

    def close(self) -> None:
        self.closed = True


@define
class TestLog:
    """A log that keeps its ``entries``: (level, event, values)."""

    __test__ = False

    entries: list[tuple[str, str, dict[str, Any]]] = field(factory=list)

    def __getattr__(self, level: str) -> Any:
        if level not in ("debug", "info", "warning", "error"):
            raise AttributeError(level)
        return lambda event, **values: self.entries.append((level, event, values))

    def bind(self, **_: Any) -> TestLog:
        return self


class TestPower:
    """Keeps ``requests``: ``("reset", why)``, ``("off",)``, ``("panic", message)``, ``("exit", code)`` ...."""

    __test__ = False

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []

    def reset(self, why: str = "", /) -> None:
        self.requests.append(("reset", why))

    def off(self) -> None:
        self.requests.append(("off",))

    def panic(self, message: str, /, *, soon: bool = False) -> None:
        self.requests.append(("panic soon" if soon else "panic", message))

    def exit(self, code: int, /) -> None:
        self.requests.append(("exit", code))

    def stop(self, why: str, /) -> None:
        self.requests.append(("stop", why))

    def pause(self, why: str, /) -> None:
        self.requests.append(("pause", why))

    def resume(self) -> None:
        self.requests.append(("resume",))


class NoVm:
    """An accelerator's VM without any opt-in ability."""

    capabilities: frozenset[str] = frozenset()


class TestInterrupts:
    """Lines whose changes are kept in ``levels`` (by GSI), and ``messages`` (MSIs: address, data)."""

    __test__ = False

    def __init__(self, id: str, number: int | None, beside: TestInterrupts | None = None) -> None:
        self._id = id
        self.number, self.irqchip = number, "split"
        self.vm: Any = NoVm()
        self.messages: list[tuple[int, int]] = [] if beside is None else beside.messages
        self.levels: dict[int, list[bool]] = {} if beside is None else beside.levels
        self.controllers: list[Callable[[int, bool], None]] = []
        self.lines: list[Line] = [Line(self._changed(gsi)) for gsi in range(24)] if beside is None else beside.lines

    def _changed(self, gsi: int) -> Callable[[bool], None]:
        def changed(level: bool) -> None:
            self.levels.setdefault(gsi, []).append(level)
            for controller in self.controllers:
                controller(gsi, level)

        return changed

    def line(self, gsi: int | None = None, /) -> IrqSource:
        number = self.number if gsi is None else gsi
        if number is None:
            raise ConfigError(f'device "{self._id}" needs an interrupt: give it the key irq')
        return self.lines[number].source()

    def msi(self, address: int, data: int, /) -> None:
        self.messages.append((address, data))


class TestRanges:
    """Two buses, ``ports`` and ``space``, that a test reads and writes."""

    __test__ = False

    def __init__(self, id: str, beside: TestRanges | None = None) -> None:
        self._id = id
        self.ports: Bus = Bus("pio", 16) if beside is None else beside.ports
        self.space: Bus = Bus("mmio", 52) if beside is None else beside.space
        self.mappings: list[MappedRegion] = []
        self.resources: list[Resource] = []

    def bind(self, device: Any, *regions: Region) -> None:
        """Map *regions* as a machine does before ``plug``: at their default addresses, or at the first free one."""
        for region in regions:
            bus = self.ports if isinstance(region, Pio) else self.space
            free = max((claim.end for claim in bus), default=0)
            self._map(bus, region, region.base if region.base is not None else free, device)

    def _map(self, bus: Bus, region: Region, base: int | None, device: Any) -> MappedRegion:
        name = f"{self._id}.{region.name}" if region.name else self._id
        mapping = MappedRegion(bus, region, device, name, lambda mapping, address: None)
        mapping.move(base)
        self.mappings.append(mapping)
        return mapping

    def pio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        return self._map(self.ports, region, base, device)

    def mmio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        return self._map(self.space, region, base, device)

    def announce(self, resource: Resource, /) -> None:
        self.resources.append(resource)


class TestLoop:
    """The loop thread's work, done by the test inside :meth:`poll` or :meth:`run_soon`, under ``lock``."""

    __test__ = False

    def __init__(self) -> None:
        self.ending = False
        self.lock: Any = RLock()
        self.readers: dict[int, Callable[[], None]] = {}
        self.soon: deque[Callable[[], None]] = deque()
        self._wake = -1  # made by the first poll: most tests need no descriptor
        self._waking = Lock()

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int, /) -> None:
        self.readers.pop(fd, None)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.soon.append(callback)
        with self._waking:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def run_soon(self) -> None:
        """Do what was asked for by ``call_soon``."""
        with self.lock:
            while self.soon:
                self.soon.popleft()()

    def poll(self, timeout: float = 0) -> None:
        """One turn of the loop: wait up to *timeout* seconds for something, then run what is due."""
        if self._wake < 0:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        watched = select.poll()
        for fd in (self._wake, *self.readers):
            watched.register(fd, select.POLLIN)
        ready = [fd for fd, _ in watched.poll(0 if self.soon else timeout * 1000)]
        with self.lock:
            if self._wake in ready:
                os.eventfd_read(self._wake)
            for fd in ready:
                if fd in self.readers:
                    self.readers[fd]()
            self.run_soon()

    def close(self) -> None:
        with self._waking:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)


class TestHost:
    """Back ends that the test brings, and a security policy that it changes.

    Attributes:
        opened: back ends by spec, or by kind; ``char`` ones are made as needed.
        asked: (class, name, permissions) of each question. denied: names that are refused.
        shared, provided: by key and name.
    """

    __test__ = False

    def __init__(self, id: str, memory: PhysicalMemory, lock: Any) -> None:
        self._id, self._memory, self._lock = id, memory, lock
        self.opened: dict[str, Any] = {}
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []
        self.denied: set[str] = set()
        self.shared: dict[str, Any] = {}
        self.provided: dict[str, Any] = {}
        self._granted: dict[object, tuple[str, tuple[str, ...], Callable[[], None], Callable[[], None]]] = {}

    def open(self, kind: str, spec: Any, /, *, instead: Any = None, fits: Callable[[Any], object] | None = None) -> Any:
        """The object in ``opened``; a :class:`TestChar` is made for a char back end that is not there."""
        found = self._found(kind, str(spec))
        if fits is not None:
            fits(found)
        if instead is not None:
            instead.close()
        return found

    def _found(self, kind: str, spec: str) -> Any:
        for key in (spec, kind):
            with suppress(KeyError):  # a table of the test's may make what it lacks
                return self.opened[key]
        if kind == "char":
            return self.opened.setdefault(spec, TestChar())
        raise ConfigError(f"the test gave no {kind} back end {spec!r}")

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
        """Allowed, until :meth:`change` says otherwise, or unless *name* is in ``denied``."""
        self.asked.append((tclass, name, permissions))
        if name in self.denied:
            raise Denied(f"{self._id} may not {' '.join(permissions)} {tclass} {name}")
        key = object()
        if revoke is not None:
            self._granted[key] = tclass, permissions, revoke, restore or (lambda: None)
        return lambda: self._granted.pop(key, None) and None

    def change(self, tclass: str, permission: str, *, allowed: bool) -> None:
        """Policy changed: revoke what was granted of this class and permission, or restore it."""
        with self._lock:
            for name, permissions, revoke, restore in list(self._granted.values()):
                if name == tclass and permission in permissions:
                    (restore if allowed else revoke)()

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> list[SharedRange]:
        self.ask("memory", "memory", ("share",), revoke, restore)
        return self._memory.shared()

    def provide(self, name: str, service: Any, /) -> None:
        self.provided[name] = service


class TestBoard:
    """A board for platform cards: ``devices`` that the test adds, and what controllers did."""

    __test__ = False

    def __init__(self, interrupts: TestInterrupts, memory: PhysicalMemory) -> None:
        self.devices: dict[str, Any] = {}
        self.lines, self.memory = interrupts.lines, memory
        self.controllers: Any = self
        self._joined = interrupts.controllers
        self.listeners: list[Callable[[int], None]] = []
        self.acknowledge: Callable[[], int | None] | None = None
        self.extint: list[bool] = []

    def add_controller(self, set_irq: Callable[[int, bool], None], /) -> None:
        self._joined.append(set_irq)

    def set_extint_source(self, acknowledge: Callable[[], int | None], /) -> None:
        self.acknowledge = acknowledge

    def set_extint(self, level: bool, /) -> None:
        self.extint.append(level)

    def add_eoi_listener(self, listener: Callable[[int], None], /) -> None:
        self.listeners.append(listener)

    def change_memory(self, add: tuple[RamRange, ...] = (), remove: tuple[RamRange, ...] = ()) -> None:
        self.memory.change(add, remove)

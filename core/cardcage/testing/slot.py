"""A slot without a machine, for tests of one device: memory, interrupts, time and back ends one can look at."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Any

from attrs import define, field

from cardcage.bus import Bus
from cardcage.device import Pio, Region, Resource
from cardcage.errors import ConfigError
from cardcage.interrupts import IrqSource, Line
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.slot import MappedRegion

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.policy import MemoryBalloon

__all__ = ["TestChar", "TestClock", "TestSlot"]


class TestClock:
    """Time that moves when the test says so."""

    __test__ = False

    def __init__(self) -> None:
        self._now = 0
        self._order = itertools.count()
        self._heap: list[tuple[int, int, TestTimer]] = []

    def now(self) -> int:
        return self._now

    def timer(self, callback: Callable[[], None], /) -> TestTimer:
        return TestTimer(self, callback)

    def advance(self, nanoseconds: int) -> None:
        """Let time pass; timers fire in their order, each at its own moment."""
        end = self._now + nanoseconds
        while self._heap and self._heap[0][0] <= end:
            when, _, timer = heapq.heappop(self._heap)
            if timer.when == when:
                self._now, timer.when = max(self._now, when), None
                timer.callback()
        self._now = end


class TestTimer:
    """A timer of a :class:`TestClock`; ``when`` is None while it is not armed."""

    __test__ = False

    def __init__(self, clock: TestClock, callback: Callable[[], None]) -> None:
        self._clock, self.callback = clock, callback
        self.when: int | None = None

    def arm(self, when: int, /) -> None:
        self.when = when
        heapq.heappush(self._clock._heap, (when, next(self._clock._order), self))

    def cancel(self) -> None:
        self.when = None


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
class _Log:
    entries: list[tuple[str, str, dict[str, Any]]] = field(factory=list)

    def __getattr__(self, level: str) -> Any:
        if level not in ("debug", "info", "warning", "error"):
            raise AttributeError(level)
        return lambda event, **values: self.entries.append((level, event, values))

    def bind(self, **_: Any) -> _Log:
        return self


class TestSlot:
    """Satisfies :class:`~cardcage.device.Slot` in memory.

    Args:
        memory: bytes of RAM at address 0, whole pages. id: the device's id. irq: what ``irq()`` without a number gives.

    Look at ``requests`` (``("reset", why)``, ``("poweroff",)``, ...), ``messages`` (MSIs), ``lines`` (by GSI),
    ``log.entries``, ``resources``, ``asked`` (of security), ``opened`` (back ends by spec; ``char`` ones are made as
    needed) and reach regions by ``pio`` and ``mmio``.
    """

    __test__ = False  # its name must not make pytest collect it

    def __init__(self, *, memory: int = 1 << 20, id: str = "device", irq: int | None = 5) -> None:
        self.id, self.irq_number, self.irqchip = id, irq, "split"
        self.memory = PhysicalMemory()
        self.memory.add(RamRange(0, memory, RamBlock(memory)))
        self.written: list[tuple[int, int]] = []
        self.memory.on_written = lambda address, size: self.written.append((address, size))
        self.clock, self.log = TestClock(), _Log()
        self.pio, self.mmio = Bus("pio", 16), Bus("mmio", 52)
        self.mappings: list[MappedRegion] = []
        self.resources: list[Resource] = []
        self.requests: list[tuple[Any, ...]] = []
        self.messages: list[tuple[int, int]] = []
        self.levels: dict[int, list[bool]] = {}
        self.lines = [Line(self._changed(gsi)) for gsi in range(24)]
        self.opened: dict[str, Any] = {}
        self.readers: dict[int, Callable[[], None]] = {}
        self.soon: list[Callable[[], None]] = []
        self.balloons: list[MemoryBalloon] = []
        self.control = self
        self.vm: Any = self
        self.machine: Any = self
        self.capabilities: frozenset[str] = frozenset()
        self.machine_name, self.label = "machine", id
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []
        self.shared: dict[str, Any] = {}
        self.devices: dict[str, Any] = {}

    def _changed(self, gsi: int) -> Callable[[bool], None]:
        return lambda level: self.levels.setdefault(gsi, []).append(level)

    def bind(self, device: Any, *regions: Region) -> None:
        """Map *regions* as a machine does before ``plug``: at their default addresses, or at the first free one."""
        for region in regions:
            bus = self.pio if isinstance(region, Pio) else self.mmio
            free = max((claim.end for claim in bus), default=0)
            self._map(bus, region, region.base if region.base is not None else free, device)

    def _map(self, bus: Bus, region: Region, base: int | None, device: Any) -> MappedRegion:
        mapping = MappedRegion(bus, region, device, self.id, lambda mapping, address: None)
        mapping.move(base)
        self.mappings.append(mapping)
        return mapping

    def map_pio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        return self._map(self.pio, region, base, device)

    def map_mmio(self, region: Region, base: int | None, device: Any, /) -> MappedRegion:
        return self._map(self.mmio, region, base, device)

    def irq(self, gsi: int | None = None, /) -> IrqSource:
        number = self.irq_number if gsi is None else gsi
        if number is None:
            raise ConfigError(f'device "{self.id}" needs an interrupt: give it the key irq')
        return self.lines[number].source()

    def msi(self, address: int, data: int, /) -> None:
        self.messages.append((address, data))

    def signal_msi(self, address: int, data: int, /) -> None:
        self.messages.append((address, data))

    def open(self, kind: str, spec: Any, /) -> Any:
        """The object in ``opened[str(spec)]``; a :class:`TestChar` is made for a char back end that is not there."""
        if kind == "char":
            return self.opened.setdefault(str(spec), TestChar())
        if str(spec) not in self.opened:
            raise ConfigError(f"the test gave no {kind} back end {spec!r}")
        return self.opened[str(spec)]

    def balloon(self, balloon: MemoryBalloon, /) -> None:
        self.balloons.append(balloon)

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
        """Always allowed; see ``asked``."""
        self.asked.append((tclass, name, permissions))
        return lambda: None

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        """Kept in ``shared``."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> PhysicalMemory:
        return self.memory

    def announce(self, resource: Resource, /) -> None:
        self.resources.append(resource)

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int, /) -> None:
        self.readers.pop(fd, None)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.soon.append(callback)

    def run_soon(self) -> None:
        """Do what was asked for by ``call_soon``."""
        while self.soon:
            self.soon.pop(0)()

    def request_reset(self, why: str = "", /) -> None:
        self.requests.append(("reset", why))

    def request_poweroff(self) -> None:
        self.requests.append(("poweroff",))

    def request_panic(self, message: str, /) -> None:
        self.requests.append(("panic", message))

    def request_debug_exit(self, code: int, /) -> None:
        self.requests.append(("debug-exit", code))

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()

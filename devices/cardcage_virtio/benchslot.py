"""The slot that :class:`cardcage_virtio.testing.Bench` gives a device, with a clock and a loop that the test moves."""

from __future__ import annotations

import os
import select
from collections import deque
from threading import RLock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from attrs import define, field
from cardcage.errors import Denied
from cardcage.interrupts import Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Region
    from cardcage.interrupts import IrqLine
    from cardcage.policy import MemoryBalloon

__all__ = ["BenchClock", "BenchMapping", "BenchSlot", "BenchTimer"]


class BenchClock:
    """A clock that the test moves: ``advance`` fires the timers that come due."""

    def __init__(self) -> None:
        self.time = 0
        self._timers: list[BenchTimer] = []

    def now(self) -> int:
        return self.time

    def timer(self, callback: Callable[[], None], /) -> BenchTimer:
        timer = BenchTimer(callback)
        self._timers.append(timer)
        return timer

    def advance(self, nanoseconds: int) -> None:
        self.time += nanoseconds
        for timer in self._timers:
            if timer.when is not None and timer.when <= self.time:
                timer.when = None
                timer.callback()


@define(eq=False)
class BenchTimer:
    """One alarm of a :class:`BenchClock`."""

    callback: Callable[[], None]
    when: int | None = None

    def arm(self, when: int, /) -> None:
        self.when = when

    def cancel(self) -> None:
        self.when = None


@define(eq=False)
class BenchMapping:
    """A region that answers wherever it is told."""

    device: Any
    region: Region
    address: int | None = None

    def move(self, address: int | None, /) -> None:
        self.address = address


@define(eq=False)
class BenchSlot:
    """A slot for one device: logs and messages go to lists, back ends are those that the test put in ``backends``.

    What would come on the machine's loop thread runs inside :meth:`poll`.
    """

    memory: Any
    id: str = "device"
    backends: dict[str, Any] = field(factory=dict)
    vm: Any = field(factory=lambda: SimpleNamespace(capabilities=frozenset()))
    machine: Any = None
    irqchip: str = "split"
    irq_number: int | None = None
    machine_name: str = ""
    label: str = "device"
    mappings: Any = field(factory=list)
    clock: Any = field(factory=BenchClock)
    control: Any = None
    logged: list[tuple[str, dict[str, Any]]] = field(factory=list)
    messages: list[tuple[int, int]] = field(factory=list)
    line: Line = field(factory=lambda: Line(lambda level: None))
    lock: Any = field(factory=RLock)
    log: Any = None
    balloons: list[MemoryBalloon] = field(factory=list)
    denied: set[str] = field(factory=set)
    _granted: dict[object, tuple[str, tuple[str, ...], Callable[[], None], Callable[[], None]]] = field(factory=dict)
    _calls: deque[Callable[[], None]] = field(factory=deque)
    _readers: dict[int, Callable[[], None]] = field(factory=dict)
    _wake: tuple[int, int] = field(factory=lambda: os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))

    def __attrs_post_init__(self) -> None:
        def record(event: str, **values: Any) -> None:
            self.logged.append((event, values))

        self.log = SimpleNamespace(debug=record, info=record, warning=record, error=record)

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
        if name in self.denied:
            raise Denied(f"{self.id} may not {' '.join(permissions)} {tclass} {name}")
        key = object()
        if revoke is not None:
            self._granted[key] = tclass, permissions, revoke, restore or (lambda: None)
        return lambda: self._granted.pop(key, None) and None

    def change(self, tclass: str, permission: str, *, allowed: bool) -> None:
        """Policy changed: revoke what was granted of this class and permission, or restore it."""
        with self.lock:
            for name, permissions, revoke, restore in list(self._granted.values()):
                if name == tclass and permission in permissions:
                    (restore if allowed else revoke)()

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        return make()

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> Any:
        self.ask("memory", "memory", ("share",), revoke, restore)
        return self.memory

    def open(self, kind: str, spec: Any, /) -> Any:
        return self.backends[kind]

    def balloon(self, balloon: MemoryBalloon, /) -> None:
        self.balloons.append(balloon)

    def irq(self, gsi: int | None = None, /) -> IrqLine:
        return self.line.source()

    def map_pio(self, region: Region, base: int | None, device: Any, /) -> Any:
        return self.map_mmio(region, base, device)

    def map_mmio(self, region: Region, base: int | None, device: Any, /) -> Any:
        mapping = BenchMapping(device, region, base)
        self.mappings.append(mapping)
        return mapping

    def msi(self, address: int, data: int, /) -> None:
        self.messages.append((address, data))

    def announce(self, resource: Any, /) -> None: ...

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        self._readers[fd] = callback

    def remove_reader(self, fd: int, /) -> None:
        self._readers.pop(fd, None)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self._calls.append(callback)
        os.write(self._wake[1], b"x")

    def poll(self, timeout: float = 0) -> None:
        """One turn of the loop: wait up to *timeout* seconds for something, then run what is due."""
        watched = select.poll()
        for fd in (self._wake[0], *self._readers):
            watched.register(fd, select.POLLIN)
        ready = [fd for fd, _ in watched.poll(timeout * 1000)]
        with self.lock:
            if self._wake[0] in ready:
                os.read(self._wake[0], 65536)
            for fd in ready:
                if fd in self._readers:
                    self._readers[fd]()
            while self._calls:
                self._calls.popleft()()

    def close(self) -> None:
        for fd in self._wake:
            os.close(fd)

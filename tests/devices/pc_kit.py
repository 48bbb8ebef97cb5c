"""What the tests of cardcage_pc plug a device into: a slot whose time, lines and back ends the test holds."""

from __future__ import annotations

import heapq
import itertools
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cardcage.interrupts import Line
from cardcage.memory import PhysicalMemory, RamBlock, RamRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Resource

T = TypeVar("T")
SECOND = 1_000_000_000


class HandTimer:
    """A timer on a :class:`HandClock`."""

    def __init__(self, clock: HandClock, callback: Callable[[], None]) -> None:
        self._clock, self.callback, self.when = clock, callback, None

    when: int | None

    def arm(self, when: int, /) -> None:
        self.when = when
        heapq.heappush(self._clock.heap, (when, next(self._clock.order), self))

    def cancel(self) -> None:
        self.when = None


class HandClock:
    """Time moves when the test says so; timers fire in their order, at their exact times."""

    def __init__(self) -> None:
        self.time, self.heap, self.order = 0, [], itertools.count()

    heap: list[tuple[int, int, HandTimer]]

    def now(self) -> int:
        return self.time

    def timer(self, callback: Callable[[], None], /) -> HandTimer:
        return HandTimer(self, callback)

    def advance(self, nanoseconds: int) -> None:
        end = self.time + nanoseconds
        while self.heap and self.heap[0][0] <= end:
            when, _, timer = heapq.heappop(self.heap)
            if timer.when == when:
                self.time, timer.when = max(when, self.time), None
                timer.callback()
        self.time = end


class Wire:
    """The back end's end of a cable."""

    def __init__(self) -> None:
        self.sent, self.received = bytearray(), None

    received: Callable[[bytes], None] | None

    def start(self, received: Callable[[bytes], None], /) -> None:
        self.received = received

    def write(self, data: bytes, /) -> None:
        self.sent += data

    def close(self) -> None: ...


class Log:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **keys: self.entries.append((level, event, keys))


class Control:
    """Keeps what was requested."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.requests.append((name.removeprefix("request_"), *arguments))


class KitMapping:
    def __init__(self, region: Any, address: int | None) -> None:
        self.region, self.address = region, address

    def move(self, address: int | None, /) -> None:
        self.address = address


class Kit:
    """Slot and machine in one. ``edges[gsi]`` counts rising edges, ``level(gsi)`` is the line's level now."""

    id, irqchip, irq_number = "dut", "split", None

    def __init__(self, *bases: int, ram: int = 1 << 20) -> None:
        self.clock, self.log, self.control, self.wire = HandClock(), Log(), Control(), Wire()
        self.mappings = [KitMapping(None, base) for base in bases]
        self.edges = [0] * 24
        self.lines = [Line(partial(self._changed, gsi)) for gsi in range(24)]
        self.controllers: list[Callable[[int, bool], None]] = []
        self.eoi_listeners: list[Callable[[int], None]] = []
        self.extint = False
        self.acknowledge: Callable[[], int | None] | None = None
        self.messages: list[tuple[int, int]] = []
        self.resources: list[Resource] = []
        self.memory = PhysicalMemory()
        self.memory.add(RamRange(0, ram, RamBlock(ram)))
        self.machine = self.vm = self
        self.devices: dict[str, Any] = {}

    def _changed(self, gsi: int, level: bool) -> None:
        self.edges[gsi] += level
        for controller in self.controllers:
            controller(gsi, level)

    def plugged(self, device: T, name: str = "") -> T:
        """Plug *device* in and return it."""
        self.devices[name or str(len(self.devices))] = SimpleNamespace(device=device, slot=self, type=name)
        cast(Any, device).plug(self)
        return device

    def level(self, gsi: int) -> bool:
        return self.lines[gsi].level

    # the slot's side

    def irq(self, gsi: int | None = None, /) -> Any:
        assert gsi is not None
        return self.lines[gsi].source()

    def open(self, kind: str, spec: Any, /) -> Wire:
        return self.wire

    def announce(self, resource: Resource, /) -> None:
        self.resources.append(resource)

    def msi(self, address: int, data: int, /) -> None:
        self.messages.append((address, data))

    def map_pio(self, region: Any, base: int | None, device: Any, /) -> KitMapping:
        self.mappings.append(KitMapping(region, base))
        return self.mappings[-1]

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

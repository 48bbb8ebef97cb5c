"""A slot without a machine, for tests of one device: memory, interrupts, time and back ends to look at."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Any

from cardcage.memory import PhysicalMemory, RamBlock, RamRange

from cardcage_testing.parts import (
    TestBoard,
    TestChar,
    TestHost,
    TestInterrupts,
    TestLog,
    TestLoop,
    TestPower,
    TestRanges,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Region

__all__ = ["TestChar", "TestClock", "TestLog", "TestSlot"]


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

    @property
    def next(self) -> int | None:
        """When the next timer fires, ``None`` when none is armed."""
        while self._heap and self._heap[0][2].when != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def skip(self, now: int) -> None:
        """Let it be *now*, unless it is later already; what fires until then does so at the next :meth:`advance`."""
        self._now = max(self._now, now)

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


class TestSlot:
    """Satisfies :class:`~cardcage.device.Slot`, made of the same parts (:mod:`cardcage_testing.parts`).

    Args:
        memory: bytes of RAM at address 0 (whole pages), or the address space itself. id: the device's id.
        irq: the number of ``interrupts.line()`` without one.
        beside: another slot of the same machine: its memory, buses, lines and board are this one's too.

    Look at ``power.requests``, ``interrupts.messages`` and ``.levels``, ``log.entries`` and ``host.asked``;
    bring back ends in ``host.opened``; reach the device's regions by ``ranges.ports`` and ``ranges.space``.
    """

    __test__ = False  # its name must not make pytest collect it

    def __init__(
        self,
        *,
        memory: int | PhysicalMemory = 1 << 20,
        id: str = "device",
        irq: int | None = 5,
        beside: TestSlot | None = None,
    ) -> None:
        self.id = self.label = id
        self.machine = "machine"
        if beside is not None:
            memory = beside.memory
        self._owned = isinstance(memory, int)
        self.memory: PhysicalMemory = ram_of(memory) if isinstance(memory, int) else memory
        self.written: list[tuple[int, int]] = []
        if self._owned:
            self.memory.on_written = lambda address, size: self.written.append((address, size))
        self.clock, self.log = TestClock(), TestLog()
        self.power, self.loop = TestPower(), TestLoop()
        self.interrupts: TestInterrupts = TestInterrupts(id, irq, None if beside is None else beside.interrupts)
        self.ranges: TestRanges = TestRanges(id, None if beside is None else beside.ranges)
        self.host = TestHost(id, self.memory, self.loop.lock)
        self.board: Any = TestBoard(self.interrupts, self.memory) if beside is None else beside.board

    def bind(self, device: Any, *regions: Region) -> None:
        """Map *regions* as a machine does before ``plug``: at their default addresses, or at the first free one."""
        self.ranges.bind(device, *regions)

    def close(self) -> None:
        """Give the memory back."""
        self.loop.close()
        if self._owned:
            self.memory.close()


def ram_of(size: int) -> PhysicalMemory:
    """*size* bytes of RAM at address 0."""
    memory = PhysicalMemory()
    memory.add(RamRange(0, size, RamBlock(size)))
    return memory

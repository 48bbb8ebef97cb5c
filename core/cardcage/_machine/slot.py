"""The slot: what one plugged-in device holds of its machine (:class:`~cardcage.device.Slot`, the concrete one)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from cardcage._machine.eventloop import Owned
from cardcage._machine.granted import MemoryGate

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._machine.asking import Asking
    from cardcage._machine.eventloop import EventLoop, MachineClock, MachineTimer
    from cardcage._machine.messages import DeviceInterrupts
    from cardcage._machine.opening import DeviceHost
    from cardcage._machine.ranges import DeviceRanges
    from cardcage.device import Board, Power
    from cardcage.memory import GuestMemory, PhysicalMemory


class DeviceClock:
    """Guest time as one device uses it; satisfies :class:`~cardcage.clock.Clock`."""

    __slots__ = ("_clock", "_device", "_timers", "now")

    def __init__(self, clock: MachineClock, device: str) -> None:
        self._clock, self._device, self.now = clock, device, clock.now
        self._timers: WeakSet[MachineTimer] = WeakSet()

    def timer(self, callback: Callable[[], None], /) -> MachineTimer:
        self._timers.add(timer := self._clock.timer(callback, self._device))
        return timer

    def close(self) -> None:
        """No timer fires any more."""
        for timer in self._timers:
            timer.callback = lambda: None


class _Soon(Owned):
    """A callback of the device of *loop*, unless that is taken out meanwhile."""

    __slots__ = ("loop",)
    loop: DeviceLoop

    def __call__(self) -> None:
        if not self.loop._closed:
            self.callback()


class DeviceLoop:
    """The machine's loop thread as one device uses it; satisfies :class:`~cardcage.device.Loop`."""

    def __init__(self, events: EventLoop, device: str, ended: Callable[[], bool]) -> None:
        self._events, self._device, self._ended = events, device, ended
        self._readers: set[int] = set()
        self._closed = False

    @property
    def ending(self) -> bool:
        """True once the machine has its end."""
        return self._ended()

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        """Call *callback* on the loop thread, under the machine's lock, whenever *fd* is readable."""
        self._readers.add(fd)
        self._events.add_reader(fd, callback, self._device)

    def remove_reader(self, fd: int, /) -> None:
        """No more calls for *fd*."""
        self._readers.discard(fd)
        self._events.remove_reader(fd)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Run *callback* on the loop thread under the machine's lock. Thread-safe; nothing once closed."""
        act = _Soon(callback, self._device)
        act.loop = self
        self._events.call_soon(act)

    def close(self) -> None:
        """No more calls, of what was asked for already either."""
        self._closed = True
        for fd in list(self._readers):
            self.remove_reader(fd)


class DeviceSlot:
    """Made by the machine for each device, out of its parts. See :class:`~cardcage.device.Slot`."""

    host: DeviceHost  # set by who makes the slot: back ends are given the slot itself

    def __init__(
        self,
        asking: Asking,
        memory: PhysicalMemory,
        clock: DeviceClock,
        log: Any,
        power: Power,
        interrupts: DeviceInterrupts,
        ranges: DeviceRanges,
        loop: DeviceLoop,
        board: Board,
    ) -> None:
        self._asking, self._physical, self._board = asking, memory, board
        self.id, self.label, self.machine = asking.device, asking.label, asking.machine
        self.clock, self.log, self.power = clock, log, power
        self.interrupts, self.ranges, self.loop = interrupts, ranges, loop
        self._memory: GuestMemory | None = None

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM, as far as it is granted."""
        if self._memory is None:
            asking = self._asking
            if not asking.active:
                self._memory = self._physical
            else:
                gate = MemoryGate(self._physical, self.log)
                for permission, which in (("dma_read", "reads"), ("dma_write", "writes")):
                    act = asking.act(asking.machine_label, "memory", (permission,))
                    asking.grant(act, gate.switch(which, False), gate.switch(which, True), must=False)
                self._memory = gate.memory
        return self._memory

    @property
    def board(self) -> Board:
        """The board, for platform cards: asks for ``management reach``."""
        self._asking.check(self._asking.machine_label, "management", ("reach",))
        return self._board

    def close(self) -> None:
        """Take the device's ranges, readers, grants and back ends away, all of them. Under the machine's lock.

        Raises what the last back end to fail at it raised.
        """
        self.ranges.close()
        self.clock.close()
        self.loop.close()
        self.interrupts.vm.close()
        self.host.close()

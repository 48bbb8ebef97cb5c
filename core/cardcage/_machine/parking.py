"""A machine without threads, its time standing still: the part of :class:`cardcage.machine.Machine` that does it."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cardcage._machine.life import State
from cardcage._machine.plugged import able
from cardcage.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage._machine.life import Life
    from cardcage._machine.plugged import PluggedDevice
    from cardcage.accelerator import AcceleratedVm


class Parking:
    """A machine without threads, its time standing still."""

    name: str
    accelerator: Any
    vm: AcceleratedVm
    devices: dict[str, PluggedDevice]
    is_parked: bool
    _life: Life
    pause: Callable[[], None]
    resume: Callable[[], None]

    @contextmanager
    def parked(self) -> Iterator[None]:
        """The machine stands still without a thread while the block runs, in which the process may fork.

        What ran goes on then, its clocks, TSC and timers as if no time had passed; in a forked process it stays paused.
        Raises StateError for one that has ended, on its own threads, and where a part cannot be parked.
        """
        life = self._life
        here = "it is stopped, or this is a thread of its own" if life.state is State.STOPPED or life.here else ""
        if why := here or self.why_not_parked():
            raise StateError(f"{self.name} cannot be parked: {why}")
        process = os.getpid()
        if running := life.state is State.RUNNING:
            self.pause()
        try:
            with ExitStack() as end:
                for one in [*able(self.devices, "park"), self.vm]:
                    one.park()
                    end.callback(one.unpark)
                self._end_threads()
                end.callback(self._start_threads)
                yield
        finally:
            if running and life.state is State.PAUSED and os.getpid() == process:
                self.resume()

    def why_not_parked(self) -> str:
        """In one line why :meth:`parked` would refuse now: what the accelerator or a device says; else empty."""
        if "parking" not in self.vm.capabilities:
            return f'the accelerator "{self.accelerator.name}" does not let its clocks stand still'
        for one in self.devices.values():
            if "park" not in one.abilities and "pause" in one.abilities:
                return f"{one.who} works of its own accord, and cannot be parked"
        return next((why for one in [*able(self.devices, "park"), self.vm] if (why := one.may_park())), "")

    def _end_threads(self) -> None:
        """End the machine's own, and hold its locks: a forked process has only the thread that forked."""
        life = self._life
        life.gate.end()
        for thread in life._threads:
            thread.join()
        life.clock.close()
        life.loop.close()
        for lock in self._locks():
            lock.acquire()
        self.is_parked = True

    def _start_threads(self) -> None:
        """Start them anew, with descriptors of their own. Whatever ended the machine meanwhile is carried out now."""
        life = self._life
        self.is_parked = False
        for lock in self._locks():
            lock.release()
        life.loop.start()
        life.clock.start()
        with life._ending:
            if life.outcome is None and life.failure is None:
                life.gate.end(False)
        life._threads = life.steps.threads() if life._threads else []
        for thread in life._threads:
            thread.start()

    def _locks(self) -> tuple[Any, ...]:
        life = self._life
        return life.lock, life._ending, life.loop.waking, life.gate.changed, life.console.changed

"""A VM without threads, whose clocks stand still: see :class:`cardcage.accelerator.Parkable`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage_tcg import layout as L

if TYPE_CHECKING:
    from cardcage_tcg.clock import Clock
    from cardcage_tcg.cpu.vcpu import TcgVCpu
    from cardcage_tcg.eventfds import EventFds
    from cardcage_tcg.library import Native

__all__ = ["ParksThreads"]


class ParksThreads:
    """The timer thread of a :class:`~cardcage_tcg.vm.TcgVm`, and that of its irqfds."""

    native: Native
    pointer: int
    clock: Clock
    events: EventFds
    cpus: list[TcgVCpu]
    _d: memoryview
    _ticker: threading.Thread | None = None
    _stood_at = 0, 0

    def start_ticker(self) -> None:
        """Start the timer thread."""
        self._ticker = threading.Thread(target=self.native.ticker, args=(self.pointer,), name="tcg-timer", daemon=True)
        self._ticker.start()

    def may_park(self) -> str:
        """Why it cannot be parked now, empty when it can."""
        return "a device's queue is served by another process" if self.events.has_rings else ""

    def park(self) -> None:
        """End the threads; TSC, kvmclock and the APICs' timers stand still from here on."""
        self._stood_at = self.clock.pair()
        if self._ticker is not None:
            self.native.close(self.pointer)
            self._ticker.join()
            self._d[L.VM_CLOSING // 4] = 0
        self.events.park()

    def unpark(self) -> None:
        """Start them anew: the guest's time goes on where it stood."""
        ticks, elapsed = self.clock.skip(self._stood_at)
        for cpu in self.cpus:
            cpu.shift_clock(ticks, elapsed)
        self.events.unpark()
        if self._ticker is not None:
            self.start_ticker()

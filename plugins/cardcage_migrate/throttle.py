"""vCPUs that are held up so that a migration keeps up with what they write."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage.waiting import Event

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["FIRST", "MOST", "STEP", "Throttle"]

FIRST, STEP, MOST = 20, 10, 99
"""Per cent of the time, as QEMU's auto-converge has them."""
PERIOD = 0.02
"""Seconds, in each of which vCPUs run once and are held up once."""


class Throttle:
    """Holds all vCPUs out of guest code for a part of the time, until it is closed. Guest time goes on."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self.percent = machine, 0
        self._over = Event()
        self._thread: threading.Thread | None = None

    def more(self) -> bool:
        """Hold them up more; False where that is all that can be."""
        if self.percent >= MOST:
            return False
        self.percent = min(self.percent + STEP, MOST) if self.percent else FIRST
        if self._thread is None:
            self._thread = threading.Thread(target=self._hold, name=f"{self._machine.name}-throttle")
            self._thread.start()
        return True

    def _hold(self) -> None:
        while not self._over.is_set():
            held = PERIOD * self.percent / 100
            with self._machine.vm.quiesce():
                self._over.wait(held)
            self._over.wait(PERIOD - held)

    def close(self) -> None:
        """Hold nobody up. Idempotent."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

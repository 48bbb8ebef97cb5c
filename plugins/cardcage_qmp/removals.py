"""Devices that guests were asked to let go of: who waits, and what is told when one keeps its device."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from cardcage.errors import EjectTimeout

from cardcage_qmp.errors import QmpError
from cardcage_qmp.session import Session

if TYPE_CHECKING:
    from cardcage.machine import Machine

    from cardcage_qmp.control import Control

__all__ = ["PATIENCE", "Removals", "device_del"]

PATIENCE = 30.0
"""Seconds that a guest has, before peers are told that it has not let go. It may still do so later."""


class Removals:
    """The removals of a machine that are under way, each with a timer."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._timers: dict[str, threading.Timer] = {}

    def begin(self, machine: Machine, id: str) -> None:
        """Ask the guest to let go of device *id*. Raises what :meth:`~cardcage.machine.Machine.remove` does."""
        timer = threading.Timer(PATIENCE, self._late, (id,))
        timer.daemon = True
        with self._lock:
            if id in self._timers:
                raise QmpError(f"Device {id} is already in the process of unplug")
            self._timers[id] = timer
        try:
            machine.remove(id, timeout=0)
        except EjectTimeout:  # it has been asked
            with self._lock:
                if self._timers.get(id) is timer:  # else it was quick
                    timer.start()
        except BaseException:
            self.gone(id)
            raise

    def gone(self, id: str) -> None:
        """Device *id* is gone, or was not asked for."""
        with self._lock:
            if (timer := self._timers.pop(id, None)) is not None:
                timer.cancel()

    def _late(self, id: str) -> None:
        with self._lock:
            if self._timers.pop(id, None) is None:
                return
        about: dict[str, Any] = {"device": id, "path": f"/machine/peripheral/{id}"}
        self._control.emit("DEVICE_UNPLUG_GUEST_ERROR", about)

    def close(self) -> None:
        """Nobody is told any more."""
        with self._lock:
            timers = list(self._timers.values())
            self._timers.clear()
        for one in timers:
            one.cancel()


def device_del(session: Session, id: str) -> None:
    """Ask the guest to let go of a device: ``DEVICE_DELETED`` tells when it is gone."""
    name = id.rpartition("/")[2] if id.startswith("/machine/peripheral/") else id
    if name not in session.machine.devices:
        raise QmpError(f"Device '{id:.100}' not found", "DeviceNotFound")
    session.control.removals.begin(session.machine, name)

"""Waiting for room: a machine whose disk is full on the host pauses, and goes on once there is room."""

from __future__ import annotations

import errno
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Power

__all__ = ["NO_ROOM", "PROBE", "Patience"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
EVERY = 1.0
"""Seconds from one attempt to the next."""
PROBE = 1 << 20
"""Bytes of a write that are tried: when so much goes, the guest may go on."""


class Patience:
    """A pause of the machine while the host cannot serve a request.

    Args:
        power: of the device's slot. name: of the thread, for debuggers.
    """

    def __init__(self, power: Power, name: str) -> None:
        self._power, self._name = power, name
        self._lock = Lock()
        self._waits = False
        self._done = Event()
        self._thread: Thread | None = None

    def begin(self, why: str, attempt: Callable[[], object] | None) -> None:
        """Pause the machine, unless it waits already. Any thread.

        Args:
            attempt: tried once a second; the machine goes on once it no longer fails for want of room. ``None`` leaves
                that to the operator. It leaves guest memory alone.
        """
        with self._lock:
            if not self._waits:  # before anything tries: its resume must come after this
                self._waits = True
                self._power.pause(why)
            if attempt is not None and self._thread is None:
                self._done = Event()
                self._thread = Thread(target=self._try, args=(attempt, self._done), name=self._name, daemon=True)
                self._thread.start()

    def _try(self, attempt: Callable[[], object], done: Event) -> None:
        while not done.wait(EVERY):
            try:
                attempt()
            except Exception as error:  # all but want of room is the request's own to meet, on a worker's thread
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    continue
            self._power.resume()
            return

    def end(self) -> bool:
        """No more attempts; True when the machine waited. Not on the thread that tries."""
        with self._lock:
            waited, self._waits = self._waits, False
            thread, self._thread = self._thread, None
            self._done.set()
        if thread is not None:
            thread.join()
        return waited

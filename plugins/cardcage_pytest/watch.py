"""The clock of a test's phases."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Watch"]


class Watch:
    """Calls back when a phase takes too long, on a thread of its own; booting, which has its own limit, aside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._late: Callable[[], None] = lambda: None
        self._left: float | None = None
        self._since = 0.0
        self._expired = threading.Event()

    def begin(self, seconds: float | None, late: Callable[[], None]) -> threading.Event:
        """A phase begins. Returns what is set before *late* is called."""
        self.end()
        self._expired, self._late, self._left = threading.Event(), late, seconds
        self._go()
        return self._expired

    def end(self) -> None:
        """The phase is over: nothing is called any more, and a call that is under way has returned."""
        self._halt()
        self._left = None

    def _go(self) -> None:
        if self._left is not None:
            self._since = time.monotonic()
            expired, late = self._expired, self._late
            self._timer = threading.Timer(max(self._left, 0), self._over, (expired, late))
            self._timer.daemon = True
            self._timer.start()

    def _over(self, expired: threading.Event, late: Callable[[], None]) -> None:
        expired.set()
        late()

    def _halt(self) -> None:
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()
            if self._left is not None:
                self._left -= time.monotonic() - self._since

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that does not count."""
        self._halt()
        try:
            yield
        finally:
            if not self._expired.is_set():
                self._go()

    def close(self) -> None:
        """The run is over."""
        self.end()

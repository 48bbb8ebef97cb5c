"""Signal handlers of a process, owned in one place."""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from cardcage.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


class Signals:
    """The one owner of signal handlers: who wants one claims it, and the last to let go gets the earlier one back.

    Claims of one signal must name the same handler. Other code may replace a handler meanwhile (pytest's faulthandler
    does): :meth:`verify` puts ours back, and machines call it when they start and resume. Handlers can only be set on
    the main thread (a rule of Python): elsewhere :meth:`claim` raises UsageError.

    Attributes:
        ending: makes what :meth:`held` gives; set by who ends the process by an exception out of a handler.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ending: Callable[[], AbstractContextManager[object]] | None = None
        self._claims: dict[int, tuple[Callable[[int, Any], Any], Any, int]] = {}

    def claim(self, signum: int, handler: Callable[[int, Any], Any]) -> None:
        """Install *handler*, or count one more user of it."""
        with self._lock:
            mine, before, count = self._claims.get(signum, (handler, None, 0))
            if mine is not handler:
                raise UsageError(f"{signal.Signals(signum).name} already has another handler of this host")
            if not count:
                if threading.current_thread() is not threading.main_thread():
                    raise UsageError("signal handlers can only be set on the main thread")
                before = signal.signal(signum, handler)
            self._claims[signum] = handler, before, count + 1

    def release(self, signum: int) -> None:
        """One user less; the earlier handler comes back with the last."""
        with self._lock:
            if signum not in self._claims:
                raise UsageError(f"{signal.Signals(signum).name} was not claimed")
            handler, before, count = self._claims[signum]
            if count > 1:
                self._claims[signum] = handler, before, count - 1
                return
            del self._claims[signum]
            if signal.getsignal(signum) is handler and threading.current_thread() is threading.main_thread():
                signal.signal(signum, before if before is not None else signal.SIG_DFL)

    def held(self) -> AbstractContextManager[object]:
        """A block in which a signal that ends the process waits, because what it takes is known only at its end."""
        return nullcontext() if self.ending is None else self.ending()

    def verify(self) -> None:
        """Put our handlers back where something replaced them. Does nothing off the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        with self._lock:
            for signum, (handler, _, _) in self._claims.items():
                if signal.getsignal(signum) is not handler:
                    signal.signal(signum, handler)

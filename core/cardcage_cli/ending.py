"""SIGTERM, SIGHUP and SIGINT from the first moment on. Imports nothing that takes time: the handlers come first.

A signal ends the command in an orderly way: it raises :exc:`Terminated` or KeyboardInterrupt where the main thread is.
That must not be in the middle of what is only whole at its end (a machine between taking something and knowing how to
give it back), so :meth:`Ending.held` lets it wait there, though not for ever. Before anything was taken there is
nothing to put in order, and the process ends on the spot: an exception in the middle of an import may be lost.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # without the enums of the module signal: they take 3 ms
import os
import sys
from math import inf
from time import monotonic

TYPE_CHECKING = False  # typing is slow to import, and until the handlers are there a signal is rude

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

__all__ = ["GRACE", "PATIENCE", "SIGNALS", "Ending", "Terminated"]

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PATIENCE = 2.0
"""Seconds that a signal waits for a block that is held: the lock of a file may belong to a process that is stopped."""
SOON = 0.05
"""Seconds until a signal that was lost comes again."""
GRACE = 5.0
"""Seconds after a signal in which another one changes nothing: timeout(1) sends two, and things are being put back."""


class Terminated(BaseException):
    """A signal that asks the process to end."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(name_of(signum))


def name_of(signum: int) -> str:
    """``SIGTERM`` for 15."""
    return next(name for name in ("SIGTERM", "SIGHUP", "SIGINT") if getattr(signal, name) == signum)


class Ending:
    """The handlers of one command, while it is entered. On another thread than the main one, it does nothing.

    Args:
        alone: the process is there for this command only: it may end on the spot, and the signals end it afterwards.
    """

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.taking = False
        """True from when something may have been taken that is to be given back."""
        self._depth = self._waiting = 0
        self._quiet = self._since = 0.0
        self._losing = False
        self._before: dict[int, Any] = {}
        self._again: Any = None

    def __enter__(self) -> Ending:
        self._hook = sys.unraisablehook
        for one in SIGNALS:
            before = signal.getsignal(one)
            if before == signal.SIG_IGN and one != signal.SIGTERM:
                continue  # nohup, or a shell's background job
            try:
                signal.signal(one, self.arrived)
            except ValueError:  # not the main thread
                return self
            self._before[one] = before
        sys.unraisablehook = self._lost
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        self._cancel()
        for one, before in self._before.items():
            signal.signal(one, signal.SIG_DFL if self.alone or before is None else before)

    @property
    def signals(self) -> tuple[int, ...]:
        """Those that are handled."""
        return tuple(self._before)

    def arrived(self, signum: int, _: object) -> None:
        """The handler."""
        if self.alone and not self.taking:
            text = "interrupted" if signum == signal.SIGINT else f"ended by: {name_of(signum)}"
            try:
                os.write(2, f"outcome: {text}\n".encode())
            finally:
                os._exit(128 + signum)
        if self._losing:  # in the hook for what cannot be raised, which cannot raise either
            self._resend(signum, SOON)
        elif self._depth and not self._waiting:
            self._waiting, self._since = signum, monotonic()
            self._resend(signum, PATIENCE)
        elif not self._depth or monotonic() >= self._since + PATIENCE:
            self._raise(signum)

    def over(self) -> None:
        """From now on signals change nothing: all is being given back."""
        self._quiet = inf

    def _raise(self, signum: int) -> None:
        if monotonic() < self._quiet:
            return
        self._waiting, self._quiet = 0, monotonic() + GRACE
        raise KeyboardInterrupt if signum == signal.SIGINT else Terminated(signum)

    def held(self) -> Ending.Held:
        """A block in which a signal waits until its end, for up to :data:`PATIENCE`; on the main thread only."""
        return Ending.Held(self)

    def _release(self, error: BaseException | None) -> None:
        self._depth -= 1
        if not self._depth and self._waiting:
            signum, self._waiting = self._waiting, 0
            self._cancel()
            if error is None:
                self._raise(signum)

    def _lost(self, what: Any) -> None:
        """A signal met the main thread in a callback that can raise nothing, such as a finalizer's: it comes again."""
        if not isinstance(what.exc_value, KeyboardInterrupt | Terminated):
            self._hook(what)
            return
        self._losing = True
        self._quiet = 0.0 if self._quiet < inf else inf
        self._resend(getattr(what.exc_value, "signum", signal.SIGINT), SOON)
        self._losing = False

    def _resend(self, signum: int, delay: float) -> None:
        from threading import Timer, main_thread

        self._cancel()
        self._again = Timer(delay, signal.pthread_kill, (main_thread().ident, signum))
        self._again.daemon = True
        self._again.start()

    def _cancel(self) -> None:
        if self._again is not None:
            self._again.cancel()

    class Held:
        """See :meth:`Ending.held`."""

        def __init__(self, ending: Ending) -> None:
            self._ending = ending

        def __enter__(self) -> None:
            from threading import current_thread, main_thread

            self._here = current_thread() is main_thread()
            if self._here:
                self._ending._depth += 1

        def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> None:
            if self._here:
                self._ending._release(error)

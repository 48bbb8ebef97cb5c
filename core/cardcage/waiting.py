"""Events and conditions for threads whose signal handlers raise, as the main thread's do at Ctrl-C and SIGTERM.

Those of threading enter and leave a lock by methods written in Python. An exception that a handler raises as the one
returns, or as the other begins, leaves the lock locked for good, and whoever would wake the waiter hangs.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from time import monotonic
from typing import Any

__all__ = ["Condition", "Event"]

LOOK = 1.0
"""Seconds after which an event is looked at again: a waiter that was interrupted may have kept it from another."""


class _OfLock:
    """A method of a condition's lock, in C: ``with`` looks both up first, and no handler runs inside of them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, condition: Any, kind: Any = None) -> Any:
        return getattr(condition._lock, self._name)


class Condition(threading.Condition):
    """:class:`threading.Condition`."""

    __enter__: Any = _OfLock("__enter__")
    __exit__: Any = _OfLock("__exit__")


class Event:
    """:class:`threading.Event`, but once it is set it stays so."""

    def __init__(self) -> None:
        self._told, self._gate = False, threading.Lock()
        self._gate.acquire()

    def is_set(self) -> bool:
        """True once it is set."""
        return self._told

    def set(self) -> None:
        """Wake all that wait, and whoever will."""
        self._told = True
        self._open()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; False after *timeout* seconds."""
        until = None if timeout is None else monotonic() + timeout
        while not self._told:
            left = LOOK if until is None else min(until - monotonic(), LOOK)
            if left <= 0:
                break
            if self._gate.acquire(timeout=left):
                self._open()  # for the next one
        return self._told

    def _open(self) -> None:
        with suppress(RuntimeError):  # another has
            self._gate.release()

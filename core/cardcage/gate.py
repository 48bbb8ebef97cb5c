"""The gate between the machine and its vCPU threads: who may enter guest code, and waiting until nobody does."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate"]


class Gate:
    """Opens, closes and ends. vCPU threads pass :meth:`enter` before each run and are counted in and out.

    Args:
        kick: makes all vCPUs come out of guest code soon.
    """

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._changed = threading.Condition()
        self._open = self._ended = False
        self._inside: set[int] = set()
        self._woken = False

    def enter(self, index: int) -> bool:
        """Wait until the gate is open, and go in. False: the thread is to end. Leaves first where it was inside."""
        with self._changed:
            self._leave(index)
            while not self._open and not self._ended:
                self._changed.wait()
            if self._ended:
                return False
            self._inside.add(index)
            return True

    def _leave(self, index: int) -> None:
        if index in self._inside:
            self._inside.discard(index)
            self._changed.notify_all()

    def leave(self, index: int) -> None:
        """The thread goes out for good."""
        with self._changed:
            self._leave(index)

    def open(self) -> None:
        """Let them in."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def close(self, *, wait: bool = True) -> None:
        """Let no one in, get all out, and (with *wait*) wait until they are. Waiting is not for vCPU threads."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._kick()
        if wait:
            with self._changed:
                while self._inside:
                    self._changed.wait()

    def end(self) -> None:
        """All threads that are out, or come out, end."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._kick()

    # waiting in HLT without a local APIC

    def wake(self) -> None:
        """An interrupt is pending: those that wait in :meth:`halt` go on."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def halt(self, pending: Callable[[], bool]) -> None:
        """Wait until *pending* or :meth:`wake`, or until the gate is closed or ended."""
        with self._changed:
            while self._open and not self._ended and not self._woken and not pending():
                self._changed.wait()
            self._woken = False

"""The gate between the machine and its vCPU threads: who may enter guest code, and waiting until nobody does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.waiting import Condition

if TYPE_CHECKING:
    from collections.abc import Callable


class Gate:
    """Opens, closes and ends. vCPU threads pass :meth:`enter` before each run and are counted in and out.

    Args:
        kick: makes all vCPUs come out of guest code soon.
    """

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self.changed = Condition()
        self._open = self._ended = False
        self._inside: set[int] = set()
        self.wakes = 0
        self.halts: dict[int, int] = {}  # of vCPUs whose threads ended in HLT without a local APIC: wakes at that time

    def enter(self, index: int) -> bool:
        """Wait until the gate is open, and go in. False: the thread is to end. Leaves first where it was inside."""
        with self.changed:
            self._leave(index)
            while not self._open and not self._ended:
                self.changed.wait()
            if self._ended:
                return False
            self._inside.add(index)
            return True

    def _leave(self, index: int) -> None:
        if index in self._inside:
            self._inside.discard(index)
            self.changed.notify_all()

    def leave(self, index: int) -> None:
        """The thread goes out for good."""
        with self.changed:
            self._leave(index)

    def open(self) -> None:
        """Let them in."""
        with self.changed:
            self._open = True
            self.changed.notify_all()

    def close(self, *, wait: bool = True) -> None:
        """Let no one in, get all out, and (with *wait*) wait until they are. Waiting is not for vCPU threads."""
        with self.changed:
            if self._open:  # else nobody waits for that any more, and waking those that do not costs as much
                self._open = False
                self.changed.notify_all()
            if self._inside:  # a kick would else be for the next run
                self._kick()
            while wait and self._inside:
                self.changed.wait()

    def end(self, ended: bool = True) -> None:
        """All threads that are out, or come out, end; with False, new ones may come."""
        with self.changed:
            self._ended = ended
            self.changed.notify_all()
        self._kick()

    # waiting in HLT without a local APIC

    def wake(self) -> None:
        """An interrupt is pending, or the processors have new registers: those that wait in :meth:`halt` go on."""
        with self.changed:
            self.wakes += 1
            self.changed.notify_all()

    def halt(self, wakes: int, pending: Callable[[], bool]) -> bool:
        """Wait until *pending*, or a :meth:`wake` after ``gate.wakes`` was *wakes*.

        False when the gate closed meanwhile.
        """
        with self.changed:
            while self.wakes == wakes and not pending():
                if not self._open or self._ended:
                    return False
                self.changed.wait()
            return True

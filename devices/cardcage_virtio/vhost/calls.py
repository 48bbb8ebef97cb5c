"""A thread that turns a back end's call eventfds into interrupts, where the accelerator does not do it by itself.

The machine's loop thread could, but what it does between two events is a good part of a disk's latency.
"""

from __future__ import annotations

import os
import select
from threading import Lock, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallThread"]


class CallThread:
    """Waits for eventfds.

    Args:
        deliver: called with the number that was given with the eventfd; must be thread-safe, and wait for nobody.
        name: of the thread.
    """

    def __init__(self, deliver: Callable[[int], None], name: str) -> None:
        self._deliver, self._name = deliver, name
        self._numbers: dict[int, int] = {}
        self._delivering = Lock()
        self._epoll: select.epoll | None = None
        self._end = -1
        self._thread: Thread | None = None

    def add(self, fd: int, number: int) -> None:
        """Deliver *number* each time *fd* (an eventfd that does not block) is written. Starts the thread."""
        if self._epoll is None:
            self._epoll, self._end = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC)
            self._epoll.register(self._end, select.EPOLLIN)
            self._thread = Thread(target=self._run, args=(self._epoll,), name=self._name, daemon=True)
            self._thread.start()
        self._numbers[fd] = number
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Stop that, at once: nothing of it is delivered any more. After the last, the thread ends."""
        with self._delivering:
            known = self._numbers.pop(fd, None) is not None
        if not known or self._epoll is None:
            return
        self._epoll.unregister(fd)
        if not self._numbers and self._thread is not None:
            os.eventfd_write(self._end, 1)
            self._thread.join()
            self._epoll.close()
            os.close(self._end)
            self._epoll = self._thread = None

    def _run(self, epoll: select.epoll) -> None:
        numbers, deliver = self._numbers, self._deliver
        while True:
            for fd, _ in epoll.poll():
                if fd == self._end:
                    return
                with self._delivering:
                    if fd in numbers and counted(fd):
                        deliver(numbers[fd])


def counted(fd: int) -> bool:
    """Take the count of an eventfd; True if it had counted anything."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True

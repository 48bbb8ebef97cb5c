"""Host programs that call a guest: the socket they connect to, and the line they begin with."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Callers"]

LINE_MAX = 32


class Callers:
    """Who has connected and not yet said which port is wanted.

    Args:
        epoll: what the device waits for.
        room: whether one more may come in, beside so many who wait.
        called: takes a caller's socket and the port.

    Attributes:
        waiting: the callers and what they have said, by descriptor.
    """

    def __init__(
        self, epoll: select.epoll, room: Callable[[int], bool], called: Callable[[socket.socket, int], None]
    ) -> None:
        self._epoll, self._room, self._called = epoll, room, called
        self.waiting: dict[int, tuple[socket.socket, bytearray]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._spare = -1

    def listen(self, path: str) -> None:
        """Let callers in at *path*. Raises OSError when it cannot be."""
        try:
            if _stale(path):
                os.unlink(path)
            self._listener.bind(path)
        except OSError:
            self._listener.close()
            raise
        self._listener.listen(128)
        self._spare = os.dup(self._listener.fileno())
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """The descriptor that is readable when somebody calls."""
        return self._listener.fileno()

    def drop(self) -> None:
        """Hang up on all who wait."""
        for caller, _ in self.waiting.values():
            caller.close()
        self.waiting.clear()

    def close(self) -> None:
        """Let nobody in any more."""
        os.close(self._spare)
        self._listener.close()

    def accept(self) -> None:
        """Somebody calls."""
        try:
            caller, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # else it is gone again
        caller.setblocking(False)
        if not self._room(len(self.waiting)):
            caller.close()
            return
        self.waiting[caller.fileno()] = (caller, bytearray())
        self._epoll.register(caller, select.EPOLLIN)

    def _turn_away(self) -> None:
        """Out of descriptors: hang up on who calls, who else would have the loop look at him for ever."""
        os.close(self._spare)
        with suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = os.dup(self._listener.fileno())

    def greeted(self, fd: int) -> None:
        """Read ``CONNECT PORT`` a byte at a time: what follows the line belongs to the stream."""
        caller, line = self.waiting[fd]
        try:
            while not line.endswith(b"\n") and len(line) < LINE_MAX:
                byte = caller.recv(1)
                if not byte:
                    break
                line += byte
        except BlockingIOError:
            return
        except OSError:
            line.clear()
        del self.waiting[fd]
        word, _, port = bytes(line).rstrip().partition(b" ")
        right = line.endswith(b"\n") and word.upper() == b"CONNECT" and port.isdigit() and int(port) <= 0xFFFFFFFF
        if not right:
            caller.close()
            return
        self._called(caller, int(port))


def _stale(path: str) -> bool:
    """True when nobody listens at the socket *path* any more: it was left by a process that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return stat.S_ISSOCK(os.lstat(path).st_mode)
        except OSError:  # not there, not a socket, or busy: bind says what it is
            return False
    return False

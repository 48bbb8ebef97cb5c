"""Character back ends on plain file descriptors: the writing side that all share, ``null`` and ``file``."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Any

from cardcage.config import HostPath
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["FileOptions", "FileSink", "Null", "Sink", "open_file", "open_null", "parse_path"]

PATIENCE = 1000
"""Milliseconds that a peer may keep us waiting before its bytes are dropped."""
PIECE = 4096
"""A pipe that polls as writable takes this much at once (PIPE_BUF)."""


class Sink:
    """Writes to a descriptor what it takes: a peer that does not read loses bytes, and cannot hold the machine up.

    Args:
        fd: open for writing; stays the caller's to close.
        log: told once when the peer is gone or stuck.
    """

    def __init__(self, fd: int, log: Any) -> None:
        self.fd, self._log = fd, log
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.dead = self._stuck = False

    def write(self, data: bytes) -> None:
        """Write *data*, or drop what cannot be written."""
        at = 0
        while at < len(data) and not self.dead:
            ready = self._poll.poll(0 if self._stuck else PATIENCE)
            if not ready:
                if not self._stuck:
                    self._log.warning("nobody reads the character back end: output is dropped", fd=self.fd)
                self._stuck = True
                return
            self._stuck = False
            try:
                at += os.write(self.fd, data[at : at + PIECE])
            except BlockingIOError:
                return
            except OSError as error:
                self.dead = True
                self._log.warning("character back end is gone", fd=self.fd, problem=error.strerror)


class Null:
    """Takes everything, gives nothing."""

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Nothing will be received."""

    def write(self, data: bytes, /) -> None:
        """Forget *data*."""

    def may_fork(self) -> str:
        return ""

    def forked(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def open_null(slot: Slot) -> Null:
    """Back end ``char:null``."""
    return Null()


@frozen
class FileOptions:
    """Options of ``char:file``.

    Attributes:
        path: file to write; made when it is not there.
        append: keep what is in it.
    """

    path: HostPath
    append: bool = False


def parse_path(text: str) -> dict[str, object]:
    """Shorthand: ``"file:PATH"``, ``"socket:PATH"``."""
    return {"path": text}


class FileSink:
    """A file that takes the guest's output at once, without a buffer."""

    def __init__(self, fd: int, log: Any) -> None:
        self._fd = fd
        self._sink = Sink(fd, log)

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Nothing will be received."""

    def write(self, data: bytes, /) -> None:
        self._sink.write(data)

    def may_fork(self) -> str:
        return "a file takes the output of one machine"

    def forked(self) -> None:
        """It never is."""

    def close(self) -> None:
        os.close(self._fd)


def open_file(slot: Slot, options: FileOptions) -> FileSink:
    """Back end ``char:file``. Raises OSError."""
    slot.host.ask("image", options.path, ("create", "write"))
    mode = os.O_APPEND if options.append else os.O_TRUNC
    return FileSink(os.open(options.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | mode, 0o666), slot.log)

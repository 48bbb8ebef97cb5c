"""Sockets of monitors: where one is, in QEMU's words, and its name in a folder, which nobody else's process loses."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from errno import EAGAIN, ECONNREFUSED
from typing import TYPE_CHECKING, Any

from cardcage.config import beside
from cardcage.errors import ConfigError
from cardcage.security import Needs

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["Endpoint"]

BACKLOG = 8
"""Peers that wait to be taken."""


class Endpoint:
    """``unix:PATH``, ``tcp:HOST:PORT`` or ``fd:N``, the option ``socket`` of a device.

    Args:
        text: as above. server: it listens, else it connects.

    Raises ConfigError for another form.
    """

    def __init__(self, text: str, *, server: bool = True) -> None:
        kind, _, where = text.partition(":")
        if kind not in ("unix", "tcp", "fd") or not where:
            raise ConfigError(f'expected unix:PATH, tcp:HOST:PORT, fd:N or stdio, got "{text}"', key="socket")
        self.text, self._server, self._kind = text, server, kind
        self._where = beside(text, "unix:").removeprefix("unix:") if kind == "unix" else where
        self._name: tuple[int, int] | None = None

    def open(self, slot: Slot) -> socket.socket:
        """The socket, listening or connected. Raises ConfigError or Denied."""
        slot.host.ask("socket", self.text, ("listen" if self._server else "connect",))
        try:
            return self._open()
        except OSError as error:
            raise ConfigError(f"{self.text}: {error.strerror or error}", key="socket") from error

    def _open(self) -> socket.socket:
        """The socket, listening or connected. Raises OSError or ConfigError."""
        if self._kind == "fd":
            return self._inherited()
        address: Any = self._where
        if self._kind == "unix":
            made = socket.socket(socket.AF_UNIX)
        else:
            host, _, port = address.rpartition(":")
            number = self._number(port, 65535, "tcp:HOST:PORT")
            found = socket.getaddrinfo(host or None, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            made = socket.socket(family, kind, protocol)
        try:
            if not self._server:
                made.connect(address)
                return made
            if self._kind == "unix":
                remove_stale(self._where)
            else:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            if self._kind == "unix":
                found_there = os.stat(self._where)
                self._name = (found_there.st_dev, found_there.st_ino)
            made.listen(BACKLOG)
        except BaseException:
            made.close()
            raise
        return made

    def _inherited(self) -> socket.socket:
        fd = self._number(self._where, (1 << 31) - 1, "fd:N")
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"descriptor {fd} is no socket", key="socket")
        made = socket.socket(fileno=fd)
        if bool(made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is not self._server:
            made.detach()  # it stays its owner's
            kind = "that listens" if self._server else "that is connected, with server=off"
            raise ConfigError(f"descriptor {fd}: expected a socket {kind}", key="socket")
        made.set_inheritable(False)
        return made

    def _number(self, text: str, most: int, form: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
            raise ConfigError(f'expected {form}, got "{self.text}"', key="socket")
        return int(text)

    def needs(self) -> Needs:
        """The socket's name is removed at the end."""
        return Needs(remove=(os.path.dirname(os.path.abspath(self._where)),) if self._name else ())

    def remove_name(self) -> None:
        """Remove the socket's name, if it is not somebody else's by now."""
        if self._name is not None:
            with suppress(OSError):
                found = os.stat(self._where)
                if (found.st_dev, found.st_ino) == self._name:
                    os.unlink(self._where)


def remove_stale(path: str) -> None:
    """Remove the socket of a process that has gone. Raises ConfigError when it is alive, or no socket."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path}: exists and is not a socket", key="socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code in (0, EAGAIN):  # EAGAIN: more wait for it than it lets in
        raise ConfigError(f"{path}: another process listens there", key="socket")
    if code != ECONNREFUSED:
        raise OSError(code, os.strerror(code), path)
    os.unlink(path)

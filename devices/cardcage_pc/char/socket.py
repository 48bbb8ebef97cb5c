"""Character back end ``socket``: a unix stream socket, listening (one peer at a time) or connecting."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from errno import EAGAIN, ECONNREFUSED, ENAMETOOLONG
from typing import TYPE_CHECKING

from attrs import frozen
from cardcage.config import HostPath
from cardcage.errors import ConfigError
from cardcage.security import Needs

from cardcage_pc.char.fd import Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

__all__ = ["Socket", "SocketOptions", "open_socket"]


@frozen
class SocketOptions:
    """Options of ``char:socket``.

    Attributes:
        path: of the unix socket.
        server: listen there, else connect.
    """

    path: HostPath
    server: bool = True


class Socket:
    """Unix socket; output without a peer is dropped. A listening socket takes the next peer when the last has gone."""

    def __init__(self, slot: Slot, options: SocketOptions) -> None:
        self._slot, self._options = slot, options
        self._listening: socket.socket | None = None
        self._peer: socket.socket | None = None
        self._sink: Sink | None = None
        slot.host.ask("socket", f"unix:{options.path}", ("listen" if options.server else "connect",))
        made = socket.socket(socket.AF_UNIX)
        try:
            if not options.server:
                made.connect(options.path)
                self._peer = made
                return
            _remove_stale(options.path)
            made.bind(options.path)
            made.listen(1)
        except OSError as error:  # too long a path has no number; none names the socket by itself
            made.close()
            raise OSError(error.errno or ENAMETOOLONG, error.strerror or str(error), options.path) from error
        except BaseException:
            made.close()
            raise
        self._listening = made
        self._listening.setblocking(False)

    def start(self, received: Callable[[bytes], None], /) -> None:
        """Begin; see CharBackend."""
        self._received = received
        if self._peer is not None:
            self._take(self._peer)
        elif self._listening is not None:
            self._slot.loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        if self._listening is None or self._peer is not None:
            return
        try:
            peer, _ = self._listening.accept()
        except OSError:  # it went away before we came to it
            return
        self._slot.loop.remove_reader(self._listening.fileno())
        self._take(peer)

    def _take(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer, self._sink = peer, Sink(peer.fileno(), self._slot.log)
        self._slot.loop.add_reader(peer.fileno(), self._readable)

    def _readable(self) -> None:
        if self._peer is None:
            return
        try:
            data = self._peer.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._received(data)
            return
        self._drop()
        if self._listening is not None:
            self._slot.loop.add_reader(self._listening.fileno(), self._accept)

    def _drop(self) -> None:
        if self._peer is not None:
            self._slot.loop.remove_reader(self._peer.fileno())
            self._peer.close()
        self._peer = self._sink = None

    def write(self, data: bytes, /) -> None:
        if self._sink is not None:
            self._sink.write(data)

    def needs(self) -> Needs:
        """The socket's name is removed at the end."""
        return Needs(remove=(os.path.dirname(os.path.abspath(self._options.path)),) if self._options.server else ())

    def close(self) -> None:
        """Hang up, and take the socket's name away."""
        listening, self._listening = self._listening, None
        if listening is not None:
            self._slot.loop.remove_reader(listening.fileno())
            listening.close()
            with suppress(FileNotFoundError):
                os.unlink(self._options.path)
        self._drop()


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that has gone. Raises ConfigError when it is alive, or no socket."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path}: exists and is not a socket", key="path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code in (0, EAGAIN):  # EAGAIN: more wait for it than it lets in
        raise ConfigError(f"{path}: another process listens there", key="path")
    if code != ECONNREFUSED:
        raise OSError(code, os.strerror(code), path)
    os.unlink(path)


def open_socket(slot: Slot, options: SocketOptions) -> Socket:
    """Back end ``char:socket``. Raises OSError, or ConfigError for a path that is taken."""
    return Socket(slot, options)

"""Block back ends ``nbd`` and ``nbd+unix``: requests of any thread, on a connection that is made anew if it breaks."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from attrs import field
from attrs.validators import ge, le, max_len
from cardcage.backends import BlockInfo
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError
from cardcage.security import Needs
from cardcage.segments import total
from cardcage.units import Duration
from cardcage.values import frozen
from cardcage.waiting import Condition

from cardcage_nbd.wire import NO_HOLE, BrokenServer, Export, Flag, Kind, RefusedExport, Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.device import Slot

    from cardcage_nbd.wire import Chunk

__all__ = ["NbdDisk", "NbdOptions", "open_nbd", "parse_tcp", "parse_unix"]

PORT = 10809
PAUSE = 0.1
"""Seconds between two tries to connect again."""
LONGEST = 1 << 30
"""Bytes of one trim or write of zeroes."""


@frozen
class NbdOptions:
    """Options of ``block:nbd`` and ``block:nbd+unix``; a URI stands for the first four.

    Attributes:
        host, port: where the server listens. path: of its Unix socket, instead of these.
        export: name of the disk there.
        readonly: the guest cannot write, even where the server lets it.
        timeout: time that a server may be silent while it has requests before its connection counts as lost.
        reconnect: time for which requests wait until a lost connection is made again; then they fail, and the next
            request tries once more. 0 fails them at once.
    """

    host: str = ""
    port: int = field(default=PORT, validator=[ge(1), le(65535)])
    path: HostPath = ""
    export: str = field(default="", validator=max_len(4096))
    readonly: bool = False
    timeout: Duration = field(default=Duration(30), validator=ge(Duration(0.1)))
    reconnect: Duration = field(default=Duration(10))


def parse_tcp(text: str) -> dict[str, Any]:
    """``//HOST[:PORT][/EXPORT]``, as it stands behind ``nbd:``. Raises ValueError."""
    parts = urlsplit(f"nbd:{text}")
    if not text.startswith("//") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f'"nbd:{text}": expected nbd://HOST:PORT/EXPORT')
    found: dict[str, Any] = {"host": parts.hostname, "export": unquote(parts.path.removeprefix("/"))}
    return found if parts.port is None else {**found, "port": parts.port}


def parse_unix(text: str) -> dict[str, Any]:
    """``///[EXPORT]?socket=PATH``, as it stands behind ``nbd+unix:``. Raises ValueError."""
    parts = urlsplit(f"nbd+unix:{text}")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not text.startswith("///") or query.keys() != {"socket"} or not query["socket"]:
        raise ValueError(f'"nbd+unix:{text}": expected nbd+unix:///EXPORT?socket=PATH')
    return {"path": query["socket"], "export": unquote(parts.path.removeprefix("/"))}


class Pending:
    """A request under way. The disk's lock guards it."""

    def __init__(self, kind: Kind, offset: int, size: int, flags: int, buffers: Sequence[memoryview]) -> None:
        self.kind, self.offset, self.size, self.flags, self.buffers = kind, offset, size, flags, buffers
        self.sent = buffers if kind is Kind.WRITE else ()
        self.done = False
        self.covers = 0  # writes that had been answered when it was made: what a flush answers for
        self.begin()

    def begin(self) -> None:
        """It is sent, perhaps anew: nothing has come."""
        self.error, self.left, self.since = 0, self.size if self.kind is Kind.READ else 0, time.monotonic()

    def parts(self, offset: int, size: int) -> list[memoryview]:
        """The parts of the buffers for *size* bytes at *offset*. Raises BrokenServer outside the request."""
        at = offset - self.offset
        if self.kind is not Kind.READ or at < 0 or size > self.size - at or size > self.left:
            raise BrokenServer(f"{size} bytes at {offset}, which nobody asked for")
        found = []
        for one in self.buffers:
            view = one if one.format == "B" and one.ndim == 1 else one.cast("B")
            if at < len(view) and size:
                found.append(view[at : at + size])
                size -= len(found[-1])
                at = 0
            else:
                at -= len(view) if at >= len(view) else at
        return found


class NbdDisk:
    """A server's disk. Thread-safe; satisfies :class:`cardcage.backends.BlockBackend`.

    Args:
        dial: makes a connected socket. name: for errors and the log.
    """

    def __init__(self, dial: Callable[[], socket.socket], options: NbdOptions, name: str, log: Any) -> None:
        self._dial, self._options, self._name, self._log = dial, options, name, log
        self._changed = Condition()
        self._sending = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._last = 0
        self._closed = False
        self._until = 0.0  # when requests fail that wait for a connection; 0 while one does
        self._written = self._stable = 0  # writes that were answered, and those of them that a flush answered for
        self._lost = False  # the rest of them may be gone with a server, and nobody was told yet
        self._wire: Wire | None
        try:
            self._peer, self._wire, self._export = self._connect()
        except OSError as error:
            raise HostError(f"{name}: {error.strerror or error}") from error
        flags, export = self._export.flags, self._export
        readonly = options.readonly or bool(flags & Flag.READ_ONLY)
        size = export.size // 512 * 512
        if size != export.size:
            log.warning("the last bytes of the disk are no whole sector, and are left out", disk=name, size=export.size)
        self.info = BlockInfo(
            size,
            max(export.least, 512),
            readonly,
            bool(flags & Flag.TRIM) and not readonly,
            bool(flags & Flag.WRITE_ZEROES) and not readonly,
        )
        self._thread = threading.Thread(target=self._listen, name=f"nbd-{name}", daemon=True)
        self._thread.start()

    def _connect(self) -> tuple[socket.socket, Wire, Export]:
        peer = self._dial()
        try:
            peer.settimeout(self._options.timeout)
            wire = Wire(peer)
            return peer, wire, wire.negotiate(self._options.export)
        except BaseException:
            peer.close()
            raise

    # the connection's thread

    def _listen(self) -> None:
        while True:
            try:
                self._hear()
            except OSError as error:
                with self._changed:
                    if self._closed:
                        return
                    self._wire = None
                    self._lose()
                self._peer.close()
                why = error.strerror or str(error)
                self._log.warning("the connection to the NBD server is lost", disk=self._name, why=why)
                if not self._again():
                    return

    def _hear(self) -> None:
        """Hear replies until the connection breaks."""
        wire, timeout = self._wire, self._options.timeout
        assert wire is not None
        while True:
            if wire.ready(timeout):
                self._take(wire, wire.reply())
                continue
            with self._changed:
                oldest = min((one.since for one in self._pending.values()), default=None)
            if oldest is not None and time.monotonic() - oldest >= timeout:
                raise TimeoutError(errno.ETIMEDOUT, f"the server has been silent for {timeout:g} s")

    def _take(self, wire: Wire, chunk: Chunk) -> None:
        with self._changed:
            one = self._pending.get(chunk.handle)
        if one is None:
            raise BrokenServer("a reply to no request")
        if chunk.plain and one.kind is Kind.READ and not chunk.error:
            wire.fill(one.parts(one.offset, one.size))
            one.left = 0
        elif chunk.size > 0:
            wire.fill(one.parts(chunk.offset, chunk.size))
            one.left -= chunk.size
        elif chunk.size < 0:
            for part in one.parts(chunk.offset, -chunk.size):
                part[:] = bytes(len(part))
            one.left += chunk.size
        with self._changed:
            one.error = one.error or chunk.error
            if chunk.done:
                if one.left and not one.error:
                    raise BrokenServer("a reply that is over before all has come")
                self._until = 0.0
                if one.kind in (Kind.WRITE, Kind.WRITE_ZEROES) and not one.error:
                    self._written += 1
                elif one.kind is Kind.FLUSH and not one.error:
                    self._stable = max(self._stable, one.covers)
                one.done = True
                self._pending.pop(chunk.handle, None)
                self._changed.notify_all()

    def _lose(self) -> None:
        """The server went, perhaps with what it had written and not flushed: one flush fails, under way or the next."""
        if self._written > self._stable:
            flushes = {handle: one for handle, one in self._pending.items() if one.kind is Kind.FLUSH}
            for handle, one in flushes.items():
                one.error, one.done = errno.EIO, True
                del self._pending[handle]
            self._lost = all(one.covers < self._written for one in flushes.values())
            self._stable = self._written
            self._changed.notify_all()

    def _check_lost(self) -> None:
        if self._lost:
            self._lost = False
            raise OSError(errno.EIO, f"{self._name}: the server went before it had flushed all that was written")

    def _again(self) -> bool:
        """Connect again, and send what was under way. Requests fail that waited too long; False once closed."""
        with self._changed:
            failed = self._until > 0  # the connection before broke with nothing answered
            if not failed:
                self._until = time.monotonic() + self._options.reconnect
        while not failed or self._pause():
            failed = True
            try:
                peer, wire, export = self._connect()
                try:
                    if (export.size, export.flags) != (self._export.size, self._export.flags):
                        raise RefusedExport("another disk is there now")
                    self._resend(peer, wire)
                except BaseException:
                    peer.close()
                    raise
            except OSError as error:
                self._log.warning("no connection to the NBD server", disk=self._name, why=error.strerror or str(error))
                with self._changed:
                    self._wire = None
                continue
            self._log.warning("the connection to the NBD server is there again", disk=self._name)
            return True
        return False

    def _pause(self) -> bool:
        """Wait before the next try: a moment, or for a request where all waited too long. False once closed."""
        with self._changed:
            if time.monotonic() < self._until:
                self._changed.wait_for(lambda: self._closed, PAUSE)
            else:
                self._fail(errno.EIO)
                self._changed.wait_for(lambda: self._closed or self._pending)
                self._until = time.monotonic() + self._options.reconnect
            return not self._closed

    def _fail(self, error: int) -> None:
        for one in self._pending.values():
            one.error, one.done = error, True
        self._pending.clear()
        self._changed.notify_all()

    def _resend(self, peer: socket.socket, wire: Wire) -> None:
        """Go on by another connection: send what was under way. Raises OSError."""
        with self._sending:
            with self._changed:
                if self._closed:  # meanwhile: nobody would hang up on this one
                    raise OSError(errno.ESHUTDOWN, "closed")
                self._peer, self._wire = peer, wire
                # Writes first: their replies are short, and nobody reads any before all is sent.
                waiting = sorted(self._pending.items(), key=lambda one: one[1].kind is Kind.READ)
            for handle, one in waiting:
                one.begin()
                wire.request(one.kind, handle, one.offset, one.size, one.flags, one.sent)

    # requests

    def _do(self, kind: Kind, offset: int, size: int, flags: int = 0, buffers: Sequence[memoryview] = ()) -> None:
        one = Pending(kind, offset, size, flags, buffers)
        with self._sending:  # a connection is made again either before this, or with it among what is sent anew
            with self._changed:
                if self._closed:
                    raise OSError(errno.ESHUTDOWN, f"{self._name}: closed")
                if kind is Kind.FLUSH:
                    self._check_lost()
                one.covers = self._written
                if self._wire is not None and not self._pending:
                    self._until = 0.0  # however long ago the connection was made again
                self._last += 1
                handle = self._last
                self._pending[handle] = one
                wire = self._wire
                self._changed.notify_all()
            if wire is not None:
                try:
                    wire.request(kind, handle, offset, size, flags, one.sent)
                except OSError:  # the listener meets it too, and sends this again
                    self._hang_up()
        with self._changed:
            self._changed.wait_for(lambda: one.done)
        if one.error:
            raise OSError(one.error, f"{self._name}: {os.strerror(one.error)}")

    def _hang_up(self) -> None:
        with suppress(OSError):  # it is gone already
            self._peer.shutdown(2)

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Fill the writable *buffers* one after another."""
        for at, size, parts in pieces(offset, buffers, self._export.largest):
            self._do(Kind.READ, at, size, 0, parts)

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Write *buffers* one after another."""
        self._check()
        for at, size, parts in pieces(offset, buffers, self._export.largest):
            self._do(Kind.WRITE, at, size, 0, parts)

    def flush(self) -> None:
        """Have the server bring all that was written to stable storage, where it can.

        Raises OSError, once, where it went before that: it may have kept what it had answered in memory.
        """
        if self._export.flags & Flag.FLUSH and not self.info.readonly:
            self._do(Kind.FLUSH, 0, 0)
        else:
            with self._changed:
                self._check_lost()
                self._stable = self._written

    def discard(self, offset: int, length: int, /) -> None:
        """The server may forget what is there."""
        self._check()
        if self.info.discard:
            for at in range(offset, offset + length, LONGEST):
                self._do(Kind.TRIM, at, min(LONGEST, offset + length - at))

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        """Zeros are there afterwards; without *unmap*, room for them too."""
        self._check()
        for at in range(offset, offset + length, LONGEST):
            size = min(LONGEST, offset + length - at)
            if self.info.write_zeroes:
                self._do(Kind.WRITE_ZEROES, at, size, 0 if unmap else NO_HOLE)
            else:
                zeros = memoryview(bytes(1 << 20))
                for place in range(at, at + size, len(zeros)):
                    self.writev(place, [zeros[: min(len(zeros), at + size - place)]])

    def _check(self) -> None:
        if self.info.readonly:
            raise OSError(errno.EROFS, f"{self._name}: the disk is read-only")

    def needs(self) -> Needs:
        """Sockets, to connect again."""
        if not self._options.reconnect:
            return Needs()
        return Needs(sockets=("unix" if self._options.path else "inet",))

    def may_move(self) -> str:
        """A server keeps no lock for its clients: the same disk can be had from elsewhere."""
        return ""

    def let_go(self) -> None:
        """Nobody writes any more; what was written is stable (``cardcage_migrate.Movable``)."""
        self.flush()

    def take_back(self) -> None:
        """It was never anybody else's alone."""

    def close(self) -> None:
        """Take leave of the server."""
        with self._changed:
            self._closed = True
            wire = self._wire
            self._fail(errno.ESHUTDOWN)
        if wire is not None:
            with suppress(OSError), self._sending:  # it left first
                wire.request(Kind.DISCONNECT, 0, 0, 0, 0, ())
        self._hang_up()
        self._thread.join()
        self._peer.close()


def pieces(offset: int, buffers: Sequence[memoryview], most: int) -> list[tuple[int, int, Sequence[memoryview]]]:
    """Offset, size and buffers of requests of up to *most* bytes."""
    size = total(buffers)
    if size <= most:
        return [(offset, size, list(buffers))] if size else []
    found: list[tuple[int, int, Sequence[memoryview]]] = []
    room, parts, at = most, [], offset
    for one in buffers:
        left = one
        while left.nbytes:
            part = left[:room]
            parts.append(part)
            room -= part.nbytes
            left = left[part.nbytes :]
            if not room:
                found.append((at, most, parts))
                at, room, parts = at + most, most, []
    if parts:
        found.append((at, most - room, parts))
    return found


def open_nbd(slot: Slot, options: NbdOptions) -> NbdDisk:
    """Back end ``block:nbd``. Raises ConfigError, or HostError where there is no server, or no such export."""
    if bool(options.host) == bool(options.path):
        raise ConfigError("nbd: expected a host, or the path of a Unix socket")
    timeout = min(options.timeout, 10.0)
    places: list[tuple[socket.AddressFamily, Any]]
    if options.path:
        name = f"nbd+unix:///{options.export}?socket={options.path}"
        if len(os.fsencode(options.path)) > 107:
            raise ConfigError(f'"{options.path}": expected the path of a socket, 107 bytes at most')
        places = [(socket.AF_UNIX, str(options.path))]
        slot.host.ask("socket", f"unix:{options.path}", ("connect",))
    else:
        name = f"nbd://{options.host}:{options.port}/{options.export}"
        try:  # once: a jail has no resolver
            found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
        places = [(one[0], one[4]) for one in found]
        slot.host.ask("socket", f"{options.host}:{options.port}", ("connect",))

    def dial() -> socket.socket:
        for family, where in places[:-1]:  # a name such as localhost may be ::1 first, where only 127.0.0.1 is served
            with suppress(OSError):
                return connected(family, where, timeout)
        return connected(*places[-1], timeout)

    return NbdDisk(dial, options, name, slot.log)


def connected(family: socket.AddressFamily, where: Any, timeout: float) -> socket.socket:
    """A socket that is connected to *where*. Raises OSError."""
    peer = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        peer.settimeout(timeout)
        peer.connect(where)
        if family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        peer.close()
        raise
    return peer

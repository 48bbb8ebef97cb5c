"""Networks over sockets, on the wire as QEMU's ``-netdev stream`` and ``-netdev dgram``."""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
from collections import deque
from errno import EADDRINUSE
from struct import pack
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from cardcage.backends import NetFeatures
from cardcage.config import HostPath, beside
from cardcage.errors import ConfigError, HostError
from cardcage.security import Needs
from cardcage.units import Duration

from cardcage_net.inbox import FRAME_MAX, FRAME_MIN, Inbox
from cardcage_net.link import Link
from cardcage_net.pcap import dumped
from cardcage_net.switch import clear_socket, listen_unix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["Dgram", "DgramNet", "Stream", "StreamNet", "address", "open_dgram", "open_stream"]

CONNECT_TIMEOUT = 5.0
ROUND = 64
WAITING = 1024
"""Datagrams that wait for a slow peer; more are dropped."""


@frozen
class Stream:
    """Options of ``net:stream``.

    Attributes:
        connect: address of the peer, ``unix:PATH`` or ``HOST:PORT``. listen: own address, for one peer at a time.
            One of the two is given.
        reconnect: how long to wait before connecting again, 0 to give up.
        dump: pcap file of what passes.
    """

    connect: str | None = None
    listen: str | None = None
    reconnect: Duration = field(factory=lambda: Duration(1))
    dump: HostPath | None = None


@frozen
class Dgram:
    """Options of ``net:dgram``.

    Attributes:
        remote: where frames go: ``unix:PATH``, ``HOST:PORT``, or a multicast group ``GROUP:PORT`` that many share.
        local: own address; for a group the address of the interface to use.
        dump: pcap file of what passes.
    """

    remote: str
    local: str | None = None
    dump: HostPath | None = None


def address(text: str) -> tuple[socket.AddressFamily, Any]:
    """Parse ``unix:PATH``, ``HOST:PORT`` or ``[V6]:PORT``. Raises ConfigError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or len(os.fsencode(path)) > 107:
            raise ConfigError(f'"{text}": expected the path of a socket, 107 bytes at most')
        return socket.AF_UNIX, path
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5 or not int(port) < 65536:
        raise ConfigError(f'"{text}": expected unix:PATH or HOST:PORT')
    try:
        found = socket.getaddrinfo(host.strip("[]") or "0.0.0.0", int(port), type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise ConfigError(f'"{text}": "{host}" is not the name of a host') from error
    except OSError as error:
        raise ConfigError(f'"{text}": {error.strerror or error}') from error
    family, _, _, _, where = found[0]
    return family, where


class StreamNet:
    """One stream to a peer. Satisfies :class:`~cardcage.backends.NetBackend`.

    Raises :exc:`~cardcage.errors.HostError` when it cannot listen, or not connect and is not to try again.
    """

    features = NetFeatures()

    def __init__(self, slot: Slot, options: Stream) -> None:
        if (options.connect is None) == (options.listen is None):
            raise ConfigError("net stream: expected either connect or listen")
        self._slot, where = slot, beside(options.connect or options.listen or "", "unix:")
        self._family, self._where = address(where)
        slot.host.ask("socket", where, ("listen" if options.connect is None else "connect",))
        self._wait = int(options.reconnect * 1e9)
        self._timer = slot.clock.timer(self._dial)
        self._link = Link(slot.loop, self._lost)
        self._listener: socket.socket | None = None
        self._calling: Any = None
        self._closed = False
        if options.listen is not None:
            self._listener = self._listen(where)
        else:
            self._connect_first(where)

    def _listen(self, text: str) -> socket.socket:
        if self._family == socket.AF_UNIX:
            return listen_unix(self._where)
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(self._where)
            listener.listen(1)
        except OSError as error:
            listener.close()
            why = "another program or machine has it" if error.errno == EADDRINUSE else error.strerror
            raise HostError(f"net stream: cannot listen at {text}: {why}") from error
        return listener

    def _connect_first(self, text: str) -> None:
        connection = socket.socket(self._family, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT)
        try:
            connection.connect(self._where)
        except OSError as error:
            connection.close()
            if not self._wait:
                raise HostError(f"net stream: {text}: {error.strerror or error}") from error
            self._again(error.strerror or str(error))
            return
        self._attach(connection)

    def _attach(self, connection: socket.socket) -> None:
        if self._family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link.attach(connection)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._slot.loop.remove_reader(self._listener.fileno())  # one peer at a time
        self._attach(connection)

    def _lost(self, reason: str) -> None:
        self._slot.log.info("network peer is gone", reason=reason)
        if self._listener is not None:
            self._slot.loop.add_reader(self._listener.fileno(), self._accept)
        elif self._wait:
            self._timer.arm(self._slot.clock.now() + self._wait)

    def _again(self, reason: str) -> None:
        self._slot.log.debug("network peer cannot be reached", reason=reason)
        self._timer.arm(self._slot.clock.now() + self._wait)

    def _dial(self) -> None:
        """Connect without waiting for it."""
        if self._closed:
            return
        connection = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        code = connection.connect_ex(self._where)
        if code == errno.EINPROGRESS:
            poll = select.epoll()  # readable once the socket is writable, which is when it is connected
            poll.register(connection.fileno(), select.EPOLLOUT)
            self._calling = connection, poll
            self._slot.loop.add_reader(poll.fileno(), self._answered)
        elif code:
            connection.close()
            self._again(os.strerror(code))
        else:
            self._attach(connection)

    def _hang_up(self) -> Any:
        connection, poll = self._calling
        self._calling = None
        self._slot.loop.remove_reader(poll.fileno())
        poll.close()
        return connection

    def _answered(self) -> None:
        connection = self._hang_up()
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            connection.close()
            self._again(os.strerror(code))
        else:
            self._attach(connection)

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin."""
        self._link.start(received)
        if self._listener is not None and not self._link.up:
            self._slot.loop.add_reader(self._listener.fileno(), self._accept)

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest; dropped while nobody is there."""
        self._link.send(parts)

    def resume(self, queue: int, /) -> None:
        self._link.resume()

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """The peer takes nothing over."""

    def needs(self) -> Needs:
        """A peer that went away is called again; a socket's name is removed at the end."""
        unix = self._family == socket.AF_UNIX
        if self._listener is None:
            return Needs(sockets=("unix" if unix else "inet",) if self._wait else ())
        return Needs(remove=(os.path.dirname(os.path.abspath(self._where)),) if unix else ())

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        if self._calling is not None:
            self._hang_up().close()
        self._link.close()
        if self._listener is not None:
            self._slot.loop.remove_reader(self._listener.fileno())
            self._listener.close()
            if self._family == socket.AF_UNIX:
                _remove(self._where)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


class DgramNet:
    """One frame a datagram. Satisfies :class:`~cardcage.backends.NetBackend`. Raises HostError and ConfigError."""

    features = NetFeatures()

    def __init__(self, slot: Slot, options: Dgram) -> None:
        self._slot, remote = slot, beside(options.remote, "unix:")
        local = None if options.local is None else beside(options.local, "unix:")
        self._family, self._remote = address(remote)
        slot.host.ask("socket", remote, ("connect",))
        if local is not None:
            slot.host.ask("socket", local, ("listen",))
        self._socket = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._sender = self._socket
        self._path: str | None = None
        self._group = self._family == socket.AF_INET and ipaddress.IPv4Address(self._remote[0]).is_multicast
        try:
            if self._group:
                self._join(local)
            else:
                self._bind(local)
        except OSError as error:
            self._socket.close()
            why = "another program or machine has it" if error.errno == EADDRINUSE else error.strerror or error
            raise HostError(f"net dgram: {local or remote}: {why}") from error
        except BaseException:
            self._socket.close()
            raise
        self._inbox = Inbox(0, self._pause, self._watch)
        self._backlog: deque[bytes] = deque()
        self._poll: select.epoll | None = None
        self._joined = False

    def _bind(self, text: str | None) -> None:
        if text is None:
            raise ConfigError("net dgram: local is missing: the address that the peer sends to")
        family, local = address(text)
        if family != self._family:
            raise ConfigError("net dgram: local and remote are of different kinds")
        if family == socket.AF_UNIX:
            self._path = local
            clear_socket(local, socket.SOCK_DGRAM)
        self._socket.bind(local)

    def _join(self, text: str | None) -> None:
        interface = address(text)[1][0] if text is not None else "0.0.0.0"
        member = pack("4s4s", socket.inet_aton(self._remote[0]), socket.inet_aton(interface))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(self._remote)
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        # A socket of its own to send from: its port tells our own frames, which come back, from those of others.
        self._sender = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        if text is not None:
            self._sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(interface))
        self._sender.bind((interface, 0))
        self._port = self._sender.getsockname()[1]

    def _pause(self) -> None:
        self._slot.loop.remove_reader(self._socket.fileno())

    def _watch(self) -> None:
        self._slot.loop.add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(ROUND):
            try:
                frame, source = self._socket.recvfrom(FRAME_MAX + 1)
            except OSError:  # nothing there, or an ICMP error about an earlier frame
                return
            if self._is_ours(source) and FRAME_MIN <= len(frame) <= FRAME_MAX and not self._inbox.put(frame):
                return

    def _is_ours(self, source: Any) -> bool:
        """True if a datagram from *source* belongs to this network."""
        if self._family == socket.AF_UNIX:
            return True
        if self._group:
            return bool(source[1] != self._port)
        return bool(source[:2] == self._remote[:2])

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin."""
        self._inbox.received = received
        self._watch()

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest; dropped when it is too long for a datagram, or nobody is there."""
        if self._backlog:
            if len(self._backlog) < WAITING:
                self._backlog.append(b"".join(parts))
            return
        if not self._emit(parts if len(parts) <= 512 else [b"".join(parts)]):
            self._backlog.append(b"".join(parts))
            self._poll = select.epoll()  # a descriptor that is readable when the socket is writable
            self._poll.register(self._sender.fileno(), select.EPOLLOUT)
            self._slot.loop.add_reader(self._poll.fileno(), self._writable)

    def _emit(self, parts: Sequence[Buffer]) -> bool:
        """Send, or drop; False when there will be room later."""
        try:
            if self._family == socket.AF_UNIX and not self._joined:
                self._sender.connect(self._remote)  # a unix socket tells of room only when it is connected
                self._joined = True
            self._sender.sendmsg(parts, (), 0, None if self._joined else self._remote)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET):
                self._joined = False  # another may take the peer's place
        return True

    def _writable(self) -> None:
        while self._backlog:
            if not self._emit([self._backlog[0]]):
                return
            self._backlog.popleft()
        self._end_poll()

    def _end_poll(self) -> None:
        if self._poll is not None:
            self._slot.loop.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = None

    def resume(self, queue: int, /) -> None:
        self._inbox.resume()

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """The peer takes nothing over."""

    def needs(self) -> Needs:
        """A Unix peer that went away is joined again; the socket's name is removed at the end."""
        if self._path is None:
            return Needs()
        return Needs(remove=(os.path.dirname(os.path.abspath(self._path)),), sockets=("unix",))

    def close(self) -> None:
        """Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._end_poll()
        self._slot.loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._sender.close()
        if self._path is not None:
            _remove(self._path)


def open_stream(slot: Slot, options: Stream) -> NetBackend:
    """Back end ``net:stream``."""
    return dumped(slot, options.dump, lambda: StreamNet(slot, options))


def open_dgram(slot: Slot, options: Dgram) -> NetBackend:
    """Back end ``net:dgram``."""
    return dumped(slot, options.dump, lambda: DgramNet(slot, options))

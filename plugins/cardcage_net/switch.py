"""An Ethernet switch between machines of one process, and over a unix socket those of others (QEMU included)."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import stat
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from typing import TYPE_CHECKING

from attrs import frozen
from cardcage.backends import NetFeatures
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError
from cardcage.security import Needs

from cardcage_net.framing import FrameStream
from cardcage_net.inbox import FRAME_MIN, Inbox
from cardcage_net.pcap import dumped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["Port", "Switch", "SwitchNet", "SwitchPort", "Uplink", "open_switch"]

ADDRESSES = 256
"""Addresses that one port may have learnt: a machine that invents more loses its own, not those of others."""
WAITING = 1024
"""Frames that wait for a slow port; more are dropped."""
PEERS = 64
ROUND = 64


@frozen
class SwitchPort:
    """Options of ``net:switch``.

    Attributes:
        name: of the switch. Machines of one :class:`~cardcage.host.Host` that name the same switch are joined.
        listen: unix socket at which other processes can join it (as ``net:stream`` with ``connect``, or QEMU's
            ``-netdev stream``); the first port that gives a path decides.
        dump: pcap file of what passes this port.
    """

    name: str = "switch"
    listen: HostPath | None = None
    dump: HostPath | None = None


class Port:
    """One port. Frames may come from any thread; they are handed over where *call_soon* says.

    Args:
        call_soon: runs a callable on the thread, and under the lock, of whoever is behind the port.
        deliver: takes a frame; False stops delivery until :meth:`go_on`.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], None], deliver: Callable[[bytes], bool]) -> None:
        self._call_soon, self._deliver = call_soon, deliver
        self._queue: deque[bytes] = deque()
        self._scheduled = self._stopped = False
        self.learnt: OrderedDict[bytes, None] = OrderedDict()
        self.dropped = 0

    def put(self, frame: bytes) -> None:
        """Hand *frame* over soon, or drop it when too many wait. Any thread."""
        if len(self._queue) >= WAITING:
            self.dropped += 1
            return
        self._queue.append(frame)
        if not self._scheduled and not self._stopped:
            self._scheduled = True
            self._call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        for _ in range(ROUND):
            if self._stopped or not self._queue:
                return
            if not self._deliver(self._queue.popleft()):
                self._stopped = True
        if self._queue and not self._scheduled:
            self._scheduled = True
            self._call_soon(self._run)

    def go_on(self) -> None:
        """The other side takes frames again."""
        self._stopped = False
        self._run()


class Switch:
    """Learns which address is behind which port, and forwards. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ports: list[Port] = []
        self._table: dict[bytes, Port] = {}
        self.uplink: Uplink | None = None

    def plug(self, port: Port) -> None:
        """Join *port*."""
        with self._lock:
            self.ports = [*self.ports, port]

    def unplug(self, port: Port) -> None:
        """Forget *port*; the socket is closed with the last that is not of it. Idempotent."""
        with self._lock:
            self.ports = [one for one in self.ports if one is not port]
            for address in port.learnt:
                self._table.pop(address, None)
            port.learnt.clear()
            uplink = self.uplink
            if uplink is not None and all(uplink.owns(one) for one in self.ports):
                self.uplink = None
            else:
                uplink = None
        if uplink is not None:
            uplink.close()

    def listen(self, path: str) -> None:
        """Let other processes join at the unix socket *path*. Raises HostError, or ConfigError for a second path."""
        with self._lock:
            if self.uplink is None:
                self.uplink = Uplink(self, path)
            elif self.uplink.path != path:
                raise ConfigError(f"the switch listens at {self.uplink.path} already")

    def forward(self, source: Port, frame: bytes) -> None:
        """Send a frame that came in at *source* where it belongs."""
        if len(frame) < FRAME_MIN:
            return
        target, sender = frame[:6], frame[6:12]
        if self._table.get(sender) is not source and not sender[0] & 1:
            self._learn(source, sender)
        known = None if target[0] & 1 else self._table.get(target)
        if known is not None:
            if known is not source:
                known.put(frame)
            return
        for port in self.ports:
            if port is not source:
                port.put(frame)

    def _learn(self, port: Port, address: bytes) -> None:
        with self._lock:
            if not any(one is port for one in self.ports):
                return
            before = self._table.get(address)
            if before is not None:
                before.learnt.pop(address, None)
            port.learnt[address] = None
            self._table[address] = port
            if len(port.learnt) > ADDRESSES:
                oldest, _ = port.learnt.popitem(last=False)
                del self._table[oldest]


class Uplink:
    """The switch's unix socket: each connection is a port. Runs on a thread of its own, as no machine owns it."""

    def __init__(self, switch: Switch, path: str) -> None:
        self.path, self._switch = path, switch
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._calls: deque[Callable[[], None]] = deque()
        self._peers: dict[FrameStream, Port] = {}
        self._closing = False
        self._listener = listen_unix(path)
        self.add_reader(self._wake_read, self._woken)
        self.add_reader(self._listener.fileno(), self._accept)
        self._thread = threading.Thread(target=self._main, name="cardcage-switch", daemon=True)
        self._thread.start()

    def owns(self, port: Port) -> bool:
        """True if *port* is a connection of this socket."""
        return any(one is port for one in list(self._peers.values()))

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        """Watch *fd*; on the thread."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def remove_reader(self, fd: int, /) -> None:
        self._selector.unregister(fd)

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Run *callback* on the thread."""
        self._calls.append(callback)
        try:
            os.write(self._wake_write, b"\0")
        except OSError:  # full: it is awake; closed: nobody is left
            return

    def _woken(self) -> None:
        os.read(self._wake_read, 4096)
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def _main(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
        for stream, port in list(self._peers.items()):
            stream.close()
            self._switch.unplug(port)
        self._selector.close()
        self._listener.close()
        os.close(self._wake_read)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._peers) >= PEERS:
            connection.close()
            return
        port: Port
        stream: FrameStream

        def arrived(frame: memoryview) -> bool:
            self._switch.forward(port, bytes(frame))
            return True

        def leaving(frame: bytes) -> bool:
            stream.send([frame])
            return True

        def lost(reason: str) -> None:
            self._peers.pop(stream, None)
            self._switch.unplug(port)

        port = Port(self.call_soon, leaving)
        stream = FrameStream(self, connection, arrived, lost)
        self._peers[stream] = port
        self._switch.plug(port)
        stream.start()

    def close(self) -> None:
        """End the thread and remove the socket."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._closing = True
        self.call_soon(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        os.close(self._wake_write)


def clear_socket(path: str, kind: int) -> None:
    """Remove a socket at *path* that a dead process left behind. Raises HostError when somebody is behind it."""
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN):  # EAGAIN: more wait for it than it lets in
        raise HostError(f"{path}: another process listens there")
    if code == errno.ECONNREFUSED and stat.S_ISSOCK(os.stat(path).st_mode):
        os.unlink(path)


def listen_unix(path: str) -> socket.socket:
    """A unix stream socket that listens at *path*, for this user only. Raises HostError.

    A socket that a dead process left behind is replaced, a socket that answers is not.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        clear_socket(path, socket.SOCK_STREAM)
        os.fchmod(listener.fileno(), 0o600)  # before it has a name, so that nobody else gets in between
        listener.bind(path)
        listener.listen(PEERS)
    except OSError as error:
        listener.close()
        raise HostError(f"{path}: cannot listen: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


class SwitchNet:
    """A machine's end of a switch port. Satisfies :class:`~cardcage.backends.NetBackend`."""

    features = NetFeatures()

    def __init__(self, slot: Slot, switch: Switch) -> None:
        self._switch = switch
        self._inbox = Inbox(0, lambda: None, self._go_on)
        self._port = Port(slot.loop.call_soon, self._inbox.put)

    def _go_on(self) -> None:
        self._port.go_on()

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin."""
        self._inbox.received = received
        self._switch.plug(self._port)

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest."""
        self._switch.forward(self._port, b"".join(parts))

    def resume(self, queue: int, /) -> None:
        self._inbox.resume()

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """A switch takes nothing over: its ports need not agree."""

    def needs(self) -> Needs:
        """The switch's socket loses its name with the last port."""
        uplink = self._switch.uplink
        return Needs(remove=(os.path.dirname(os.path.abspath(uplink.path)),) if uplink is not None else ())

    def close(self) -> None:
        """Idempotent."""
        self._switch.unplug(self._port)


def open_switch(slot: Slot, options: SwitchPort) -> NetBackend:
    """Back end ``net:switch``."""
    switch: Switch = slot.host.share(f"net:switch:{options.name}", Switch)
    if options.listen is not None:
        slot.host.ask("socket", f"unix:{options.listen}", ("listen",))
    port = dumped(slot, options.dump, lambda: SwitchNet(slot, switch))
    if options.listen is not None:
        try:
            switch.listen(options.listen)  # last: what fails before it leaves no socket behind
        except BaseException:
            port.close()
            raise
    return port

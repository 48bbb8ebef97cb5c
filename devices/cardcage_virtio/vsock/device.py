"""Socket device (virtio 1.2, section 5.10) served in this process, on AF_UNIX sockets as Firecracker maps them.

A host program connects to ``uds``, writes ``CONNECT PORT\\n`` and reads ``OK HOSTPORT\\n`` once the guest accepted.
A guest that connects to CID 2 port P reaches the listener at ``uds`` + ``_P``.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field, frozen
from attrs.validators import ge, le, min_len
from cardcage.config import HostPath
from cardcage.errors import ConfigError, Denied
from cardcage.security import Needs

from cardcage_virtio.parking import HasNoThread
from cardcage_virtio.vsock.callers import Callers
from cardcage_virtio.vsock.stream import RST, Header, Stream
from cardcage_virtio.vsock.table import Streams
from cardcage_virtio.vsock.towards import EVENT, HOST_CID, STREAM, TowardsGuest

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Vsock", "VsockOptions", "VsockState"]

TX = 1
REQUEST, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = 1, 2, 4, 5, 6, 7
STREAMS_MAX = 1023


@frozen
class VsockOptions:
    """Options of ``virtio-vsock``.

    Attributes:
        cid: the guest's context id, 3 to 4294967294.
        uds: path of the AF_UNIX socket that host programs connect to. It must not exist, or be one that nobody serves.
    """

    cid: int = field(validator=[ge(3), le(0xFFFFFFFE)])
    uds: HostPath = field(validator=min_len(1))


@define
class VsockState:
    """A snapshot keeps no stream: both ends see a reset, as the specification has it for migration."""

    version: ClassVar[int] = 1


class Vsock(HasNoThread):
    """The host's end of all streams of a guest."""

    device_id = 19
    queue_sizes = (256, 256, 16)

    def __init__(self, options: VsockOptions) -> None:
        self.options = options
        self.streams = Streams()
        self._io: Virtio
        self._callers: Callers
        self._towards: TowardsGuest
        self._lost = self._barred = False

    def plug(self, slot: Slot) -> None:
        self._slot, path = slot, self.options.uds
        slot.host.ask("socket", f"unix:{path}", ("listen",), self._bar(True), self._bar(False))
        self._epoll = select.epoll()

        def room(waiting: int) -> bool:
            return not self._barred and len(self.streams) + waiting < STREAMS_MAX

        self._callers = Callers(self._epoll, room, self._called)
        try:
            self._callers.listen(path)
        except OSError as error:
            self._epoll.close()
            raise ConfigError(f"{slot.id}: uds {path}: {error.strerror or error}") from error
        slot.loop.add_reader(self._epoll.fileno(), self._ready)

    def _bar(self, barred: bool) -> Callable[[], None]:
        """Return what shuts host programs out and ends their streams, or lets them in again."""

        def act() -> None:
            self._barred = barred
            self._callers.drop()
            self._reset_all([one for one in self.streams if one.called])

        return act

    def _reset_all(self, streams: list[Stream]) -> None:
        """Both ends see a reset: neither is left to wait."""
        for stream in streams:
            self._reset(stream)
        self._io.guarded(self._towards.feed)

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io
        self._towards = TowardsGuest(io, self._slot, self.options.cid, self.streams.by_fd, self._epoll)

    def needs(self) -> Needs:
        """The guest calls the host by Unix sockets."""
        return Needs(remove=(os.path.dirname(os.path.abspath(self.options.uds)),), sockets=("unix",))

    def unplug(self) -> None:
        self._drop_all()
        self._slot.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._callers.close()
        os.unlink(self.options.uds)

    def config(self) -> bytes:
        return struct.pack("<Q", self.options.cid)

    def stop(self) -> None:
        self._drop_all()

    def start(self) -> None:
        if self._lost:
            self._lost = False
            self._io.guarded(self._towards.tell_lost)

    def pause(self) -> None:
        self._slot.loop.remove_reader(self._epoll.fileno())

    def resume(self) -> None:
        self._slot.loop.add_reader(self._epoll.fileno(), self._ready)

    def _drop_all(self) -> None:
        for stream in self.streams:
            self.streams.forget(stream)
        self._callers.drop()
        self._towards.clear()

    # the host's side

    def _ready(self) -> None:
        for fd, events in self._epoll.poll(0):
            if fd == self._callers.fileno():
                self._callers.accept()
            elif fd in self._callers.waiting:
                self._callers.greeted(fd)
            elif fd in self.streams.by_fd:
                stream = self.streams.by_fd[fd]
                if events & select.EPOLLOUT:
                    self._write_out(stream)
                if events & ~select.EPOLLOUT:
                    stream.readable = True
                    stream.hung_up |= bool(events & select.EPOLLHUP)
                    self._towards.want(stream)
                if stream.fd in self.streams.by_fd:
                    stream.watch(self._epoll)
        self._io.guarded(self._towards.feed)

    def _called(self, caller: socket.socket, port: int) -> None:
        """A host program wants the guest's *port*."""
        if not self._io.live:
            caller.close()
            return
        stream = Stream(caller, self.streams.free_port(port), port, greet=True)
        self.streams.add(stream, self._epoll)
        self._towards.send(stream, REQUEST)

    def _write_out(self, stream: Stream) -> None:
        alive = stream.write_out()
        if not alive:
            self._reset(stream)
        elif stream.update_due():
            self._towards.send(stream, CREDIT_UPDATE)

    def _reset(self, stream: Stream) -> None:
        self._towards.send(stream, RST)
        self.streams.forget(stream)

    # from the guest

    def notified(self, index: int) -> None:
        if index == TX:
            self._take()
        if index != EVENT:
            self._towards.feed()

    def _take(self) -> None:
        ring = self._io.rings[TX]
        if ring is None:
            return
        ring.batching = True
        try:
            for _ in range(4 * ring.size):
                request = ring.pop()
                if request is not None:
                    self._packet(request)
                    request.done()
                elif not ring.rearm():
                    return
            self._slot.loop.call_soon(lambda: self._io.kick(TX))
        finally:
            ring.batching = False
            ring.signal()

    def _packet(self, request: Request) -> None:
        header = Header.unpack(request.readable)
        if header is None or header.source_cid != self.options.cid:
            return  # a packet that says it is another's: dropped, as the specification has it
        stream = self.streams.by_ports.get((header.destination_port, header.source_port))
        if header.destination_cid != HOST_CID or header.type != STREAM:
            self._towards.refuse(header)
        elif header.op == REQUEST:
            self._connect(header)
        elif stream is None:
            if header.op != RST:
                self._towards.refuse(header)
        else:
            stream.peer_says(header.credit, header.forwarded)
            self._continue(stream, header, request)

    def _connect(self, header: Header) -> None:
        key = header.destination_port, header.source_port
        if key in self.streams.by_ports or len(self.streams) >= STREAMS_MAX:
            self._towards.refuse(header)
            return
        path = f"{self.options.uds}_{header.destination_port}"
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        stream = Stream(end, *key)
        try:
            stream.let_go = self._slot.host.ask("socket", f"unix:{path}", ("connect",), lambda: self._revoked(stream))
            end.connect(path)
        except (OSError, Denied):
            stream.close()
            self._towards.refuse(header)
            return
        stream.open = True
        stream.peer_says(header.credit, header.forwarded)
        self.streams.add(stream, self._epoll)
        self._towards.send(stream, RESPONSE)

    def _revoked(self, stream: Stream) -> None:
        if self.streams.by_ports.get((stream.local, stream.peer)) is stream:
            self._reset_all([stream])

    def _continue(self, stream: Stream, header: Header, request: Request) -> None:
        if header.op == RESPONSE and stream.greet:
            stream.open, stream.greet = True, False
            stream.push([memoryview(b"OK %d\n" % stream.local)], counted=False)
        elif header.op == RW and stream.open:
            if not stream.push(header.payload(request.readable)):
                self._reset(stream)  # more than the credit it was given
                return
        elif header.op == SHUTDOWN:
            stream.guest_ended |= header.flags & 3
            if stream.guest_ended == 3 and not stream.pending:
                self._reset(stream)
                return
        elif header.op == CREDIT_REQUEST:
            self._towards.send(stream, CREDIT_UPDATE)
        elif header.op == RST:
            stream.write_out()
            self.streams.forget(stream)
            return
        elif header.op not in (CREDIT_UPDATE, RW):
            self._reset(stream)
            return
        self._write_out(stream)
        if stream.fd in self.streams.by_fd:
            self._towards.want(stream)
            stream.watch(self._epoll)

    # state

    def save(self) -> VsockState:
        return VsockState()

    def load(self, state: VsockState) -> None:
        self._drop_all()
        self._lost = True

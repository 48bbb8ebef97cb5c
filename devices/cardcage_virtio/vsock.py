"""Socket device (virtio 1.2, section 5.10) served in this process, on AF_UNIX sockets as Firecracker maps them.

A host program connects to ``uds``, writes ``CONNECT PORT\\n`` and reads ``OK HOSTPORT\\n`` once the guest accepted.
A guest that connects to CID 2 port P reaches the listener at ``uds`` + ``_P``.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field, frozen
from attrs.validators import ge, le, min_len
from cardcage.errors import ConfigError, Denied

from cardcage_virtio.vsock_stream import BUFFER, RST, Header, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Vsock", "VsockOptions", "VsockState"]

HOST_CID = 2
RX, TX, EVENT = 0, 1, 2
STREAM = 1
REQUEST, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = 1, 2, 4, 5, 6, 7
STREAMS_MAX, PENDING_MAX, LINE_MAX = 1023, 4096, 32


@frozen
class VsockOptions:
    """Options of ``virtio-vsock``.

    Attributes:
        cid: the guest's context id, 3 to 4294967294.
        uds: path of the AF_UNIX socket that host programs connect to. It must not exist, or be one that nobody serves.
    """

    cid: int = field(validator=[ge(3), le(0xFFFFFFFE)])
    uds: str = field(validator=min_len(1))


@define
class VsockState:
    """A snapshot keeps no stream: both ends see a reset, as the specification has it for migration."""

    version: ClassVar[int] = 1


class Vsock:
    """The host's end of all streams of a guest."""

    device_id = 19
    queue_sizes = (256, 256, 16)

    def __init__(self, options: VsockOptions) -> None:
        self.options = options
        self.streams: dict[tuple[int, int], Stream] = {}
        self._sending: deque[Stream] = deque()
        self._control: deque[bytes] = deque()
        self._callers: dict[int, tuple[socket.socket, bytearray]] = {}
        self._by_fd: dict[int, Stream] = {}
        self._next_port = 1 << 30
        self._io: Virtio
        self._lost = self._barred = False

    def plug(self, slot: Slot) -> None:
        self._slot, path = slot, self.options.uds
        slot.ask("socket", f"unix:{path}", ("listen",), self._bar(True), self._bar(False))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if _stale(path):
                os.unlink(path)
            self._listener.bind(path)
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"{slot.id}: uds {path}: {error.strerror or error}") from error
        self._listener.listen(128)
        self._spare = os.dup(self._listener.fileno())
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        slot.add_reader(self._epoll.fileno(), self._ready)

    def _bar(self, barred: bool) -> Callable[[], None]:
        """What lets host programs in no more, and ends the streams of those that are; or lets them in again."""

        def act() -> None:
            self._barred = barred
            for caller, _ in self._callers.values():
                caller.close()
            self._callers.clear()
            self._reset_all([one for one in self.streams.values() if one.called])

        return act

    def _reset_all(self, streams: list[Stream]) -> None:
        """Both ends see a reset: neither is left to wait."""
        for stream in streams:
            self._reset(stream)
        self._io.guarded(self._feed)

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io

    def unplug(self) -> None:
        self._drop_all()
        self._slot.remove_reader(self._epoll.fileno())
        self._epoll.close()
        os.close(self._spare)
        self._listener.close()
        os.unlink(self.options.uds)

    def config(self) -> bytes:
        return struct.pack("<Q", self.options.cid)

    def stop(self) -> None:
        self._drop_all()

    def start(self) -> None:
        if self._lost:
            self._lost = False
            self._io.guarded(self._tell_lost)

    def pause(self) -> None:
        self._slot.remove_reader(self._epoll.fileno())

    def resume(self) -> None:
        self._slot.add_reader(self._epoll.fileno(), self._ready)

    def _tell_lost(self) -> None:
        ring = self._io.rings[EVENT]
        request = None if ring is None else ring.pop()
        if request is not None:
            request.done(request.write(bytes(4)))  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET

    def _drop_all(self) -> None:
        for stream in list(self.streams.values()):
            self._forget(stream)
        for caller, _ in self._callers.values():
            caller.close()
        self._callers.clear()
        self._control.clear()
        self._sending.clear()

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop((stream.local, stream.peer), None) is not None:
            self._by_fd.pop(stream.fd, None)
            stream.close()

    # the host's side

    def _ready(self) -> None:
        for fd, events in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._callers:
                self._greeted(fd)
            elif fd in self._by_fd:
                stream = self._by_fd[fd]
                if events & select.EPOLLOUT:
                    self._write_out(stream)
                if events & ~select.EPOLLOUT:
                    stream.readable = True
                    stream.hung_up |= bool(events & select.EPOLLHUP)
                    self._want(stream)
                if stream.fd in self._by_fd:
                    stream.watch(self._epoll)
        self._io.guarded(self._feed)

    def _accept(self) -> None:
        try:
            caller, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # else it is gone again
        caller.setblocking(False)
        if self._barred or len(self.streams) + len(self._callers) >= STREAMS_MAX:
            caller.close()
            return
        self._callers[caller.fileno()] = (caller, bytearray())
        self._epoll.register(caller, select.EPOLLIN)

    def _turn_away(self) -> None:
        """Out of descriptors: hang up on who calls, who else would have the loop look at him for ever."""
        os.close(self._spare)
        with suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = os.dup(self._listener.fileno())

    def _greeted(self, fd: int) -> None:
        """Read ``CONNECT PORT`` a byte at a time: what follows the line belongs to the stream."""
        caller, line = self._callers[fd]
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
        del self._callers[fd]
        word, _, port = bytes(line).rstrip().partition(b" ")
        right = line.endswith(b"\n") and word.upper() == b"CONNECT" and port.isdigit() and int(port) <= 0xFFFFFFFF
        if not right or not self._io.live:
            caller.close()
            return
        local, peer = self._free_port(int(port)), int(port)
        stream = Stream(caller, local, peer, greet=True)
        self._add(stream)
        self._send(stream, REQUEST)

    def _free_port(self, peer: int) -> int:
        while (self._next_port, peer) in self.streams:
            self._next_port = (self._next_port + 1) % (1 << 31) | 1 << 30
        port, self._next_port = self._next_port, (self._next_port + 1) % (1 << 31) | 1 << 30
        return port

    def _add(self, stream: Stream) -> None:
        self.streams[stream.local, stream.peer] = stream
        self._by_fd[stream.fd] = stream
        stream.watch(self._epoll)

    def _want(self, stream: Stream) -> None:
        if not stream.queued:
            stream.queued = True
            self._sending.append(stream)

    def _write_out(self, stream: Stream) -> None:
        alive = stream.write_out()
        if not alive:
            self._reset(stream)
        elif stream.update_due():
            self._send(stream, CREDIT_UPDATE)

    # towards the guest

    def _header(self, stream: Stream, op: int, length: int = 0, flags: int = 0) -> bytes:
        return Header(
            HOST_CID, self.options.cid, stream.local, stream.peer, length, STREAM, op, flags, BUFFER, stream.said()
        ).pack()

    def _send(self, stream: Stream, op: int, flags: int = 0) -> None:
        self._queue(self._header(stream, op, flags=flags))

    def _queue(self, packet: bytes) -> None:
        if len(self._control) >= PENDING_MAX:
            self._io.break_down(f"the driver left {PENDING_MAX} packets unread")
            self._control.clear()
        self._control.append(packet)

    def _reset(self, stream: Stream) -> None:
        self._send(stream, RST)
        self._forget(stream)

    def _feed(self) -> None:
        """Give the guest what waits, while it has buffers."""
        ring = self._io.rings[RX]
        if ring is None or not self._io.live:
            return
        ring.batching = True
        try:
            for _ in range(4 * ring.size):
                if not self._control and not self._sending:
                    return
                request = ring.pop()
                if request is None:
                    if not ring.rearm():
                        return
                    continue
                if request.writable_size < Header.SIZE:
                    request.done()
                elif self._control:
                    request.done(request.write(self._control.popleft()))
                else:
                    written = self._fill(self._sending[0], request)
                    if written:
                        request.done(written)
                    else:
                        ring.unpop(request)
            self._slot.call_soon(lambda: self._io.kick(RX))  # others get their turn
        finally:
            ring.batching = False
            ring.signal()

    def _fill(self, stream: Stream, request: Request) -> int:
        """One packet of *stream*'s data straight into the guest's buffer; 0 when it has none to give now."""
        size = min(stream.credit(), request.writable_size - Header.SIZE) if stream.open else 0
        got = stream.read_into(request.writable, Header.SIZE, size) if size > 0 and stream.readable else None
        if got:
            request.write(self._header(stream, RW, got))
            return Header.SIZE + got
        self._sending.popleft()
        stream.queued = False
        if got is not None:  # the host's program sends no more; once it hung up it does not read either
            stream.host_ended = True
            ended = 3 if stream.hung_up else 2
            if ended != stream.said_ended:
                stream.said_ended = ended
                self._send(stream, SHUTDOWN, ended)
        if stream.fd in self._by_fd:
            stream.watch(self._epoll)
        return 0

    # from the guest

    def notified(self, index: int) -> None:
        if index == TX:
            self._take()
        if index != EVENT:
            self._feed()

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
            self._slot.call_soon(lambda: self._io.kick(TX))
        finally:
            ring.batching = False
            ring.signal()

    def _packet(self, request: Request) -> None:
        header = Header.unpack(request.readable)
        if header is None or header.source_cid != self.options.cid:
            return  # a packet that says it is another's: dropped, as the specification has it
        stream = self.streams.get((header.destination_port, header.source_port))
        if header.destination_cid != HOST_CID or header.type != STREAM:
            self._refuse(header)
        elif header.op == REQUEST:
            self._connect(header)
        elif stream is None:
            if header.op != RST:
                self._refuse(header)
        else:
            stream.peer_says(header.credit, header.forwarded)
            self._continue(stream, header, request)

    def _refuse(self, header: Header) -> None:
        if header.op != RST:
            self._queue(header.answer(RST).pack())

    def _connect(self, header: Header) -> None:
        key = header.destination_port, header.source_port
        if key in self.streams or len(self.streams) >= STREAMS_MAX:
            self._refuse(header)
            return
        path = f"{self.options.uds}_{header.destination_port}"
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        stream = Stream(end, *key)
        try:
            stream.let_go = self._slot.ask("socket", f"unix:{path}", ("connect",), lambda: self._revoked(stream))
            end.connect(path)
        except (OSError, Denied):
            stream.close()
            self._refuse(header)
            return
        stream.open = True
        stream.peer_says(header.credit, header.forwarded)
        self._add(stream)
        self._send(stream, RESPONSE)

    def _revoked(self, stream: Stream) -> None:
        if self.streams.get((stream.local, stream.peer)) is stream:
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
            self._send(stream, CREDIT_UPDATE)
        elif header.op == RST:
            stream.write_out()
            self._forget(stream)
            return
        elif header.op not in (CREDIT_UPDATE, RW):
            self._reset(stream)
            return
        self._write_out(stream)
        if stream.fd in self._by_fd:
            self._want(stream)
            stream.watch(self._epoll)

    # state

    def save(self) -> VsockState:
        return VsockState()

    def load(self, state: VsockState) -> None:
        self._drop_all()
        self._lost = True


def _stale(path: str) -> bool:
    """Whether *path* is a socket that nobody listens at any more: left by a process that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return stat.S_ISSOCK(os.lstat(path).st_mode)
        except OSError:  # not there, not a socket, or busy: bind says what it is
            return False
    return False

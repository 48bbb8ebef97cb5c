"""The way to the guest: packets without data first, then the data of streams in turns."""

from __future__ import annotations

import select
from collections import deque
from typing import TYPE_CHECKING

from cardcage_virtio.vsock.stream import BUFFER, RST, Header, Stream

if TYPE_CHECKING:
    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["EVENT", "HOST_CID", "STREAM", "TowardsGuest"]

HOST_CID, STREAM = 2, 1
RX, EVENT = 0, 2
SHUTDOWN, RW, PENDING_MAX = 4, 5, 4096


class TowardsGuest:
    """The queue of one guest.

    Args:
        cid: the guest's. by_fd: its streams. epoll: what the device waits for.
    """

    def __init__(self, io: Virtio, slot: Slot, cid: int, by_fd: dict[int, Stream], epoll: select.epoll) -> None:
        self._io, self._slot, self._cid, self._by_fd, self._epoll = io, slot, cid, by_fd, epoll
        self.sending: deque[Stream] = deque()
        self.control: deque[bytes] = deque()

    def tell_lost(self) -> None:
        """All streams are gone: the machine was loaded from a snapshot."""
        ring = self._io.rings[EVENT]
        request = None if ring is None else ring.pop()
        if request is not None:
            request.done(request.write(bytes(4)))  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET

    def refuse(self, header: Header) -> None:
        """Answer a packet that belongs to no stream."""
        if header.op != RST:
            self.queue(header.answer(RST).pack())

    def clear(self) -> None:
        """Forget what waits."""
        self.control.clear()
        self.sending.clear()

    def want(self, stream: Stream) -> None:
        """*stream* has data."""
        if not stream.queued:
            stream.queued = True
            self.sending.append(stream)

    def _header(self, stream: Stream, op: int, length: int = 0, flags: int = 0) -> bytes:
        return Header(
            HOST_CID, self._cid, stream.local, stream.peer, length, STREAM, op, flags, BUFFER, stream.said()
        ).pack()

    def send(self, stream: Stream, op: int, flags: int = 0) -> None:
        """A packet without data."""
        self.queue(self._header(stream, op, flags=flags))

    def queue(self, packet: bytes) -> None:
        """A packet, as it is."""
        if len(self.control) >= PENDING_MAX:
            self._io.break_down(f"the driver left {PENDING_MAX} packets unread")
            self.control.clear()
        self.control.append(packet)

    def feed(self) -> None:
        """Give the guest what waits, while it has buffers."""
        ring = self._io.rings[RX]
        if ring is None or not self._io.live:
            return
        ring.batching = True
        try:
            for _ in range(4 * ring.size):
                if not self.control and not self.sending:
                    return
                request = ring.pop()
                if request is None:
                    if not ring.rearm():
                        return
                    continue
                if request.writable_size < Header.SIZE:
                    request.done()
                elif self.control:
                    request.done(request.write(self.control.popleft()))
                else:
                    written = self._fill(self.sending[0], request)
                    if written:
                        request.done(written)
                    else:
                        ring.unpop(request)
            self._slot.loop.call_soon(lambda: self._io.kick(RX))  # others get their turn
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
        self.sending.popleft()
        stream.queued = False
        if got is not None:  # the host's program sends no more; once it hung up it does not read either
            stream.host_ended = True
            ended = 3 if stream.hung_up else 2
            if ended != stream.said_ended:
                stream.said_ended = ended
                self.send(stream, SHUTDOWN, ended)
        if stream.fd in self._by_fd:
            stream.watch(self._epoll)
        return 0

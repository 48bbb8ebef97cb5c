"""The guest's TCP connections, ended here: each goes on as a socket to the gate (RFC 9293).

Between the guest's driver and this process nothing is lost or changes places but what one of them has no room for, so
this is the least that is TCP: what comes in order is taken, what does not is asked for again; what the guest does not
acknowledge in time is sent again. Memory is bounded by :data:`ROOM` each way.
"""

from __future__ import annotations

import secrets
import select
import socket
from typing import TYPE_CHECKING, Protocol

from cardcage_egress.answers import MTU
from cardcage_egress.packets import ACK, FIN, PSH, RST, SYN, Segment
from cardcage_egress.policy import OPENED

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Loop

__all__ = ["Connection", "Wire", "refusal"]

ROOM = 256 << 10
"""Bytes of a connection that wait, each way."""
SCALE = 3
"""Of the windows that the guest is told: :data:`ROOM` has more than 16 bits."""
SEGMENTS = 16
"""Segments sent in one turn of the loop, so that others get theirs."""
FIRST, LAST, TRIES = 1_000_000_000, 16_000_000_000, 8
"""Nanoseconds until something is sent again, at first and at most; and how often."""
WRAP = 0xFFFFFFFF


class Wire(Protocol):
    """The part of the network that a connection uses."""

    loop: Loop

    def emit(self, connection: Connection, segment: Segment, /) -> bool:
        """Give the guest a segment; False when it has no room."""

    def now(self) -> int:
        """Nanoseconds."""

    def over(self, connection: Connection, /) -> None:
        """It has ended."""


def refusal(segment: Segment) -> Segment:
    """The answer to a segment of no connection."""
    if segment.flags & ACK:
        return Segment(segment.target, segment.source, segment.ack, 0, RST, 0)
    length = len(segment.data) + bool(segment.flags & SYN) + bool(segment.flags & FIN)
    return Segment(segment.target, segment.source, 0, (segment.seq + length) & WRAP, RST | ACK, 0)


class Connection:
    """One connection of the guest, whose *way* is a socket to the gate. Used under the machine's lock.

    Args:
        address: that the guest calls. syn: its first segment. way: owned from now on; it does not block.
    """

    def __init__(self, wire: Wire, address: bytes, syn: Segment, way: socket.socket) -> None:
        self._wire, self._way = wire, way
        self.address, self.source, self.target = address, syn.source, syn.target
        self._mss = min(max(syn.mss or 536, 64), MTU - 40)
        self._scale = max(syn.scale, 0)
        self._scaled = SCALE if syn.scale >= 0 else 0
        self._window = syn.window
        self._expected = (syn.seq + 1) & WRAP
        self._first = self._acked = self._next = self._high = secrets.randbits(32)
        self._out, self._back = bytearray(), bytearray()
        self._opened = self._established = self._reading = self._closed = False
        self._guest_ended = self._gate_ended = self._owes = False
        self._end = -1  # the number behind the last, once that was sent
        self._again, self._tries, self._same = FIRST, 0, 0
        self._since = wire.now()
        self._poll: select.epoll | None = None
        self._watch(self._answered)

    # towards the guest

    def _say(self, flags: int, data: bytes = b"", seq: int | None = None, mss: int = 0, scale: int = -1) -> bool:
        room = ROOM - len(self._back)
        window = min(room if flags & SYN else room >> self._scaled, 65535)
        seq = self._next if seq is None else seq & WRAP
        segment = Segment(self.target, self.source, seq, self._expected, flags, window, data, mss, scale)
        return self._wire.emit(self, segment)

    def _acknowledge(self) -> None:
        self._owes = not self._say(ACK)

    def _answered(self) -> None:
        """The gate has said whether it may begin."""
        try:
            word = self._way.recv(1)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if word != OPENED:
            self.reset()
            return
        self._opened = True
        self._unwatch()
        self._greet()

    def _greet(self) -> None:
        scale = SCALE if self._scaled else -1
        self._say(SYN | ACK, seq=self._first, mss=MTU - 40, scale=scale)
        self._next = self._high = (self._first + 1) & WRAP
        self._since = self._wire.now()

    def pump(self) -> None:
        """Send what there is, as far as the guest has room."""
        if self._closed or not self._established:
            return
        if self._owes:
            self._acknowledge()
        for _ in range(SEGMENTS):
            sent = (self._next - self._acked) & WRAP
            if sent >= len(self._out) and not self._fill():
                break
            left, room = len(self._out) - sent, self._window - sent
            if left <= 0 or room <= 0:
                break
            data = bytes(self._out[sent : sent + min(self._mss, left, room)])
            if not self._say(ACK | PSH, data):
                self._unwatch()  # until it has
                return
            self._went(len(data))
        sent = (self._next - self._acked) & WRAP
        if self._gate_ended and self._next != self._end and sent == len(self._out) and self._say(ACK | FIN):
            self._went(1)
            self._end = self._next
        if self._gate_ended or len(self._out) >= ROOM or (self._out and self._window <= sent):
            self._unwatch()
        else:
            self._watch(self.pump)

    def _went(self, count: int) -> None:
        if self._next == self._acked:
            self._since = self._wire.now()
        self._next = (self._next + count) & WRAP
        if (self._next - self._acked) & WRAP > (self._high - self._acked) & WRAP:
            self._high = self._next

    def _fill(self) -> bool:
        """Take more from the gate; False when there is none now."""
        if self._gate_ended or len(self._out) >= ROOM:
            return False
        try:
            data = self._way.recv(min(MTU - 40, ROOM - len(self._out)))
        except BlockingIOError:
            return False
        except OSError:
            self.reset()
            return False
        self._out += data
        self._gate_ended = not data
        return bool(data)

    # from the guest

    def heard(self, segment: Segment) -> None:
        """Take a segment of the guest's."""
        flags = segment.flags
        if flags & RST:
            if (segment.seq - self._expected) & WRAP <= ROOM:
                self.close()
            return
        if flags & SYN:
            if self._opened and not self._established:
                self._greet()
            elif self._established:
                self._acknowledge()
            return
        if not flags & ACK or not self._opened:
            return
        if not self._acknowledged(segment):
            return
        self._take(segment)
        self.pump()
        self._finish()

    def _acknowledged(self, segment: Segment) -> bool:
        """Forget what the guest has; False for a segment that is none of this connection's."""
        count = (segment.ack - self._acked) & WRAP
        if count > (self._high - self._acked) & WRAP:
            if count <= WRAP // 2:  # of what was never sent; else it is an old one
                self._acknowledge()
                return False
            count = 0
        window = segment.window << self._scale
        if count:
            if not self._established:
                self._established = True
                self._acked = (self._acked + 1) & WRAP
                count -= 1
            del self._out[:count]  # one more is acknowledged at the end
            self._acked = segment.ack
            if (self._next - self._acked) & WRAP > WRAP // 2:
                self._next = self._acked
            self._again, self._tries, self._same, self._since = FIRST, 0, 0, self._wire.now()
        elif self._next != self._acked and not segment.data and window == self._window:
            self._same += 1
            if self._same == 3 and self._out:
                self._say(ACK | PSH, bytes(self._out[: self._mss]), seq=self._acked)
        self._window = window
        return True

    def _take(self, segment: Segment) -> None:
        data, ahead = segment.data, (segment.seq - self._expected) & WRAP
        ends = bool(segment.flags & FIN)
        if not data and not ends:
            if ahead and ahead > WRAP // 2:  # a question whether we are there
                self._acknowledge()
            return
        if ahead > WRAP // 2:  # it begins with what is here already
            behind = -ahead & WRAP
            if behind > len(data):
                self._acknowledge()
                return
            data, ahead = data[behind:], 0
        if ahead or self._guest_ended:
            self._acknowledge()
            return
        taken = data[: ROOM - len(self._back)]
        self._expected = (self._expected + len(taken)) & WRAP
        if taken:
            self._forward(taken)
        if ends and len(taken) == len(data) and not self._closed:
            self._expected = (self._expected + 1) & WRAP
            self._guest_ended = True
            self._end_way()
        if not self._closed:
            self._acknowledge()

    # towards the gate

    def _forward(self, data: bytes) -> None:
        if not self._back:
            try:
                data = data[self._way.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                self.reset()
                return
        if data:
            self._back += data
            if self._poll is None:  # a descriptor that is readable when the socket is writable
                self._poll = select.epoll()
                self._poll.register(self._way.fileno(), select.EPOLLOUT)
                self._wire.loop.add_reader(self._poll.fileno(), self._writable)

    def _writable(self) -> None:
        low = len(self._back) > ROOM // 2
        try:
            del self._back[: self._way.send(self._back)]
        except BlockingIOError:
            return
        except OSError:
            self.reset()
            return
        if low and len(self._back) <= ROOM // 2:
            self._acknowledge()  # of the new window
        if not self._back:
            self._end_poll()
            self._end_way()
            self._finish()

    def _finish(self) -> None:
        """End it, where both sides have."""
        if self._guest_ended and self._acked == self._end and not self._back:
            self.close()

    def _end_way(self) -> None:
        if self._guest_ended and not self._back:
            try:
                self._way.shutdown(socket.SHUT_WR)
            except OSError:
                self.reset()

    # time, and the end

    @property
    def waits(self) -> bool:
        """True while the guest owes something."""
        return self._opened and (self._next != self._acked or bool(self._out))

    def tick(self) -> None:
        """Send again what was not acknowledged in time."""
        if not self.waits or self._wire.now() - self._since < self._again:
            return
        self._tries += 1
        if self._tries > TRIES:
            self.reset()
            return
        self._again, self._since, self._same = min(self._again * 2, LAST), self._wire.now(), 0
        if not self._established:
            self._greet()
        elif self._next == self._acked and not self._window:
            self._tries = 0
            self._say(ACK, seq=self._acked - 1)  # which it answers, with its window
        else:
            self._next = self._acked
            self.pump()

    def reset(self) -> None:
        """End it, and tell the guest."""
        if not self._closed:
            self._say(RST | ACK)
            self.close()

    def close(self) -> None:
        """End it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._unwatch()
            self._end_poll()
            self._way.close()
            self._out, self._back = bytearray(), bytearray()
            self._wire.over(self)

    def _watch(self, act: Callable[[], None]) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._wire.loop.add_reader(self._way.fileno(), act)

    def _unwatch(self) -> None:
        if self._reading:
            self._reading = False
            self._wire.loop.remove_reader(self._way.fileno())

    def _end_poll(self) -> None:
        if self._poll is not None:
            self._wire.loop.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = None

"""Frames over a stream socket: each behind its length in four bytes, big-endian (QEMU's and passt's way)."""

from __future__ import annotations

import select
import socket
from struct import Struct
from typing import TYPE_CHECKING, Protocol

from cardcage_net.inbox import FRAME_MAX, FRAME_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

__all__ = ["Events", "FrameStream"]

BACKLOG = 1 << 20
"""Bytes that wait for a slow peer; frames beyond are dropped, as a network does."""
AT_ONCE = 256 << 10
_LENGTH = Struct(">I")


class Events(Protocol):
    """What a stream needs of a slot, or of the switch's own thread."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None: ...

    def remove_reader(self, fd: int, /) -> None: ...


class FrameStream:
    """One connected socket. Not thread-safe: used under the lock that *events*' callbacks run under.

    Args:
        events: who watches descriptors.
        connection: the socket, owned from now on.
        deliver: called with each frame; False pauses until :meth:`go_on`, and the frame counts as taken.
        lost: called once, with the reason, when the peer went away or broke the rules; the stream is closed by then.
    """

    def __init__(
        self,
        events: Events,
        connection: socket.socket,
        deliver: Callable[[bytes], bool],
        lost: Callable[[str], None],
    ) -> None:
        self._events, self._socket, self._deliver, self._lost = events, connection, deliver, lost
        connection.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, BACKLOG)
        self._in = bytearray()
        self._out = bytearray()
        self._room = memoryview(bytearray(AT_ONCE))
        self._poll: select.epoll | None = None
        self._paused = self._reading = False
        self.dropped = 0

    def start(self) -> None:
        """Begin to read."""
        if not self._reading and self._socket.fileno() >= 0:
            self._reading = True
            self._events.add_reader(self._socket.fileno(), self._readable)

    def pause(self) -> None:
        """Read no more until :meth:`go_on`."""
        self._paused = True
        if self._reading:
            self._reading = False
            self._events.remove_reader(self._socket.fileno())

    def go_on(self) -> None:
        """Deliver what is here, and read again."""
        self._paused = False
        self._parse()
        if not self._paused:
            self.start()

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        if not count:
            self._fail("the peer closed the connection")
            return
        self._in += self._room[:count]
        self._parse()

    def _parse(self) -> None:
        data, at = self._in, 0
        end = len(data)
        while end - at >= 4 and not self._paused:
            (length,) = _LENGTH.unpack_from(data, at)
            if not FRAME_MIN <= length <= FRAME_MAX:
                del data[:]
                self._fail(f"the peer sent a frame of {length} bytes")
                return
            if end - at - 4 < length:
                break
            frame = bytes(data[at + 4 : at + 4 + length])
            at += 4 + length
            if not self._deliver(frame) and not self._paused:
                self.pause()
            if data is not self._in:  # closed by what the frame led to
                return
        del data[:at]

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame, or drop it when the peer is too slow."""
        length = sum(len(memoryview(part)) for part in parts)
        if self._socket.fileno() < 0:
            return
        if self._out:
            if len(self._out) + length + 4 > BACKLOG:
                self.dropped += 1
                return
            self._out += _LENGTH.pack(length)
            for part in parts:
                self._out += part
            return
        if len(parts) > 512:
            parts = [b"".join(parts)]
        try:
            sent = self._socket.sendmsg([_LENGTH.pack(length), *parts])
        except (BlockingIOError, InterruptedError):
            self.dropped += 1  # nothing of it went out, so that it can be dropped whole
            return
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        if sent < length + 4:
            self._out += (_LENGTH.pack(length) + b"".join(parts))[sent:]
            # A descriptor that is readable when the socket is writable: slots watch for reading only.
            self._poll = select.epoll()
            self._poll.register(self._socket.fileno(), select.EPOLLOUT)
            self._events.add_reader(self._poll.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            sent = self._socket.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(error.strerror or str(error))
            return
        del self._out[:sent]
        if not self._out:
            self._end_poll()

    def _end_poll(self) -> None:
        if self._poll is not None:
            self._events.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = None

    def _fail(self, reason: str) -> None:
        if self._socket.fileno() >= 0:
            self.close()
            self._lost(reason)

    def close(self) -> None:
        """Idempotent; *lost* is not called."""
        if self._socket.fileno() < 0:
            return
        self._end_poll()
        if self._reading:
            self._reading = False
            self._events.remove_reader(self._socket.fileno())
        self._socket.close()
        self._in, self._out = bytearray(), bytearray()

"""Frames over a stream socket: each behind its length in four bytes, big-endian (QEMU's and passt's way)."""

from __future__ import annotations

import select
import socket
from mmap import mmap
from struct import Struct
from typing import TYPE_CHECKING, Protocol

from cardcage_net.inbox import FRAME_MAX, FRAME_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

__all__ = ["BACKLOG", "Events", "FrameStream", "enlarge"]

BACKLOG = 4 << 20
"""Bytes that wait for a slow peer; frames beyond are dropped, as a network does."""
ROOM = 8 << 20
"""Bytes read ahead of the guest, or half of it: passt sends what TCP's window allows, drops what nobody takes from it,
and sends all of the window again for each duplicate acknowledgement that follows."""
AT_ONCE = 256 << 10
ROUND = 64
"""Frames delivered in one turn of the loop, so that others get theirs and the socket is emptied in between."""
_LENGTH = Struct(">I")


SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


def enlarge(connection: socket.socket) -> None:
    """Give *connection* room for :data:`BACKLOG` bytes each way, or what ``net.core.wmem_max`` lets users have."""
    for option, force in ((socket.SO_SNDBUF, SO_SNDBUFFORCE), (socket.SO_RCVBUF, SO_RCVBUFFORCE)):
        try:
            connection.setsockopt(socket.SOL_SOCKET, force, BACKLOG)
        except PermissionError:
            connection.setsockopt(socket.SOL_SOCKET, option, BACKLOG)


class Events(Protocol):
    """The part of a slot, or of the switch's own thread, that a stream uses."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None: ...

    def remove_reader(self, fd: int, /) -> None: ...

    def call_soon(self, callback: Callable[[], None], /) -> None: ...


class FrameStream:
    """One connected socket. Not thread-safe: used under the lock that *events*' callbacks run under.

    Args:
        events: who watches descriptors.
        connection: the socket, owned from now on.
        deliver: called with each frame, which is there until it returns; False pauses until :meth:`go_on`, and the
            frame counts as taken.
        lost: called once, with the reason, when the peer went away or broke the rules; the stream is closed by then.
    """

    def __init__(
        self,
        events: Events,
        connection: socket.socket,
        deliver: Callable[[memoryview], bool],
        lost: Callable[[str], None],
    ) -> None:
        self._events, self._socket, self._deliver, self._lost = events, connection, deliver, lost
        connection.setblocking(False)
        enlarge(connection)
        self._room = memoryview(mmap(-1, ROOM))  # of which the host gives what was used
        self._begin = self._end = 0
        self._ended = ""
        self._out = bytearray()
        self._poll: select.epoll | None = None
        self._paused = self._reading = self._again = False
        self.dropped = 0

    def start(self) -> None:
        """Begin to read."""
        if not self._reading and not self._ended and self._socket.fileno() >= 0:
            self._reading = True
            self._events.add_reader(self._socket.fileno(), self._readable)

    def _stop(self) -> None:
        if self._reading:
            self._reading = False
            self._events.remove_reader(self._socket.fileno())

    def pause(self) -> None:
        """Deliver nothing until :meth:`go_on`."""
        self._paused = True

    def go_on(self) -> None:
        """Deliver what is here, and read again."""
        self._paused = False
        self._more()

    def _more(self) -> None:
        self._again = False
        if self._reading:
            self._fill()
        self._parse()

    def _readable(self) -> None:
        self._fill()
        if not self._again:
            self._parse()

    def _fill(self) -> None:
        """Take what the socket holds, as far as there is room."""
        room = self._room
        while self._has_room():
            try:
                taken = self._socket.recv_into(room[self._end :], AT_ONCE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._ended = error.strerror or str(error)
                break
            if not taken:
                self._ended = "the peer closed the connection"
                break
            self._end += taken
            if taken < AT_ONCE:
                return
        self._stop()

    def _has_room(self) -> bool:
        begin, end, room = self._begin, self._end, self._room
        if begin == end:
            self._begin = self._end = 0
        elif end + AT_ONCE > ROOM and begin >= ROOM // 2:  # so that each byte is moved once at most
            room[: end - begin] = room[begin:end]
            self._begin, self._end = 0, end - begin
        return self._end + AT_ONCE <= ROOM

    def _parse(self) -> None:
        room, deliver, unpack = self._room, self._deliver, _LENGTH.unpack_from
        for _ in range(ROUND):
            if self._paused or self._socket.fileno() < 0:
                return
            at = self._begin + 4
            if at > self._end:
                break
            (length,) = unpack(room, at - 4)
            if not FRAME_MIN <= length <= FRAME_MAX:
                self._ended = f"the peer sent a frame of {length} bytes"
                break
            if at + length > self._end:
                break
            self._begin = at + length
            if not deliver(room[at : at + length]):
                self.pause()
        else:
            if not self._again:
                self._again = True
                self._events.call_soon(self._more)
            return
        if self._ended:
            self._fail(self._ended)
        else:
            self.start()

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
            sent = 0
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
        self._stop()
        self._socket.close()
        self._out = bytearray()

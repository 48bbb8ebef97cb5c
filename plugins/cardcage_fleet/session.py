"""Sessions with a running machine: a request that goes on as a conversation, in frames both ways.

The request is a line of JSON as any other (:mod:`cardcage_fleet.control`), and so is its answer; behind an answer
without ``error``, both sides speak in frames: kind (1 byte), stream (1), 2 bytes of zero, size (4, little-endian), and
that many bytes. The last frame of the machine is ``RESULT`` or ``ERROR``, with JSON as the answer to a command has it.

Whoever calls is held to that: a frame is at most :data:`FRAME` bytes, one that breaks the form ends the session, and
nothing is kept for a caller that does not read, since the session's own thread waits for it.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cardcage.errors import CardcageError, HostError

from cardcage_fleet.control import ANSWER, SUFFIX, raised
from cardcage_fleet.roster import connected, load

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

    from cardcage_fleet.roster import RosterEntry

__all__ = ["FRAME", "Conversation", "Frame", "Kind", "Session", "converse"]

FRAME = 1 << 16
"""Bytes that a frame carries at most."""
HEAD = struct.Struct("<BBHI")


class Kind(IntEnum):
    """The kinds of frames."""

    DATA = 1
    """Bytes of a stream."""
    END = 2
    """A stream has no more bytes."""
    RESIZE = 3
    """The caller's terminal has another size: rows and columns, each 2 bytes, little-endian."""
    SIGNAL = 4
    """A signal for what runs: its number, 1 byte."""
    RESULT = 5
    """The end: a table."""
    ERROR = 6
    """The end by an error: ``class`` and ``desc``."""
    CREDIT = 7
    """So many more bytes of a stream may be sent: 4 bytes, little-endian."""


KINDS = frozenset(int(one) for one in Kind)


class Frame(NamedTuple):
    """One frame."""

    kind: Kind
    stream: int
    data: bytes


class _Peer:
    """Frames on a socket that blocks. Sending is for any thread, receiving for one."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer, self._lock = peer, threading.Lock()

    def send(self, kind: Kind, data: bytes = b"", stream: int = 0) -> None:
        """Send *data*, in as many frames as it takes. Raises OSError once nobody is there."""
        view = memoryview(data)
        for at in range(0, max(len(view), 1), FRAME):
            part = view[at : at + FRAME]
            with self._lock:
                self._peer.sendall(HEAD.pack(kind, stream, 0, len(part)) + part)

    def receive(self) -> Frame | None:
        """The next frame; None at the end, or for what is no frame."""
        head = self._exactly(HEAD.size)
        if head is None:
            return None
        kind, stream, zero, size = HEAD.unpack(head)
        if zero or size > FRAME or kind not in KINDS:
            return None
        data = self._exactly(size)
        return None if data is None else Frame(Kind(kind), stream, data)

    def _exactly(self, size: int) -> bytes | None:
        found = bytearray()
        while len(found) < size:
            try:
                part = self._peer.recv(size - len(found))
            except OSError:
                return None
            if not part:
                return None
            found += part
        return bytes(found)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._peer.fileno()

    def hang_up(self) -> None:
        """Nothing more is heard from the other side."""
        with suppress(OSError):  # it went away first
            self._peer.shutdown(2)


class Session(_Peer):
    """The machine's end, which a :class:`~cardcage_fleet.SessionOffer` is given. It begins with :meth:`begin`.

    Attributes:
        fds: descriptors that the caller sent with its request; what is left is closed at the end.
    """

    def __init__(self, peer: socket.socket) -> None:
        super().__init__(peer)
        self.begun = False
        self.fds: list[int] = []
        self._listener: threading.Thread | None = None

    def begin(self, **told: Any) -> None:
        """Answer the request; frames follow. Raises OSError."""
        self._peer.settimeout(None)
        self._peer.sendall(json.dumps({"return": told}).encode() + b"\n")
        self.begun = True

    def listen(self, heard: Callable[[Frame], object], ended: Callable[[], object]) -> None:
        """Call *heard* with each frame of the caller's, then *ended* once: on a thread of its own, which must not wait.

        What *heard* raises ends the session.
        """

        def listening() -> None:
            try:
                while (frame := self.receive()) is not None:
                    heard(frame)
            except (OSError, ValueError, CardcageError):  # a caller's mistake, or the end of what it speaks to
                self.hang_up()
            finally:
                ended()

        self._listener = threading.Thread(target=listening, name="session")
        self._listener.start()

    def close(self) -> None:
        """Hang up, and wait for the listener."""
        self.hang_up()
        while self.fds:
            os.close(self.fds.pop())
        if self._listener is not None:
            self._listener.join()

    def answer(self, answer: dict[str, Any]) -> None:
        """The end: ``{"return": ...}`` or ``{"error": ...}``, as a line before it has begun, else as a frame."""
        if not self.begun:
            self._peer.sendall(json.dumps(answer).encode() + b"\n")
        else:
            ((key, value),) = answer.items()
            data = json.dumps(value).encode()
            if len(data) > FRAME:
                key, data = "error", json.dumps({"class": "CardError", "desc": "a result longer than a frame"}).encode()
            self.send(Kind.RESULT if key == "return" else Kind.ERROR, data)


class Conversation(_Peer):
    """The caller's end.

    Attributes:
        told: what the machine answered the request with.
    """

    def __init__(self, peer: socket.socket, entry: RosterEntry, request: bytes, fds: Sequence[int] = ()) -> None:
        super().__init__(peer)
        self._entry = entry
        if fds:
            send_fds(peer, request[:1], fds)
            request = request[1:]
        peer.sendall(request)
        line = bytearray()
        while not line.endswith(b"\n"):
            part = peer.recv(1)  # not a byte of the frames behind it
            line += part
            if not part or len(line) > ANSWER:
                raise HostError(f"machine {entry.name} (pid {entry.pid}) hung up")
        self.told = raised(load(bytes(line)), entry)
        peer.settimeout(None)

    def result(self, frame: Frame | None) -> dict[str, Any]:
        """The table of the last frame. Raises what went wrong there, HostError where the machine hung up."""
        if frame is None:
            raise HostError(f"machine {self._entry.name} (pid {self._entry.pid}) hung up")
        try:
            table = load(frame.data)
        except ValueError as error:
            raise HostError(f"machine {self._entry.name} ended the session by no table: {error}") from error
        return raised({"return": table} if frame.kind is Kind.RESULT else {"error": table}, self._entry)


def send_fds(peer: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send *data* with descriptors. Raises OSError."""
    import socket

    socket.send_fds(peer, [data], list(fds))


@contextmanager
def converse(
    entry: RosterEntry, name: str, arguments: dict[str, Any], timeout: float = 120, fds: Sequence[int] = ()
) -> Iterator[Conversation]:
    """A session *name* with a machine. Raises what it raised there, HostError when the machine does not answer.

    Args:
        timeout: seconds until it has answered the request.
        fds: descriptors for it, up to 64, by which a machine in its jail gets files that its caller opened.
    """
    request = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
    try:
        peer = connected(Path(entry.file).with_suffix(SUFFIX), timeout)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise HostError(f"machine {entry.name} (pid {entry.pid}) takes no command: {why}") from error
    with peer:
        try:
            made = Conversation(peer, entry, request, fds)
        except (OSError, ValueError) as error:
            raise HostError(f"machine {entry.name} (pid {entry.pid}) takes no command: {error}") from error
        yield made

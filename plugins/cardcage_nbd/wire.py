"""The NBD protocol on one connection, the client's side (the NetworkBlockDevice project's doc/proto.md).

Fixed newstyle negotiation, with structured replies where the server has them. A server is a peer like any other: each
length, offset and handle is checked, and one that breaks the protocol loses its connection by :exc:`BrokenServer`.
"""

from __future__ import annotations

import errno
import select
import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, NamedTuple

from cardcage.values import frozen

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

__all__ = ["BrokenServer", "Chunk", "Export", "Flag", "Kind", "RefusedExport", "Wire"]

NBDMAGIC, IHAVEOPT, OLD_STYLE = b"NBDMAGIC", b"IHAVEOPT", 0x00420281861253
OPTION_REPLY, REQUEST, SIMPLE, STRUCTURED = 0x3E889045565A9, 0x25609513, 0x67446698, 0x668E33EF
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, GO, STRUCTURED_REPLY = 1, 2, 7, 8
ACK, INFO, ERROR = 1, 3, 1 << 31
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
REASONS = {
    1: "it does not know the request",
    2: "it forbids it",
    3: "it found the request invalid",
    4: "it cannot on its platform",
    5: "it wants TLS, which this client has not",
    6: "it has no such export",
    7: "it is shutting down",
    8: "it wants other block sizes",
}
ANSWER_MAX = 1 << 16
"""Bytes of one answer to an option."""
OPTIONS_MAX = 64
"""Answers to one option."""
DONE = 1
"""Flag of a structured reply's last chunk."""
LARGEST = 32 << 20
"""Bytes of one request, where the server states no limit."""
ERRORS = {1, 5, 12, 22, 28, 75, 95, 108}
"""Numbers that the protocol has; Linux has the same."""


class Flag(IntFlag):
    """Transmission flags of an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    FLUSH = 1 << 2
    FUA = 1 << 3
    TRIM = 1 << 5
    WRITE_ZEROES = 1 << 6


class Kind(IntEnum):
    """Requests."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


NO_HOLE = 2
"""Request flag of WRITE_ZEROES: the range is not to be unmapped."""


class BrokenServer(OSError):
    """The server broke the protocol."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EPROTO, what)


class RefusedExport(OSError):
    """The server does not serve the export."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.ENODEV, why)


@frozen
class Export:
    """A server's disk.

    Attributes:
        size: bytes. flags: its abilities. least, largest: bytes of the smallest and of the largest request.
    """

    size: int
    flags: Flag
    least: int = 1
    largest: int = LARGEST


class Chunk(NamedTuple):
    """The head of a reply, or of a part of one.

    Attributes:
        handle: of the request. done: nothing more comes for it. error: a number of errno, 0 for none.
        offset: of data or a hole, absolute; of a simple reply, -1: the request's own. size: of data to be read by
            :meth:`Wire.fill`; negative for a hole of that many bytes.
        plain: a simple reply, behind which all data of a read come.
    """

    handle: int
    done: bool
    error: int = 0
    offset: int = -1
    size: int = 0
    plain: bool = False


class Wire:
    """One connection. Sending is for who holds the caller's lock, receiving for one thread."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._structured = False

    # bytes

    def _exactly(self, size: int) -> bytes:
        found = bytearray(size)
        self.fill([memoryview(found)])
        return bytes(found)

    def fill(self, buffers: Sequence[memoryview]) -> None:
        """Read into *buffers* until they are full. Raises OSError, TimeoutError for a silent server."""
        for one in buffers:
            left = memoryview(one).cast("B") if one.nbytes else one
            while left:
                got = self._peer.recv_into(left)
                if not got:
                    raise ConnectionResetError(errno.ECONNRESET, "the server hung up")
                left = left[got:]

    # negotiation

    def negotiate(self, name: str) -> Export:
        """Ask for export *name*. Raises RefusedExport, BrokenServer, OSError."""
        magic, second, flags = struct.unpack(">8s8sH", self._exactly(18))
        if magic != NBDMAGIC:
            raise BrokenServer("no NBD server: its greeting is another")
        if second != IHAVEOPT:
            old = int.from_bytes(second, "big") == OLD_STYLE
            raise BrokenServer("a server of the old style" if old else "no NBD server: its greeting is another")
        if not flags & FIXED_NEWSTYLE:
            raise BrokenServer("a server without fixed newstyle negotiation")
        self._peer.sendall(struct.pack(">I", flags & (FIXED_NEWSTYLE | NO_ZEROES)))
        self._structured = self._option(STRUCTURED_REPLY, b"")[0] == ACK
        encoded = name.encode()
        kind, found = self._option(
            GO, struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
        )
        if kind == ACK:
            return _export(found)
        if kind != ERROR | 1:
            text = (
                found[0].decode("utf-8", "replace")
                if found and found[0]
                else REASONS.get(kind & ~ERROR, f"error {kind:#x}")
            )
            raise RefusedExport("".join(one if one.isprintable() else "?" for one in text[:200]))
        self._peer.sendall(struct.pack(">8sII", IHAVEOPT, EXPORT_NAME, len(encoded)) + encoded)
        size, bits = struct.unpack(">QH", self._exactly(10 if flags & NO_ZEROES else 134)[:10])
        return Export(_sized(size), Flag(bits & 0x7F))

    def _option(self, option: int, data: bytes) -> tuple[int, list[bytes]]:
        """The last answer's kind, and the data of INFO answers before it, or of an error."""
        self._peer.sendall(struct.pack(">8sII", IHAVEOPT, option, len(data)) + data)
        found: list[bytes] = []
        for _ in range(OPTIONS_MAX):
            magic, about, kind, size = struct.unpack(">QIII", self._exactly(20))
            if magic != OPTION_REPLY or about != option or size > ANSWER_MAX:
                raise BrokenServer("an answer to no option")
            more = self._exactly(size)
            if kind & ERROR:
                return kind, [more]
            if kind == ACK:
                return kind, found
            if kind == INFO:
                found.append(more)
        raise BrokenServer("no end of answers to an option")

    # transmission

    def ready(self, timeout: float) -> bool:
        """Wait until something comes, or the server has gone; False after *timeout* seconds."""
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def request(self, kind: Kind, handle: int, offset: int, size: int, flags: int, data: Sequence[memoryview]) -> None:
        """Send a request, with the *data* of a write. Raises OSError."""
        head = struct.pack(">IHHQQI", REQUEST, flags, kind, handle, offset, size)
        left: list[memoryview] = [memoryview(head), *(one for one in data if one.nbytes)]
        while left:
            sent = self._peer.sendmsg(left[:64])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0].cast("B")[sent:]

    def reply(self) -> Chunk:
        """The head of the next reply. Raises OSError."""
        magic = struct.unpack(">I", self._exactly(4))[0]
        if magic == SIMPLE:
            error, handle = struct.unpack(">IQ", self._exactly(12))
            return Chunk(handle, True, _number(error), plain=True)
        if magic != STRUCTURED or not self._structured:
            raise BrokenServer("no reply")
        flags, kind, handle, size = struct.unpack(">HHQI", self._exactly(16))
        done = bool(flags & DONE)
        if kind == 0:
            if size or not done:
                raise BrokenServer("a part of a reply that says nothing")
            return Chunk(handle, True)
        if kind == 1:
            if size < 9 or size > LARGEST + 8:
                raise BrokenServer(f"data of {size} bytes")
            return Chunk(handle, done, 0, struct.unpack(">Q", self._exactly(8))[0], size - 8)
        if kind == 2:
            if size != 12:
                raise BrokenServer("a hole that is none")
            offset, hole = struct.unpack(">QI", self._exactly(12))
            return Chunk(handle, done, 0, offset, -hole)
        if kind & 0x8000 and 6 <= size <= ANSWER_MAX:
            error, length = struct.unpack(">IH", self._exactly(6))
            if length > size - 6:
                raise BrokenServer("an error longer than its reply")
            self._exactly(size - 6)
            return Chunk(handle, done, _number(error) or errno.EIO)
        raise BrokenServer(f"a reply of kind {kind}")


def _number(error: int) -> int:
    return error if error in ERRORS or not error else errno.EIO


def _sized(size: int) -> int:
    if size >= 1 << 62:
        raise BrokenServer(f"an export of {size} bytes")
    return size


def _export(found: list[bytes]) -> Export:
    size, bits, least, largest = -1, 0, 1, LARGEST
    for one in found:
        kind = int.from_bytes(one[:2], "big")
        if kind == INFO_EXPORT and len(one) == 12:
            size, bits = struct.unpack(">QH", one[2:])
        elif kind == INFO_BLOCK_SIZE and len(one) == 14:
            least, _, largest = struct.unpack(">III", one[2:])
    if size < 0:
        raise BrokenServer("an export without a size")
    if not 0 < least <= 1 << 16 or least & (least - 1) or largest < least:
        raise BrokenServer(f"block sizes {least} and {largest}")
    return Export(_sized(size), Flag(bits & 0x7F), least, min(largest - largest % least, LARGEST))

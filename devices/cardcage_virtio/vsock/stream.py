"""One vsock stream between a guest's port and a host socket: credit both ways, and bytes on their way to the host."""

from __future__ import annotations

import select
import struct
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

if TYPE_CHECKING:
    import socket

__all__ = ["BUFFER", "RST", "Header", "Stream"]

BUFFER = 1 << 18
"""Bytes that the guest may have under way to a host socket that does not read."""
RST = 3
LAYOUT = struct.Struct("<QQIIIHHIII")


@frozen
class Header:
    """The header of each packet (virtio 1.2, 5.10.6), fields in its order; ``credit`` is buf_alloc."""

    SIZE: ClassVar[int] = 44
    source_cid: int
    destination_cid: int
    source_port: int
    destination_port: int
    length: int
    type: int
    op: int
    flags: int = 0
    credit: int = 0
    forwarded: int = 0

    @classmethod
    def unpack(cls, parts: list[memoryview]) -> Header | None:
        """The header at the start of *parts*; None when that is too short or names more data than follows."""
        total = sum(map(len, parts))
        if total < cls.SIZE:
            return None
        start = parts[0] if len(parts[0]) >= cls.SIZE else b"".join(bytes(part[: cls.SIZE]) for part in parts[:44])
        if len(start) < cls.SIZE:
            return None
        header = cls(*LAYOUT.unpack_from(start))
        return header if header.length <= total - cls.SIZE else None

    def pack(self) -> bytes:
        return LAYOUT.pack(
            self.source_cid,
            self.destination_cid,
            self.source_port,
            self.destination_port,
            self.length,
            self.type,
            self.op,
            self.flags,
            self.credit,
            self.forwarded,
        )

    def answer(self, op: int) -> Header:
        """A packet without data to the sender of this packet."""
        return Header(
            self.destination_cid,
            self.source_cid,
            self.destination_port,
            self.source_port,
            0,
            self.type,
            op,
        )

    def payload(self, parts: list[memoryview]) -> list[memoryview]:
        """The data behind the header."""
        skip, left, found = self.SIZE, self.length, []
        for part in parts:
            piece = part[skip:][:left]
            skip = max(skip - len(part), 0)
            left -= len(piece)
            if len(piece):
                found.append(piece)
        return found


class Stream:
    """A stream.

    Args:
        end: the host's socket, not blocking. local, peer: ports of host and guest.
        greet: a host program waits for ``OK``.

    Attributes:
        called: a host program began it. let_go: what gives back the grant under which it was opened.
        open: both sides agreed. readable: the socket may have bytes. queued: in line for the guest's buffers.
        guest_ended: 1 the guest receives no more, 2 it sends no more. host_ended: the host's program sends no more.
        hung_up: it reads no more either. said_ended: what of that the guest was told.
    """

    def __init__(self, end: socket.socket, local: int, peer: int, *, greet: bool = False) -> None:
        self._end, self.fd, self.local, self.peer, self.greet = end, end.fileno(), local, peer, greet
        self.called, self.let_go = greet, _nothing
        self.open = self.readable = self.queued = self.host_ended = self.half = False
        self.hung_up = False
        self.guest_ended = self.said_ended = 0
        self.pending = bytearray()  # one piece: what a guest sends byte by byte would cost hundreds of times as much
        self._uncounted = 0
        self._taken = self._told = self._sent = 0
        self._peer_credit = self._peer_forwarded = 0

    # credit

    def credit(self) -> int:
        """Bytes that the guest has room for; below 1 for none."""
        return self._peer_credit - (self._sent - self._peer_forwarded & 0xFFFFFFFF)

    def peer_says(self, credit: int, forwarded: int) -> None:
        """The guest's buffer and how much it has taken out."""
        self._peer_credit, self._peer_forwarded = credit, forwarded

    def said(self) -> int:
        """Bytes taken from the guest so far, as each packet towards it says."""
        self._told = self._taken
        return self._taken & 0xFFFFFFFF

    def update_due(self) -> bool:
        """The guest may believe that there is little room left while there is."""
        return self._taken - self._told >= BUFFER // 4

    # bytes

    def read_into(self, views: list[memoryview], offset: int, size: int) -> int | None:
        """Receive up to *size* bytes at *offset* of *views*; 0 at the end of the stream, None when none are there."""
        targets = []
        for view in views:
            piece = view[offset:][:size]
            offset = max(offset - len(view), 0)
            size -= len(piece)
            if len(piece):
                targets.append(piece)
        try:
            got = self._end.recvmsg_into(targets)[0]
        except BlockingIOError:
            self.readable = False
            return None
        except OSError:  # the host's program died: its stream ends
            got = 0
        self._sent += got
        if not got:
            self.readable = False
        return got

    def push(self, parts: list[memoryview], *, counted: bool = True) -> bool:
        """Bytes for the host; False when that is more than the guest was allowed."""
        size = sum(map(len, parts))
        if counted and len(self.pending) + size > BUFFER:
            return False
        if not counted:
            self._uncounted += size
        if not self.pending:  # the usual case: straight from guest memory to the socket
            try:
                sent = self._end.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except OSError:  # write_out meets it again and ends the stream
                sent = 0
            self._count(sent)
            parts = _after(parts, sent)
        for part in parts:
            self.pending += part
        return True

    def _count(self, sent: int) -> None:
        free = min(sent, self._uncounted)
        self._uncounted -= free
        self._taken += sent - free

    def write_out(self) -> bool:
        """Write what waits; False when the stream is to end."""
        try:
            while self.pending:
                sent = self._end.send(self.pending)
                self._count(sent)
                del self.pending[:sent]
        except BlockingIOError:
            return True
        except OSError:
            return False
        if self.guest_ended == 3:
            return False
        if self.guest_ended & 2 and not self.half:
            self.half = True
            try:
                self._end.shutdown(1)
            except OSError:
                return False
        return True

    def watch(self, epoll: select.epoll) -> None:
        """Ask for what can be used now: room to write, and bytes while they can be passed on."""
        wanted = select.EPOLLOUT if self.pending else 0
        if self.open and not self.readable and not self.host_ended:
            wanted |= select.EPOLLIN
        wanted |= select.EPOLLONESHOT  # a peer that hung up must not wake us for ever
        try:
            epoll.modify(self.fd, wanted)
        except FileNotFoundError:
            epoll.register(self.fd, wanted)

    def close(self) -> None:
        self._end.close()
        self.let_go()


def _nothing() -> None:
    pass


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(sent - len(part), 0)
    return left

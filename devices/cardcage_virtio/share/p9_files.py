"""Open files, for the 9P server."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from cardcage_virtio.share import making
from cardcage_virtio.share.making import NOBODY
from cardcage_virtio.share.p9_tree import Listings, Node
from cardcage_virtio.share.p9_wire import Message, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.share.p9_xattr import Attribute

__all__ = ["Fid", "Files"]

HEAD, READ = 7, 116


class Fid:
    """The guest's holding by number: a node, and a descriptor once opened.

    Attributes:
        user: who attached, and is given what is made. attribute: an extended one, which is read or written instead.
    """

    __slots__ = ("__weakref__", "attribute", "fd", "flags", "node", "user")

    def __init__(self, node: Node, user: int = NOBODY) -> None:
        self.node, self.fd, self.flags, self.user = node, -1, -1, user
        self.attribute: Attribute | None = None

    def opened(self, fd: int, flags: int) -> None:
        self.close()
        self.fd, self.flags = fd, flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Files:
    """Calls about what is open.

    Args:
        fid: reads a fid's number from a message. Raises OSError EBADF when there is none.
        readonly: nothing is opened to be written.
    """

    def __init__(self, fid: Callable[[Message], Fid], listings: Listings, readonly: bool) -> None:
        self._fid, self._listings, self._readonly = fid, listings, readonly

    def lopen(self, message: Message) -> bytes:
        fid, flags = self._fid(message), message.number(4)
        if self._readonly and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise OSError(errno.EROFS, "read-only share")
        fid.opened(fid.node.open(flags), flags)
        return fid.node.qid() + bytes(4)

    def lcreate(self, message: Message) -> bytes:
        fid, name, flags, mode = self._fid(message), message.text(), message.number(4), message.number(4)
        fid.node, fd = making.create(fid.node, name, flags, mode, (fid.user, message.number(4)))
        fid.opened(fd, flags)
        return fid.node.qid() + bytes(4)

    def write(self, message: Message) -> bytes:
        fid, offset, count = self._fid(message), message.number(8), message.number(4)
        if fid.attribute is not None:
            return struct.pack("<I", fid.attribute.write(offset, message.take(count)))
        if fid.fd < 0:
            raise OSError(errno.EBADF, "not open")
        return struct.pack("<I", os.pwrite(fid.fd, message.take(count), offset))

    def fsync(self, message: Message) -> bytes:
        fid, data_only = self._fid(message), message.number(4)
        if fid.fd < 0:
            raise OSError(errno.EBADF, "not open")
        (os.fdatasync if data_only else os.fsync)(fid.fd)
        return b""

    def readdir(self, message: Message) -> bytes:
        fid, offset, count = self._fid(message), message.number(8), message.number(4)
        if fid.fd < 0:
            raise OSError(errno.EBADF, "not open")
        listing = self._listings.rows(fid, lambda: fid.node.entries(fid.fd), fresh=offset == 0)
        room, out = min(count, message.room - 4), bytearray()
        for at, (name, qid, kind) in enumerate(listing[offset : offset + 65536], offset + 1):
            row = qid + struct.pack("<QB", at, kind) + text(name)
            if len(out) + len(row) > room:
                break
            out += row
        return struct.pack("<I", len(out)) + bytes(out)

    def lock(self, message: Message) -> bytes:
        self._fid(message)  # locks between processes of the guest are kept by its own kernel
        return b"\0"

    def getlock(self, message: Message) -> bytes:
        self._fid(message)
        message.number(1)
        start, length, owner = message.number(8), message.number(8), message.number(4)
        return struct.pack("<BQQI", 2, start, length, owner) + text(message.text())

    def read(self, message: Message, request: Request, tag: int, room: int) -> int:
        fid, offset, count = self._fid(message), message.number(8), message.number(4)
        head = HEAD + 4
        count = min(count, room - head)
        if fid.attribute is not None and count >= 0:
            data = fid.attribute.read(offset, count)
            return request.write(struct.pack("<IBHI", head + len(data), READ + 1, tag, len(data)) + data)
        if fid.fd < 0 or count < 0:
            raise OSError(errno.EBADF, "not open")
        views: list[memoryview] = []
        skip, left = head, count
        for view in request.writable:
            piece = view[skip:][:left]
            left -= len(piece)
            skip = max(skip - len(view), 0)
            if len(piece):
                views.append(piece)
        got = os.preadv(fid.fd, views, offset) if views else 0
        request.write(struct.pack("<IBHI", head + got, READ + 1, tag, got))
        return head + got

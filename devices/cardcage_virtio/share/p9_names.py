"""Names and attributes, for the 9P server."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from cardcage_virtio.share import making
from cardcage_virtio.share.hostcalls import NOW, OMIT
from cardcage_virtio.share.p9_tree import Node
from cardcage_virtio.share.p9_wire import Message, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_virtio.share.p9_files import Fid

__all__ = ["Names"]

S_MODE, S_UID, S_GID, S_SIZE, S_ATIME, S_MTIME, S_ATIME_SET, S_MTIME_SET = 1, 2, 4, 8, 0x10, 0x20, 0x80, 0x100


class Names:
    """Calls that make, move and remove names, and those about attributes.

    Args:
        fid: reads a fid's number from a message. Raises OSError EBADF when there is none.
    """

    def __init__(self, fid: Callable[[Message], Fid]) -> None:
        self._fid = fid

    def symlink(self, message: Message) -> bytes:
        fid, name, target = self._fid(message), message.text(), message.text()
        return making.symlink(fid.node, name, target, (fid.user, message.number(4))).qid()

    def mknod(self, message: Message) -> bytes:
        fid, name, mode = self._fid(message), message.text(), message.number(4)
        device = message.number(4) << 32 | message.number(4)  # not as the host would write it: only 0:0 is made
        return making.mknod(fid.node, name, mode, device, (fid.user, message.number(4))).qid()

    def mkdir(self, message: Message) -> bytes:
        fid, name, mode = self._fid(message), message.text(), message.number(4)
        return making.mkdir(fid.node, name, mode, (fid.user, message.number(4))).qid()

    def link(self, message: Message) -> bytes:
        directory = self._fid(message)
        directory.node.link(self._fid(message).node, message.text())
        return b""

    def rename(self, message: Message) -> bytes:
        fid, to, name = self._fid(message), self._fid(message), message.text()
        parent, old = fid.node.place()
        parent.rename(old, to.node, name)
        above: Node | None = to.node
        while above is not None and above is not fid.node:
            above = above.parent
        if above is None:  # else *to* was walked to through it, and moved since: it keeps the way it was found by
            fid.node.parent, fid.node.name = to.node, name
        return b""

    def renameat(self, message: Message) -> bytes:
        old, name, new = self._fid(message), message.text(), self._fid(message)
        old.node.rename(name, new.node, message.text())
        return b""

    def unlinkat(self, message: Message) -> bytes:
        fid, name, flags = self._fid(message), message.text(), message.number(4)
        fid.node.unlink(name, directory=bool(flags & 0x200))
        return b""

    def readlink(self, message: Message) -> bytes:
        return text(self._fid(message).node.readlink())

    def statfs(self, message: Message) -> bytes:
        found = os.statvfs(self._fid(message).node.fd)
        return struct.pack(
            "<IIQQQQQQI",
            0x01021997,
            found.f_bsize,
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            0,
            min(found.f_namemax, 255),
        )

    def getattr(self, message: Message) -> bytes:
        node = self._fid(message).node
        found = node.stat()
        times: list[int] = []
        for moment in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns, 0):
            times += divmod(moment, 1_000_000_000)
        return (
            struct.pack("<Q", 0x7FF)
            + node.qid()
            + struct.pack("<III", found.st_mode, found.st_uid, found.st_gid)
            + struct.pack("<QQQQQ", found.st_nlink, found.st_rdev, found.st_size, found.st_blksize, found.st_blocks)
            + struct.pack("<8q", *times)
            + bytes(16)
        )

    def setattr(self, message: Message) -> bytes:
        fid = self._fid(message)
        node = fid.node
        valid, mode, user, group = (message.number(4) for _ in range(4))
        size, accessed, accessed_ns, modified, modified_ns = (message.number(8) for _ in range(5))
        if valid & S_MODE:
            node.chmod(mode)
        if valid & (S_UID | S_GID):
            node.chown(user if valid & S_UID else -1, group if valid & S_GID else -1)
        if valid & S_SIZE:
            if fid.fd >= 0 and fid.flags & os.O_ACCMODE:
                os.ftruncate(fid.fd, size)
            else:
                node.truncate(size)
        if valid & (S_ATIME | S_MTIME):
            node.utime(
                when(valid & S_ATIME, valid & S_ATIME_SET, accessed, accessed_ns),
                when(valid & S_MTIME, valid & S_MTIME_SET, modified, modified_ns),
            )
        return b""


def when(wanted: int, given: int, seconds: int, nanoseconds: int) -> tuple[int, int]:
    """A time to set: as given, the host's, or none."""
    if not wanted:
        return 0, OMIT
    return (seconds - (seconds >> 63 << 64), nanoseconds) if given else (0, NOW)

"""Open files and directories, for the FUSE server."""

from __future__ import annotations

import errno
import os
from struct import Struct
from typing import TYPE_CHECKING

from cardcage_virtio.share import fuse, making
from cardcage_virtio.share.fuse import IO, OUT_HEADER, Args, io_of, part
from cardcage_virtio.share.fuse_tree import Handle, Inode, WaitsError
from cardcage_virtio.share.hostcalls import fallocate
from cardcage_virtio.share.p9_tree import Listings, Node

if TYPE_CHECKING:
    from cardcage_virtio.queue.request import Request

from cardcage_virtio.share.fs_names import Names, opened

__all__ = ["Files"]

MOST = 1 << 20
U32, U32X2, U32X4 = Struct("<I"), Struct("<II"), Struct("<IIII")
U64, U64_U32X2, U64_U32X4 = Struct("<Q"), Struct("<QII"), Struct("<QIIQ")
GETATTR, LSEEK, FALLOCATE = Struct("<IIQ"), Struct("<QQII"), Struct("<QQQII")
COPY = Struct("<QQQQQQQ")
LASTING = ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_TMPFILE | os.O_APPEND)
OPENED = Struct("<QII")
QUICK_READ = 128 << 10


class Files:
    """Calls about what is open.

    Args:
        handles: by number; kept by the server. most: how many there may be. readonly: none is opened to be written.
    """

    def __init__(
        self, names: Names, handles: dict[int, Handle], listings: Listings, *, most: int, readonly: bool
    ) -> None:
        self._names, self.tree, self.handles, self._listings = names, names.tree, handles, listings
        self._most, self._readonly, self._next_handle = most, readonly, 1

    def handle(self, number: int) -> Handle:
        """An open file. Raises OSError EBADF when there is none."""
        return opened(self.tree, self.handles, number)

    def _check_room(self) -> None:
        if len(self.handles) >= self._most:
            raise OSError(errno.ENFILE, "too many open files")

    def _keep(self, handle: Handle) -> bytes:
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[number] = handle
        return OPENED.pack(number, 0, 0)

    def open(self, inode: Inode, flags: int) -> bytes:
        if self._readonly and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise OSError(errno.EROFS, "read-only share")
        node = self.tree.node(inode)
        if self.tree.quick and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise WaitsError
        self._check_room()
        try:
            fd = node.open(flags & ~os.O_APPEND)  # each write says whether it appends
        except PermissionError:
            if not flags & os.O_APPEND:
                raise
            fd = node.open(flags)  # a file that can only be appended to
        return self._keep(Handle(inode, fd, flags & LASTING))

    def create(self, parent: Inode, args: Args) -> bytes:
        flags, mode, _, _ = args.take(U32X4)
        name = args.name()
        self._check_room()
        made = making.create(self.tree.node(parent), name, flags & ~os.O_APPEND, mode, self._names.owner)
        return self._made(parent, name, flags, *made)

    def temporary(self, parent: Inode, args: Args) -> bytes:
        flags, mode, _, _ = args.take(U32X4)
        self._check_room()
        made = making.temporary(self.tree.node(parent), flags & ~os.O_APPEND, mode, self._names.owner)
        return self._made(parent, b"", flags, *made)

    def _made(self, parent: Inode, name: bytes, flags: int, node: Node, fd: int) -> bytes:
        try:
            inode = self.tree.adopt(parent, name, node)
            entry = self._names.entry(inode)
        except OSError:
            os.close(fd)
            raise
        return entry + self._keep(Handle(inode, fd, flags & LASTING))

    def release(self, inode: Inode, args: Args) -> bytes:
        number = args.take(U64_U32X4)[0]
        handle = self.handles.get(number)
        if handle is not None:
            if self.tree.quick and (handle.flags & os.O_ACCMODE or not os.fstat(handle.fd).st_nlink):
                raise WaitsError  # it may have to be written, or its blocks given back
            os.close(self.handles.pop(number).fd)
        return b""

    def fsync(self, inode: Inode, args: Args) -> bytes:
        number, data_only, _ = args.take(U64_U32X2)
        (os.fdatasync if data_only & 1 else os.fsync)(self.handle(number).fd)
        return b""

    def read(self, request: Request, head: bytes) -> int:
        number, offset, size, *_ = io_of(head)
        handle = self.handle(number)
        views = part(request.writable, OUT_HEADER.size, min(size, MOST))
        if not views:
            return 0
        if not self.tree.quick:
            return os.preadv(handle.fd, views, offset)
        wanted = sum(map(len, views))
        try:
            got = os.preadv(handle.fd, views, offset, os.RWF_NOWAIT) if wanted <= QUICK_READ else -1
        except OSError as error:
            raise WaitsError from error
        if got < wanted:  # the file ends here, or what is at hand does
            raise WaitsError
        return got

    def write(self, request: Request, head: bytes) -> bytes:
        number, offset, size, _, _, flags, _ = io_of(head)
        if size > request.readable_size - len(head):
            raise OSError(errno.EINVAL, "message cut short")
        views = part(request.readable, len(head), size)
        how = os.RWF_APPEND if flags & os.O_APPEND else 0
        how |= os.RWF_SYNC if flags & os.O_SYNC == os.O_SYNC else os.RWF_DSYNC if flags & os.O_DSYNC else 0
        return U32X2.pack(os.pwritev(self.handle(number).fd, views, offset, how) if views else 0, 0)

    def lseek(self, inode: Inode, args: Args) -> bytes:
        number, offset, whence, _ = args.take(LSEEK)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the guest's kernel knows its own positions")
        return U64.pack(os.lseek(self.handle(number).fd, offset, whence))

    def fallocate(self, inode: Inode, args: Args) -> bytes:
        number, offset, length, mode, _ = args.take(FALLOCATE)
        fallocate(self.handle(number).fd, mode, offset, length)
        return b""

    def copy(self, inode: Inode, args: Args) -> bytes:
        source, at, _, target, to, length, flags = args.take(COPY)
        if flags:
            raise OSError(errno.EINVAL, "no flags are known")
        most = min(length, 1 << 30)
        return U32X2.pack(os.copy_file_range(self.handle(source).fd, self.handle(target).fd, most, at, to), 0)

    def readdir(self, args: Args, room: int, *, plus: bool) -> bytes:
        number, offset, size, *_ = args.take(IO)
        handle = self.handle(number)
        node = self.tree.node(handle.inode)
        listing = self._listings.rows(handle, lambda: node.entries(handle.fd), fresh=offset == 0)
        room, out = min(size, room, MOST), bytearray()
        for at, (name, qid, kind) in enumerate(listing[offset : offset + 65536], offset + 1):
            ino = int.from_bytes(qid[5:], "little")
            row = fuse.DIRENT.pack(ino, at, len(name), kind) + name
            row += bytes(-len(row) % 8)
            if len(out) + len(row) + plus * (fuse.ENTRY.size + fuse.ATTR.size) > room:
                break
            out += (self._entry_of(handle.inode, name) if plus else b"") + row
        return bytes(out)

    def _entry_of(self, parent: Inode, name: bytes) -> bytes:
        """A row's inode; none for ``.``, ``..`` and what went meanwhile."""
        if name in (b".", b".."):
            return bytes(fuse.ENTRY.size + fuse.ATTR.size)
        try:
            return self._names.entry(self.tree.lookup(parent, name))
        except OSError:
            return bytes(fuse.ENTRY.size + fuse.ATTR.size)

    def restore(self, number: int, of: int, flags: int) -> None:
        """Open inode number *of* under the number its open file had. Raises OSError when it is gone."""
        self._next_handle = max(self._next_handle, number + 1)
        inode = self.tree.inode(of)
        self.handles[number] = Handle(inode, self.tree.node(inode).open(flags), flags)

"""Names and attributes, for the FUSE server."""

from __future__ import annotations

import errno
import os
import struct
from struct import Struct

from cardcage_virtio.share import fuse, making
from cardcage_virtio.share.fuse import Args, Set
from cardcage_virtio.share.fuse_tree import Handle, Inode, Tree, WaitsError
from cardcage_virtio.share.hostcalls import NOW, OMIT, RENAME_EXCHANGE
from cardcage_virtio.share.p9_tree import Node

__all__ = ["Names", "opened"]

U32, U32X2, U32X4 = Struct("<I"), Struct("<II"), Struct("<IIII")
U64, U64_U32X2, U64_U32X4 = Struct("<Q"), Struct("<QII"), Struct("<QIIQ")
SETATTR = Struct("<IIQQQqqqIIIIIIII")
GETATTR, LSEEK, FALLOCATE = Struct("<IIQ"), Struct("<QQII"), Struct("<QQQII")
STATFS = Struct("<5Q4I24x")


class Names:
    """Calls about inodes.

    Args:
        handles: open files, by number. valid: seconds that the guest may believe an answer.

    Attributes:
        owner: user and group who ask, and are given what is made.
    """

    def __init__(self, tree: Tree, handles: dict[int, Handle], valid: int) -> None:
        self.tree, self._handles, self._valid = tree, handles, valid
        self.owner = (0, 0)

    def attributes(self, inode: Inode) -> bytes:
        return struct.pack("<QII", self._valid, 0, 0) + fuse.attributes(self.tree.node(inode).stat())

    def getattr(self, inode: Inode, args: Args) -> bytes:
        flags, _, number = args.take(GETATTR)
        handle = self._handles.get(number) if flags & 1 else None
        if handle is None or handle.inode is not inode:
            return self.attributes(inode)
        # an open file may have no name any more by which its inode could be found again
        return struct.pack("<QII", self._valid, 0, 0) + fuse.attributes(os.fstat(handle.fd))

    def entry(self, inode: Inode) -> bytes:
        found = fuse.attributes(self.tree.node(inode).stat())
        return fuse.ENTRY.pack(inode.number, 0, self._valid, self._valid, 0, 0) + found

    def symlink(self, parent: Inode, args: Args) -> bytes:
        name, target = args.name(), args.name()
        return self._made(parent, name, making.symlink(self.tree.node(parent), name, target, self.owner))

    def mknod(self, parent: Inode, args: Args) -> bytes:
        mode, device, _, _ = args.take(U32X4)
        name = args.name()
        return self._made(parent, name, making.mknod(self.tree.node(parent), name, mode, device, self.owner))

    def mkdir(self, parent: Inode, args: Args) -> bytes:
        mode, name = args.take(U32X2)[0], args.name()
        return self._made(parent, name, making.mkdir(self.tree.node(parent), name, mode, self.owner))

    def _made(self, parent: Inode, name: bytes, node: Node) -> bytes:
        return self.entry(self.tree.adopt(parent, name, node))

    def unlink(self, parent: Inode, args: Args, *, directory: bool) -> bytes:
        self.tree.node(parent).unlink(args.name(), directory=directory)
        return b""

    def rename(self, parent: Inode, args: Args) -> bytes:
        return self._move(parent, args.take(U64)[0], args, 0)

    def rename2(self, parent: Inode, args: Args) -> bytes:
        to, flags, _ = args.take(U64_U32X2)
        return self._move(parent, to, args, flags)

    def _move(self, parent: Inode, number: int, args: Args, flags: int) -> bytes:
        to, name, new_name = self.tree.inode(number), args.name(), args.name()
        self.tree.node(parent).rename(name, self.tree.node(to), new_name, flags)
        self.tree.moved(to, new_name)
        if flags & RENAME_EXCHANGE:
            self.tree.moved(parent, name)
        return b""

    def link(self, parent: Inode, args: Args) -> bytes:
        inode, name = self.tree.inode(args.take(U64)[0]), args.name()
        self.tree.node(parent).link(self.tree.node(inode), name)
        return self.entry(self.tree.lookup(parent, name))

    def setattr(self, inode: Inode, args: Args) -> bytes:
        valid, _, fh, size, _, accessed, modified, _, accessed_ns, modified_ns, _, mode, _, user, group, _ = args.take(
            SETATTR
        )
        node = self.tree.node(inode)
        if valid & Set.MODE:
            node.chmod(mode)
        if valid & (Set.UID | Set.GID):
            node.chown(user if valid & Set.UID else -1, group if valid & Set.GID else -1)
        if valid & Set.SIZE:
            if valid & Set.FH:
                os.ftruncate(opened(self.tree, self._handles, fh).fd, size)
            else:
                node.truncate(size)
        if valid & (Set.ATIME | Set.MTIME):
            times = [(0, OMIT), (0, OMIT)]
            if valid & Set.ATIME:
                times[0] = (0, NOW) if valid & Set.ATIME_NOW else (accessed, accessed_ns)
            if valid & Set.MTIME:
                times[1] = (0, NOW) if valid & Set.MTIME_NOW else (modified, modified_ns)
            node.utime(*times)
        return self.attributes(inode)

    def statfs(self, inode: Inode, args: Args) -> bytes:
        found = os.statvfs(self.tree.node(inode).fd)
        blocks = found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree
        return STATFS.pack(*blocks, found.f_bsize, min(found.f_namemax, 255), found.f_frsize, 0)


def opened(tree: Tree, handles: dict[int, Handle], number: int) -> Handle:
    """An open file. Raises OSError EBADF when there is none, WaitsError when it may have to be waited for."""
    found = handles.get(number)
    if found is None:
        raise OSError(errno.EBADF, "no such handle")
    if tree.quick and found.inode.key[0] != tree.root.key[0]:
        raise WaitsError
    return found

"""File system device (virtio 1.2, section 5.11): a FUSE server for a host directory, inside the VMM.

Linux: ``mount -t virtiofs TAG /mnt``. The directory is confined as that of ``virtio-9p`` is; ``vhost-user-fs`` is the
same device served by virtiofsd.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import define, field, frozen
from attrs.validators import max_len, min_len
from cardcage.config import HostPath
from cardcage.errors import ConfigError
from cardcage.security import Needs

from cardcage_virtio.parking import ParksWorkers
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.queue.workers import Workers
from cardcage_virtio.share import fuse
from cardcage_virtio.share import xattr as fs_xattr
from cardcage_virtio.share.fs_files import MOST, Files
from cardcage_virtio.share.fs_names import Names
from cardcage_virtio.share.fuse import IN_HEADER, IO, OUT_HEADER, Args, Op, part
from cardcage_virtio.share.fuse_tree import ROOT, Handle, Inode, Tree, WaitsError
from cardcage_virtio.share.hostcalls import is_local, most_files
from cardcage_virtio.share.p9_tree import Listings, guests_errno, share_needs, shared_root

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Fs", "FsOptions", "FsState"]

PAGES = MOST >> 12
U32, U32X2, U32X4 = Struct("<I"), Struct("<II"), Struct("<IIII")
U64, U64_U32X2, U64_U32X4 = Struct("<Q"), Struct("<QII"), Struct("<QIIQ")
VALID = {"never": 0, "auto": 1, "always": 86400}
GIVING_UP = frozenset((Op.RELEASE, Op.RELEASEDIR, Op.DESTROY))  # served also while security bars the share
CHANGING = frozenset(
    {
        Op.SETATTR,
        Op.SYMLINK,
        Op.MKNOD,
        Op.MKDIR,
        Op.UNLINK,
        Op.RMDIR,
        Op.RENAME,
        Op.RENAME2,
        Op.LINK,
        Op.CREATE,
        Op.TMPFILE,
    }
    | {Op.WRITE, Op.COPY_FILE_RANGE, Op.FALLOCATE, Op.SETXATTR, Op.REMOVEXATTR}
)
QUICK = frozenset({Op.LOOKUP, Op.GETATTR, Op.OPEN, Op.READ, Op.FLUSH, Op.RELEASE})
"""Requests that may take no waiting: see :meth:`Fs._quick`."""


@frozen
class FsOptions:
    """Options of ``virtio-fs``.

    Attributes:
        path: host directory. tag: what the guest mounts it by, up to 36 bytes of UTF-8.
        readonly: the guest may change nothing.
        cache: how long the guest may believe names and attributes without asking: ``never``, ``auto`` (a second), or
            ``always``, for a directory that only the guest changes.
    """

    path: HostPath = field(validator=min_len(1))
    tag: str = field(default="share", validator=[min_len(1), max_len(36)])
    readonly: bool = False
    cache: Literal["never", "auto", "always"] = "auto"


@define
class FsState:
    """The guest's holdings: inodes (number, lookups, names from the root), and handles (number, inode, open flags)."""

    version: ClassVar[int] = 1
    inodes: list[tuple[int, int, list[bytes]]] = field(factory=list)
    handles: list[tuple[int, int, int]] = field(factory=list)


class Fs(ParksWorkers):
    """The server. Requests are served one after another, on a thread of their own if they may have to wait."""

    device_id = 26
    queue_sizes = (64, 512)
    class_code = 0x018000

    def __init__(self, options: FsOptions) -> None:
        self.options = options
        if len(options.tag.encode()) > 36:
            raise ConfigError(f"tag {options.tag}: expected at most 36 bytes of UTF-8", key="tag")
        self.tree: Tree
        self._barred, self._serving = False, Lock()
        self.handles: dict[int, Handle] = {}
        self._listings = Listings()
        self._most_handles = 0
        self._names: Names
        self._files: Files
        self._calls: dict[int, Callable[[Inode, Args], bytes]] = {}

    def plug(self, slot: Slot) -> None:
        self._slot, path, changes = slot, self.options.path, () if self.options.readonly else ("write", "create")

        def bar(barred: bool) -> Callable[[], None]:
            return lambda: setattr(self, "_barred", barred)

        readonly = self.options.readonly
        slot.host.ask("image", path, ("open", "read", *changes), bar(True), bar(False), readonly=readonly)
        self._most_handles = most_files() // 4
        self.tree = Tree(shared_root(path), self._most_handles)
        self._names = Names(self.tree, self.handles, VALID[self.options.cache])
        self._files = Files(
            self._names, self.handles, self._listings, most=self._most_handles, readonly=self.options.readonly
        )
        self._calls = self._table()

    def plug_virtio(self, io: Virtio) -> None:
        quick = self._quick if is_local(self.tree.node(self.tree.root).fd) else None
        self._workers = Workers(io, self._process, 1, self._slot.id, quick)

    def needs(self) -> Needs:
        """The directory, and root's rights over the owners and modes of what is in it."""
        return share_needs(self.options.path, readonly=self.options.readonly)

    def unplug(self) -> None:
        self._workers.close()
        self.stop()

    def config(self) -> bytes:
        return struct.pack("<36sI", self.options.tag.encode(), 1)

    def notified(self, index: int) -> None:
        self._workers.notify(index)

    def drain(self) -> None:
        self._workers.drain()

    def may_fork(self) -> str:
        """A directory that is only read may be two guests'; what each would write, the other does not know of."""
        return "" if self.options.readonly else "shares a directory that its guest may change, which two cannot have"

    def forked(self) -> None:
        """Open files are read by position; a directory's place in its listing would be the parent's too."""
        for handle in self.handles.values():
            if handle.inode.key[2] == stat.S_IFDIR:
                again = os.open(f"/proc/self/fd/{handle.fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                os.dup2(again, handle.fd, inheritable=False)
                os.close(again)

    def stop(self) -> None:
        for handle in self.handles.values():
            os.close(handle.fd)
        self.handles.clear()
        self.tree.clear()

    # messages

    def _table(self) -> dict[int, Callable[[Inode, Args], bytes]]:
        """Functions that serve each request about an inode."""
        tree, names, files = self.tree, self._names, self._files
        return {
            Op.LOOKUP: lambda inode, args: names.entry(tree.lookup(inode, args.name())),
            Op.GETATTR: names.getattr,
            Op.SETATTR: names.setattr,
            Op.READLINK: lambda inode, args: tree.node(inode).readlink(),
            Op.SYMLINK: names.symlink,
            Op.MKNOD: names.mknod,
            Op.MKDIR: names.mkdir,
            Op.UNLINK: lambda inode, args: names.unlink(inode, args, directory=False),
            Op.RMDIR: lambda inode, args: names.unlink(inode, args, directory=True),
            Op.RENAME: names.rename,
            Op.RENAME2: names.rename2,
            Op.LINK: names.link,
            Op.OPEN: lambda inode, args: files.open(inode, args.take(U32X2)[0]),
            Op.OPENDIR: lambda inode, args: files.open(inode, os.O_RDONLY | os.O_DIRECTORY),
            Op.CREATE: files.create,
            Op.TMPFILE: files.temporary,
            Op.RELEASE: files.release,
            Op.RELEASEDIR: files.release,
            Op.FLUSH: lambda inode, args: b"",  # writes are with the host's kernel when they are answered
            Op.FSYNC: files.fsync,
            Op.FSYNCDIR: files.fsync,
            Op.STATFS: names.statfs,
            Op.LSEEK: files.lseek,
            Op.COPY_FILE_RANGE: files.copy,
            Op.FALLOCATE: files.fallocate,
            Op.GETXATTR: lambda inode, args: fs_xattr.fuse_get(tree.node(inode), args),
            Op.LISTXATTR: lambda inode, args: fs_xattr.fuse_list(tree.node(inode), args),
            Op.SETXATTR: lambda inode, args: fs_xattr.fuse_set(tree.node(inode), args),
            Op.REMOVEXATTR: lambda inode, args: fs_xattr.fuse_remove(tree.node(inode), args),
        }

    def _process(self, request: Request) -> int:
        with self._serving:
            return self._serve(request)

    def _quick(self, request: Request) -> int | None:
        """Serve what the host's kernel has at hand; ``None`` when it may have to wait, with nothing done.

        It holds up a vCPU, but no longer than waking a thread would.
        """
        opcode = int.from_bytes(b"".join(part(request.readable, 4, 4)), "little")
        if opcode not in QUICK or not self._serving.acquire(blocking=False):
            return None
        self.tree.quick = True
        try:
            return self._serve(request)
        except WaitsError:
            return None
        finally:
            self.tree.quick = False
            self._serving.release()

    def _serve(self, request: Request) -> int:
        size = request.readable_size
        if not IN_HEADER.size <= size <= MOST + 4096:
            raise RingError(f"a FUSE message of {size} bytes")
        head = b"".join(part(request.readable, 0, IN_HEADER.size + IO.size))
        length, opcode, unique, number, user, group, _, _ = IN_HEADER.unpack_from(head)
        if length != size:
            raise RingError(f"a FUSE message of {size} bytes that says {length}")
        if opcode in (Op.FORGET, Op.BATCH_FORGET):
            self._forget(opcode, number, Args(request.read()[IN_HEADER.size :]))
            return 0
        if request.writable_size < OUT_HEADER.size:
            raise RingError("no room for a FUSE answer")
        code, answer = 0, b""
        try:
            if self._barred and opcode not in GIVING_UP:
                raise OSError(errno.EACCES, "revoked by the security policy")
            if self.options.readonly and opcode in CHANGING:
                raise OSError(errno.EROFS, "read-only share")
            if opcode == Op.READ:
                got = self._files.read(request, head)
                request.write(OUT_HEADER.pack(OUT_HEADER.size + got, 0, unique))
                return OUT_HEADER.size + got
            if opcode == Op.WRITE:
                answer = self._files.write(request, head)
            else:
                self._names.owner = user, group
                room = request.writable_size - OUT_HEADER.size
                answer = self._call(opcode, number, Args(request.read()[IN_HEADER.size :]), room)
        except OSError as error:
            code, answer = guests_errno(error), b""
        except (ValueError, OverflowError):  # a field that no system call takes, such as an offset of 2**64 - 1
            code, answer = errno.EINVAL, b""
        if OUT_HEADER.size + len(answer) > request.writable_size:
            raise RingError(f"no room for a FUSE answer of {len(answer)} bytes")
        return request.write(OUT_HEADER.pack(OUT_HEADER.size + len(answer), -code, unique) + answer)

    def _call(self, opcode: int, number: int, args: Args, room: int) -> bytes:
        if opcode == Op.INIT:
            return self._init(args, room)
        if opcode == Op.DESTROY:
            self.stop()
            return b""
        if opcode in (Op.READDIR, Op.READDIRPLUS):
            return self._files.readdir(args, room, plus=opcode == Op.READDIRPLUS)
        call = self._calls.get(opcode)
        if call is None:
            raise OSError(errno.ENOSYS, "not served")  # the guest does not ask again
        return call(self.tree.inode(number), args)

    def _init(self, args: Args, room: int) -> bytes:
        major, _, readahead, offered = args.take(U32X4)
        self.stop()
        if major != fuse.MAJOR:  # the guest asks again, in this version
            return struct.pack("<II", fuse.MAJOR, fuse.MINOR) + bytes(56)
        flags = offered & fuse.Init.WANTED
        answer = struct.pack("<IIIIHHIIHH", 7, fuse.MINOR, readahead, flags, 64, 48, MOST, 1, PAGES, 0)
        return (answer + bytes(32))[:room]

    def _forget(self, opcode: int, number: int, args: Args) -> None:
        try:
            if opcode == Op.FORGET:
                self.tree.forget(number, args.take(U64)[0])
                return
            for _ in range(args.take(U32X2)[0]):
                self.tree.forget(args.take(U64)[0], args.take(U64)[0])
        except OSError as error:
            raise RingError(f"FUSE_FORGET: {error.strerror}") from error

    # state

    def save(self) -> FsState:
        inodes = [(one.number, one.lookups, list(one.path)) for one in self.tree if one.number != ROOT]
        return FsState(inodes, [(at, one.inode.number, one.flags) for at, one in self.handles.items()])

    def load(self, state: FsState) -> None:
        self.stop()
        known: dict[tuple[bytes, ...], Inode] = {}
        for number, lookups, path in sorted(state.inodes, key=lambda row: len(row[2])):
            try:
                self.tree.restore(number, lookups, path, known)
            except OSError as error:
                self._gone(b"/".join(path), error)
        for at, number, flags in state.handles:
            try:
                self._files.restore(at, number, flags)
            except OSError as error:
                self._gone(b"open file %d" % at, error)

    def _gone(self, what: bytes, error: OSError) -> None:
        self._slot.log.warning("virtio-fs: a file is gone", path=what.decode("utf8", "replace"), why=str(error))

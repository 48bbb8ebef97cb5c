"""File system device (virtio 1.2, section 5.11): a FUSE server for a host directory, inside the VMM.

Linux: ``mount -t virtiofs TAG /mnt``. The directory is confined as that of ``virtio-9p`` is; ``vhost-user-fs`` is the
same device served by virtiofsd.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import define, field, frozen
from attrs.validators import max_len, min_len
from cardcage.errors import ConfigError

from cardcage_virtio import fs_xattr, fuse
from cardcage_virtio.fuse import IN_HEADER, IO, OUT_HEADER, Args, Op, Set, io_of, part
from cardcage_virtio.fuse_tree import ROOT, Handle, Inode, Tree, WaitsError
from cardcage_virtio.hostcalls import NOW, OMIT, RENAME_EXCHANGE, fallocate, is_local
from cardcage_virtio.p9_tree import Listings, Node
from cardcage_virtio.request import RingError
from cardcage_virtio.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Fs", "FsOptions", "FsState"]

MOST = 1 << 20
"""Bytes that one READ or WRITE moves at most."""
PAGES = MOST >> 12
U32, U32X2, U32X4 = Struct("<I"), Struct("<II"), Struct("<IIII")
U64, U64_U32X2, U64_U32X4 = Struct("<Q"), Struct("<QII"), Struct("<QIIQ")
SETATTR = Struct("<IIQQQqqqIIIIIIII")
GETATTR, LSEEK, FALLOCATE = Struct("<IIQ"), Struct("<QQII"), Struct("<QQQII")
COPY = Struct("<QQQQQQQ")
STATFS = Struct("<5Q4I24x")
OPENED = Struct("<QII")
VALID = {"never": 0, "auto": 1, "always": 86400}
GIVING_UP = frozenset((Op.RELEASE, Op.RELEASEDIR, Op.DESTROY))  # served also while security bars the share
CHANGING = frozenset(
    {Op.SETATTR, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK, Op.CREATE}
    | {Op.WRITE, Op.COPY_FILE_RANGE, Op.FALLOCATE, Op.SETXATTR, Op.REMOVEXATTR}
)
QUICK = frozenset({Op.LOOKUP, Op.GETATTR, Op.OPEN, Op.READ, Op.FLUSH, Op.RELEASE})
"""Requests that may take no waiting: see :meth:`Fs._quick`."""
QUICK_READ = 128 << 10


@frozen
class FsOptions:
    """Options of ``virtio-fs``.

    Attributes:
        path: host directory. tag: what the guest mounts it by, up to 36 bytes of UTF-8.
        readonly: the guest may change nothing.
        cache: how long the guest may believe names and attributes without asking: ``never``, ``auto`` (a second), or
            ``always``, for a directory that only the guest changes.
    """

    path: str = field(validator=min_len(1))
    tag: str = field(default="share", validator=[min_len(1), max_len(36)])
    readonly: bool = False
    cache: Literal["never", "auto", "always"] = "auto"


@define
class FsState:
    """What the guest holds: inodes (number, lookups, names from the root), and handles (number, inode, open flags)."""

    version: ClassVar[int] = 1
    inodes: list[tuple[int, int, list[bytes]]] = field(factory=list)
    handles: list[tuple[int, int, int]] = field(factory=list)


class Fs:
    """The server. Requests are served one after another, on a thread of their own if they may have to wait."""

    device_id = 26
    queue_sizes = (64, 512)
    class_code = 0x018000

    def __init__(self, options: FsOptions) -> None:
        self.options = options
        if len(options.tag.encode()) > 36:
            raise ConfigError(f"tag {options.tag}: expected at most 36 bytes of UTF-8", key="tag")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.tree: Tree
        self._barred, self._serving = False, Lock()
        self.handles: dict[int, Handle] = {}
        self._listings = Listings()
        self._most_handles, self._next_handle = limit // 4, 1
        self._valid = VALID[options.cache]
        self._calls: dict[int, Callable[[Inode, Args], bytes]] = {
            Op.LOOKUP: lambda inode, args: self._entry(self.tree.lookup(inode, args.name())),
            Op.GETATTR: self._getattr,
            Op.SETATTR: self._setattr,
            Op.READLINK: lambda inode, args: self.tree.node(inode).readlink(),
            Op.SYMLINK: self._symlink,
            Op.MKNOD: self._mknod,
            Op.MKDIR: self._mkdir,
            Op.UNLINK: lambda inode, args: self._unlink(inode, args, directory=False),
            Op.RMDIR: lambda inode, args: self._unlink(inode, args, directory=True),
            Op.RENAME: self._rename,
            Op.RENAME2: self._rename2,
            Op.LINK: self._link,
            Op.OPEN: lambda inode, args: self._open(inode, args.take(U32X2)[0]),
            Op.OPENDIR: lambda inode, args: self._open(inode, os.O_RDONLY | os.O_DIRECTORY),
            Op.CREATE: self._create,
            Op.RELEASE: self._release,
            Op.RELEASEDIR: self._release,
            Op.FLUSH: lambda inode, args: b"",  # writes are with the host's kernel when they are answered
            Op.FSYNC: self._fsync,
            Op.FSYNCDIR: self._fsync,
            Op.STATFS: self._statfs,
            Op.LSEEK: self._lseek,
            Op.COPY_FILE_RANGE: self._copy,
            Op.FALLOCATE: self._fallocate,
            Op.GETXATTR: lambda inode, args: fs_xattr.get(self.tree.node(inode), args),
            Op.LISTXATTR: lambda inode, args: fs_xattr.listing(self.tree.node(inode), args),
            Op.SETXATTR: lambda inode, args: fs_xattr.set_(self.tree.node(inode), args),
            Op.REMOVEXATTR: lambda inode, args: fs_xattr.remove(self.tree.node(inode), args),
        }

    def plug(self, slot: Slot) -> None:
        self._slot, path, changes = slot, self.options.path, () if self.options.readonly else ("write", "create")

        def bar(barred: bool) -> Callable[[], None]:
            return lambda: setattr(self, "_barred", barred)

        readonly = self.options.readonly
        slot.ask("image", path, ("open", "read", *changes), bar(True), bar(False), readonly=readonly)
        try:
            self.tree = Tree(Node.root(path), self._most_handles)
        except OSError as error:
            raise ConfigError(f"path {path}: {error.strerror}", key="path") from error

    def plug_virtio(self, io: Virtio) -> None:
        quick = self._quick if is_local(self.tree.node(self.tree.root).fd) else None
        self._workers = Workers(io, self._process, 1, self._slot.id, quick)

    def unplug(self) -> None:
        self._workers.close()
        self.stop()

    def config(self) -> bytes:
        return struct.pack("<36sI", self.options.tag.encode(), 1)

    def notified(self, index: int) -> None:
        self._workers.notify(index)

    def drain(self) -> None:
        self._workers.drain()

    def stop(self) -> None:
        for handle in self.handles.values():
            os.close(handle.fd)
        self.handles.clear()
        self.tree.clear()

    # messages

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
                got = self._read(request, head)
                request.write(OUT_HEADER.pack(OUT_HEADER.size + got, 0, unique))
                return OUT_HEADER.size + got
            if opcode == Op.WRITE:
                answer = self._write(request, head)
            else:
                self._user, self._group = user, group
                room = request.writable_size - OUT_HEADER.size
                answer = self._call(opcode, number, Args(request.read()[IN_HEADER.size :]), room)
        except OSError as error:
            code, answer = error.errno or errno.EIO, b""
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
            return self._readdir(args, room, plus=opcode == Op.READDIRPLUS)
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

    # inodes

    def _attributes(self, inode: Inode) -> bytes:
        return struct.pack("<QII", self._valid, 0, 0) + fuse.attributes(self.tree.node(inode).stat())

    def _getattr(self, inode: Inode, args: Args) -> bytes:
        flags, _, number = args.take(GETATTR)
        handle = self.handles.get(number) if flags & 1 else None
        if handle is None or handle.inode is not inode:
            return self._attributes(inode)
        # an open file may have no name any more by which its inode could be found again
        return struct.pack("<QII", self._valid, 0, 0) + fuse.attributes(os.fstat(handle.fd))

    def _entry(self, inode: Inode) -> bytes:
        found = fuse.attributes(self.tree.node(inode).stat())
        return fuse.ENTRY.pack(inode.number, 0, self._valid, self._valid, 0, 0) + found

    def _made(self, parent: Inode, name: bytes, node: Node) -> Inode:
        """What was just made, which belongs to who asked where the host lets it."""
        if os.geteuid() == 0 and not stat.S_ISLNK(node.stat().st_mode):
            set_group = self.tree.node(parent).stat().st_mode & stat.S_ISGID
            node.chown(self._user, -1 if set_group else self._group)
        return self.tree.adopt(parent, name, node)

    def _symlink(self, parent: Inode, args: Args) -> bytes:
        name, target = args.name(), args.name()
        return self._entry(self._made(parent, name, self.tree.node(parent).symlink(name, target)))

    def _mknod(self, parent: Inode, args: Args) -> bytes:
        mode, name = args.take(U32X4)[0], args.name()
        return self._entry(self._made(parent, name, self.tree.node(parent).mknod(name, mode)))

    def _mkdir(self, parent: Inode, args: Args) -> bytes:
        mode, name = args.take(U32X2)[0], args.name()
        return self._entry(self._made(parent, name, self.tree.node(parent).mkdir(name, mode)))

    def _unlink(self, parent: Inode, args: Args, *, directory: bool) -> bytes:
        self.tree.node(parent).unlink(args.name(), directory=directory)
        return b""

    def _rename(self, parent: Inode, args: Args) -> bytes:
        return self._move(parent, args.take(U64)[0], args, 0)

    def _rename2(self, parent: Inode, args: Args) -> bytes:
        to, flags, _ = args.take(U64_U32X2)
        return self._move(parent, to, args, flags)

    def _move(self, parent: Inode, number: int, args: Args, flags: int) -> bytes:
        to, name, new_name = self.tree.inode(number), args.name(), args.name()
        self.tree.node(parent).rename(name, self.tree.node(to), new_name, flags)
        self.tree.moved(to, new_name)
        if flags & RENAME_EXCHANGE:
            self.tree.moved(parent, name)
        return b""

    def _link(self, parent: Inode, args: Args) -> bytes:
        inode, name = self.tree.inode(args.take(U64)[0]), args.name()
        self.tree.node(parent).link(self.tree.node(inode), name)
        return self._entry(self.tree.lookup(parent, name))

    def _setattr(self, inode: Inode, args: Args) -> bytes:
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
                os.ftruncate(self._handle(fh).fd, size)
            else:
                node.truncate(size)
        if valid & (Set.ATIME | Set.MTIME):
            times = [(0, OMIT), (0, OMIT)]
            if valid & Set.ATIME:
                times[0] = (0, NOW) if valid & Set.ATIME_NOW else (accessed, accessed_ns)
            if valid & Set.MTIME:
                times[1] = (0, NOW) if valid & Set.MTIME_NOW else (modified, modified_ns)
            node.utime(*times)
        return self._attributes(inode)

    def _statfs(self, inode: Inode, args: Args) -> bytes:
        found = os.statvfs(self.tree.node(inode).fd)
        blocks = found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree
        return STATFS.pack(*blocks, found.f_bsize, min(found.f_namemax, 255), found.f_frsize, 0)

    # open files

    def _handle(self, number: int) -> Handle:
        found = self.handles.get(number)
        if found is None:
            raise OSError(errno.EBADF, "no such handle")
        if self.tree.quick and found.inode.key[0] != self.tree.root.key[0]:
            raise WaitsError
        return found

    def _keep(self, handle: Handle) -> bytes:
        if len(self.handles) >= self._most_handles:
            os.close(handle.fd)
            raise OSError(errno.EMFILE, "too many open files")
        number, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[number] = handle
        return OPENED.pack(number, 0, 0)

    def _open(self, inode: Inode, flags: int) -> bytes:
        if self.options.readonly and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise OSError(errno.EROFS, "read-only share")
        node = self.tree.node(inode)
        if self.tree.quick and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise WaitsError
        fd = node.open(flags)
        return self._keep(Handle(inode, fd, flags & ~os.O_TRUNC))

    def _create(self, parent: Inode, args: Args) -> bytes:
        flags, mode, _, _ = args.take(U32X4)
        name = args.name()
        node, fd = self.tree.node(parent).create(name, flags, mode)
        try:
            entry = self._entry(self._made(parent, name, node))
        except OSError:
            os.close(fd)
            raise
        inode = self.tree.inode(struct.unpack_from("<Q", entry)[0])
        return entry + self._keep(Handle(inode, fd, flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL)))

    def _release(self, inode: Inode, args: Args) -> bytes:
        number = args.take(U64_U32X4)[0]
        handle = self.handles.get(number)
        if handle is not None:
            if self.tree.quick and (handle.flags & os.O_ACCMODE or not os.fstat(handle.fd).st_nlink):
                raise WaitsError  # it may have to be written, or its blocks given back
            os.close(self.handles.pop(number).fd)
        return b""

    def _fsync(self, inode: Inode, args: Args) -> bytes:
        number, data_only, _ = args.take(U64_U32X2)
        (os.fdatasync if data_only & 1 else os.fsync)(self._handle(number).fd)
        return b""

    def _read(self, request: Request, head: bytes) -> int:
        number, offset, size, *_ = io_of(head)
        handle = self._handle(number)
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

    def _write(self, request: Request, head: bytes) -> bytes:
        number, offset, size, *_ = io_of(head)
        if size > request.readable_size - len(head):
            raise OSError(errno.EINVAL, "message cut short")
        views = part(request.readable, len(head), size)
        return U32X2.pack(os.pwritev(self._handle(number).fd, views, offset) if views else 0, 0)

    def _lseek(self, inode: Inode, args: Args) -> bytes:
        number, offset, whence, _ = args.take(LSEEK)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the guest's kernel knows its own positions")
        return U64.pack(os.lseek(self._handle(number).fd, offset, whence))

    def _fallocate(self, inode: Inode, args: Args) -> bytes:
        number, offset, length, mode, _ = args.take(FALLOCATE)
        fallocate(self._handle(number).fd, mode, offset, length)
        return b""

    def _copy(self, inode: Inode, args: Args) -> bytes:
        source, at, _, target, to, length, flags = args.take(COPY)
        if flags:
            raise OSError(errno.EINVAL, "no flags are known")
        most = min(length, 1 << 30)
        return U32X2.pack(os.copy_file_range(self._handle(source).fd, self._handle(target).fd, most, at, to), 0)

    def _readdir(self, args: Args, room: int, *, plus: bool) -> bytes:
        number, offset, size, *_ = args.take(IO)
        handle = self._handle(number)
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
            return self._entry(self.tree.lookup(parent, name))
        except OSError:
            return bytes(fuse.ENTRY.size + fuse.ATTR.size)

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
                inode = self.tree.inode(number)
                self.handles[at] = Handle(inode, self.tree.node(inode).open(flags), flags)
            except OSError as error:
                self._gone(b"open file %d" % at, error)
            self._next_handle = max(self._next_handle, at + 1)

    def _gone(self, what: bytes, error: OSError) -> None:
        self._slot.log.warning("virtio-fs: a file is gone", path=what.decode("utf8", "replace"), why=str(error))

"""9P2000.L server: a host directory in the guest (virtio 1.2 device 9; the protocol as in diod's protocol.md).

Linux: ``mount -t 9p -o trans=virtio,version=9p2000.L TAG /mnt``.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, frozen
from attrs.validators import max_len, min_len
from cardcage.errors import ConfigError

from cardcage_virtio.hostcalls import NOW, OMIT
from cardcage_virtio.p9_tree import Listings, Node
from cardcage_virtio.p9_wire import Message, text
from cardcage_virtio.request import RingError
from cardcage_virtio.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["P9", "P9Options", "P9State"]

VERSION = b"9P2000.L"
MSIZE_MAX, MSIZE_MIN = 1 << 20, 4096
NO_FID = 0xFFFFFFFF
HEAD = 7
READ, REMOVE, ERROR = 116, 122, 7
GIVING_UP = frozenset({108, 120})  # flush and clunk: served also while security bars the share
S_MODE, S_UID, S_GID, S_SIZE, S_ATIME, S_MTIME, S_ATIME_SET, S_MTIME_SET = 1, 2, 4, 8, 0x10, 0x20, 0x80, 0x100


@frozen
class P9Options:
    """Options of ``virtio-9p``.

    Attributes:
        path: host directory. tag: what the guest mounts it by.
        readonly: the guest may change nothing.
    """

    path: str = field(validator=min_len(1))
    tag: str = field(default="share", validator=[min_len(1), max_len(31)])
    readonly: bool = False


@define
class P9State:
    """Open fids as ``(fid, names from the root, open flags or -1)``; what is gone on load is gone for the guest."""

    version: ClassVar[int] = 1
    msize: int = MSIZE_MIN
    fids: list[tuple[int, list[bytes], int]] = field(factory=list)


class Fid:
    """What the guest holds by number: a node, and a descriptor once opened."""

    __slots__ = ("__weakref__", "fd", "flags", "node")

    def __init__(self, node: Node) -> None:
        self.node, self.fd, self.flags = node, -1, -1

    def opened(self, fd: int, flags: int) -> None:
        self.close()
        self.fd, self.flags = fd, flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class P9:
    """The server. Requests are served one after another, on a thread of their own."""

    device_id = 9
    queue_sizes = (128,)
    features = 1
    class_code = 0x018000

    def __init__(self, options: P9Options) -> None:
        self.options, self._barred = options, False
        self.root: Node
        self.fids: dict[int, Fid] = {}
        self._listings = Listings()
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # open files, and as many nodes
        self._msize = MSIZE_MIN
        self._calls: dict[int, Callable[[Message], bytes]] = {
            8: self._statfs,
            12: self._lopen,
            14: self._lcreate,
            16: self._symlink,
            18: self._mknod,
            20: self._rename,
            22: self._readlink,
            24: self._getattr,
            26: self._setattr,
            40: self._readdir,
            50: self._fsync,
            52: self._lock,
            54: self._getlock,
            70: self._link,
            72: self._mkdir,
            74: self._renameat,
            76: self._unlinkat,
            100: self._version,
            104: self._attach,
            108: lambda message: b"",  # what is to be flushed was served before this was read
            110: self._walk,
            118: self._write,
            120: self._clunk,
            122: self._remove,
        }
        self._changing = {14, 16, 18, 20, 26, 70, 72, 74, 76, 118, 122}

    def plug(self, slot: Slot) -> None:
        self._slot, path, changes = slot, self.options.path, () if self.options.readonly else ("write", "create")

        def bar(barred: bool) -> Callable[[], None]:
            return lambda: setattr(self, "_barred", barred)

        readonly = self.options.readonly
        slot.ask("image", path, ("open", "read", *changes), bar(True), bar(False), readonly=readonly)
        try:
            self.root = Node.root(path, self._most)
        except OSError as error:
            raise ConfigError(f"path {path}: {error.strerror}", key="path") from error

    def plug_virtio(self, io: Virtio) -> None:
        self._workers = Workers(io, self._process, 1, self._slot.id)

    def unplug(self) -> None:
        self._workers.close()
        self.stop()

    def config(self) -> bytes:
        tag = self.options.tag.encode()
        return struct.pack("<H", len(tag)) + tag

    def notified(self, index: int) -> None:
        self._workers.notify(index)

    def drain(self) -> None:
        self._workers.drain()

    def stop(self) -> None:
        for fid in self.fids.values():
            fid.close()
        self.fids.clear()

    # messages

    def _process(self, request: Request) -> int:
        if request.readable_size > MSIZE_MAX + HEAD or request.readable_size < HEAD:
            raise RingError(f"a 9p message of {request.readable_size} bytes")
        data = request.read()
        size, kind, tag = struct.unpack_from("<IBH", data)
        room = min(request.writable_size, self._msize if kind != 100 else MSIZE_MIN)
        message = Message(data[HEAD : max(size, HEAD)])
        try:
            if size > len(data):
                raise OSError(errno.EPROTO, "message cut short")
            if self._barred and kind not in GIVING_UP:
                if kind == REMOVE:  # which gives up its fid even where it fails
                    self._clunk(message)
                raise OSError(errno.EACCES, "revoked by the security policy")
            if kind == READ:
                return self._read(message, request, tag, room)
            call = self._calls.get(kind)
            if call is None:
                raise OSError(errno.EOPNOTSUPP, "not served")
            if self.options.readonly and kind in self._changing:
                raise OSError(errno.EROFS, "read-only share")
            message.room = room - HEAD
            answer = call(message)
            kind += 1
        except OSError as error:
            answer, kind = struct.pack("<I", error.errno or errno.EIO), ERROR
        except (ValueError, OverflowError, struct.error):  # a field no call takes, such as a size of 2**64 - 1
            answer, kind = struct.pack("<I", errno.EINVAL), ERROR
        if HEAD + len(answer) > request.writable_size:
            raise RingError(f"no room for a 9p answer of {HEAD + len(answer)} bytes")
        return request.write(struct.pack("<IBH", HEAD + len(answer), kind, tag) + answer)

    def _fid(self, message: Message) -> Fid:
        fid = self.fids.get(message.number(4))
        if fid is None:
            raise OSError(errno.EBADF, "no such fid")
        return fid

    def _keep(self, number: int, fid: Fid) -> None:
        if number == NO_FID or number in self.fids:
            raise OSError(errno.EBADF, "fid in use")
        if len(self.fids) >= self._most:
            raise OSError(errno.EMFILE, "too many fids")
        self.fids[number] = fid

    def _version(self, message: Message) -> bytes:
        size, version = message.number(4), message.text()
        self.stop()
        self._msize = max(min(size, MSIZE_MAX), MSIZE_MIN)
        return struct.pack("<I", min(size, self._msize)) + text(VERSION if version == VERSION else b"unknown")

    def _attach(self, message: Message) -> bytes:
        number = message.number(4)
        self._keep(number, Fid(self.root))
        return self.root.qid()

    def _walk(self, message: Message) -> bytes:
        start, number = message.number(4), message.number(4)
        fid = self.fids.get(start)
        count = message.number(2)
        if fid is None or count > 16:
            raise OSError(errno.EBADF if fid is None else errno.EINVAL, "walk")
        node = fid.node
        qids: list[bytes] = []
        names = [message.text() for _ in range(count)]
        for name in names:
            try:
                node = node.walk(name)
            except OSError:
                if not qids:
                    raise
                break
            qids.append(node.qid())
        if len(qids) == count:
            if number == start:
                fid.close()
                fid.node = node
            else:
                self._keep(number, Fid(node))
        return struct.pack("<H", len(qids)) + b"".join(qids)

    def _clunk(self, message: Message) -> bytes:
        number = message.number(4)
        fid = self.fids.pop(number, None)
        if fid is None:
            raise OSError(errno.EBADF, "no such fid")
        fid.close()
        return b""

    def _remove(self, message: Message) -> bytes:
        fid = self._fid(message)
        self._clunk(message.again())
        parent, name = fid.node.place()
        parent.unlink(name, directory=stat.S_ISDIR(fid.node.stat().st_mode))
        return b""

    # files

    def _lopen(self, message: Message) -> bytes:
        fid, flags = self._fid(message), message.number(4)
        if self.options.readonly and flags & (os.O_ACCMODE | os.O_TRUNC):
            raise OSError(errno.EROFS, "read-only share")
        fid.opened(fid.node.open(flags), flags)
        return fid.node.qid() + bytes(4)

    def _lcreate(self, message: Message) -> bytes:
        fid, name, flags, mode = self._fid(message), message.text(), message.number(4), message.number(4)
        fid.node, fd = fid.node.create(name, flags, mode)
        fid.opened(fd, flags)
        return fid.node.qid() + bytes(4)

    def _read(self, message: Message, request: Request, tag: int, room: int) -> int:
        fid, offset, count = self._fid(message), message.number(8), message.number(4)
        head = HEAD + 4
        count = min(count, room - head)
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

    def _write(self, message: Message) -> bytes:
        fid, offset, count = self._fid(message), message.number(8), message.number(4)
        if fid.fd < 0:
            raise OSError(errno.EBADF, "not open")
        return struct.pack("<I", os.pwrite(fid.fd, message.take(count), offset))

    def _fsync(self, message: Message) -> bytes:
        fid, data_only = self._fid(message), message.number(4)
        if fid.fd < 0:
            raise OSError(errno.EBADF, "not open")
        (os.fdatasync if data_only else os.fsync)(fid.fd)
        return b""

    def _readdir(self, message: Message) -> bytes:
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

    # names

    def _symlink(self, message: Message) -> bytes:
        return self._fid(message).node.symlink(message.text(), message.text()).qid()

    def _mknod(self, message: Message) -> bytes:
        return self._fid(message).node.mknod(message.text(), message.number(4)).qid()

    def _mkdir(self, message: Message) -> bytes:
        return self._fid(message).node.mkdir(message.text(), message.number(4)).qid()

    def _link(self, message: Message) -> bytes:
        directory = self._fid(message)
        directory.node.link(self._fid(message).node, message.text())
        return b""

    def _rename(self, message: Message) -> bytes:
        fid, to, name = self._fid(message), self._fid(message), message.text()
        parent, old = fid.node.place()
        parent.rename(old, to.node, name)
        above: Node | None = to.node
        while above is not None and above is not fid.node:
            above = above.parent
        if above is None:  # else *to* was walked to through it, and moved since: it keeps the way it was found by
            fid.node.parent, fid.node.name = to.node, name
        return b""

    def _renameat(self, message: Message) -> bytes:
        old, name, new = self._fid(message), message.text(), self._fid(message)
        old.node.rename(name, new.node, message.text())
        return b""

    def _unlinkat(self, message: Message) -> bytes:
        fid, name, flags = self._fid(message), message.text(), message.number(4)
        fid.node.unlink(name, directory=bool(flags & 0x200))
        return b""

    def _readlink(self, message: Message) -> bytes:
        return text(self._fid(message).node.readlink())

    # attributes

    def _statfs(self, message: Message) -> bytes:
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

    def _getattr(self, message: Message) -> bytes:
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

    def _setattr(self, message: Message) -> bytes:
        node = self._fid(message).node
        valid, mode, user, group = (message.number(4) for _ in range(4))
        size, accessed, accessed_ns, modified, modified_ns = (message.number(8) for _ in range(5))
        if valid & S_MODE:
            node.chmod(mode)
        if valid & (S_UID | S_GID):
            node.chown(user if valid & S_UID else -1, group if valid & S_GID else -1)
        if valid & S_SIZE:
            node.truncate(size)
        if valid & (S_ATIME | S_MTIME):
            node.utime(
                when(valid & S_ATIME, valid & S_ATIME_SET, accessed, accessed_ns),
                when(valid & S_MTIME, valid & S_MTIME_SET, modified, modified_ns),
            )
        return b""

    def _lock(self, message: Message) -> bytes:
        self._fid(message)  # locks between processes of the guest are kept by its own kernel
        return b"\0"

    def _getlock(self, message: Message) -> bytes:
        self._fid(message)
        message.number(1)
        start, length, owner = message.number(8), message.number(8), message.number(4)
        return struct.pack("<BQQI", 2, start, length, owner) + text(message.text())

    # state

    def save(self) -> P9State:
        rows = [(number, list(fid.node.path), fid.flags if fid.fd >= 0 else -1) for number, fid in self.fids.items()]
        return P9State(self._msize, rows)

    def load(self, state: P9State) -> None:
        self.stop()
        self._msize = state.msize
        for number, names, flags in state.fids:
            node: Any = self.root
            try:
                for name in names:
                    node = node.walk(name)
                fid = Fid(node)
                if flags >= 0:
                    fid.opened(node.open(flags), flags)
            except OSError as error:
                path = b"/".join(names).decode("utf8", "replace")
                self._slot.log.warning("9p: a file is gone", path=path, why=str(error))
                continue
            self.fids[number] = fid


def when(wanted: int, given: int, seconds: int, nanoseconds: int) -> tuple[int, int]:
    """A time to set: as given, the host's, or none."""
    if not wanted:
        return 0, OMIT
    return (seconds - (seconds >> 63 << 64), nanoseconds) if given else (0, NOW)

"""9P2000.L server: a host directory in the guest (virtio 1.2 device 9; the protocol as in diod's protocol.md).

Linux: ``mount -t 9p -o trans=virtio,version=9p2000.L TAG /mnt``.
"""

from __future__ import annotations

import errno
import stat
import struct
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define, field, frozen
from attrs.validators import max_len, min_len
from cardcage.config import HostPath
from cardcage.security import Needs

from cardcage_virtio.parking import ParksWorkers
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.queue.workers import Workers
from cardcage_virtio.share.hostcalls import most_files
from cardcage_virtio.share.making import NOBODY
from cardcage_virtio.share.p9_files import HEAD, READ, Fid, Files
from cardcage_virtio.share.p9_names import Names
from cardcage_virtio.share.p9_tree import Listings, Node, guests_errno, share_needs, shared_root
from cardcage_virtio.share.p9_wire import Message, text
from cardcage_virtio.share.p9_xattr import Attributes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["P9", "P9Options", "P9State"]

VERSION = b"9P2000.L"
MSIZE_MAX, MSIZE_MIN = 1 << 20, 4096
NO_FID = 0xFFFFFFFF
REMOVE, ERROR = 122, 7
GIVING_UP = frozenset({108, 120})  # flush and clunk: served also while security bars the share


@frozen
class P9Options:
    """Options of ``virtio-9p``.

    Attributes:
        path: host directory. tag: what the guest mounts it by.
        readonly: the guest may change nothing.
    """

    path: HostPath = field(validator=min_len(1))
    tag: str = field(default="share", validator=[min_len(1), max_len(31)])
    readonly: bool = False


@define
class P9State:
    """Open fids as ``(fid, names from the root, open flags or -1)``; what is gone on load is gone for the guest.

    Attributes:
        users: of fids, where known. attributes: (fid, name, flags, size, data, being written) of extended ones.
    """

    version: ClassVar[int] = 1
    msize: int = MSIZE_MIN
    fids: list[tuple[int, list[bytes], int]] = field(factory=list)
    users: list[tuple[int, int]] = field(factory=list)
    attributes: list[tuple[int, bytes, int, int, bytes, bool]] = field(factory=list)


class P9(ParksWorkers):
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
        self._most = 0  # open files, and as many nodes
        self._msize = MSIZE_MIN
        self._files, names = Files(self._fid, self._listings, options.readonly), Names(self._fid)
        self._attributes = Attributes(self._fid)
        self._calls: dict[int, Callable[[Message], bytes]] = {
            8: names.statfs,
            12: self._files.lopen,
            14: self._files.lcreate,
            16: names.symlink,
            18: names.mknod,
            20: names.rename,
            22: names.readlink,
            24: names.getattr,
            26: names.setattr,
            30: self._attribute_walk,
            32: self._attributes.create,
            40: self._files.readdir,
            50: self._files.fsync,
            52: self._files.lock,
            54: self._files.getlock,
            70: names.link,
            72: names.mkdir,
            74: names.renameat,
            76: names.unlinkat,
            100: self._version,
            104: self._attach,
            108: lambda message: b"",  # what is to be flushed was served before this was read
            110: self._walk,
            118: self._files.write,
            120: self._clunk,
            122: self._remove,
        }
        self._changing = {14, 16, 18, 20, 26, 32, 70, 72, 74, 76, 118, 122}

    def plug(self, slot: Slot) -> None:
        self._slot, path, changes = slot, self.options.path, () if self.options.readonly else ("write", "create")

        def bar(barred: bool) -> Callable[[], None]:
            return lambda: setattr(self, "_barred", barred)

        readonly = self.options.readonly
        slot.host.ask("image", path, ("open", "read", *changes), bar(True), bar(False), readonly=readonly)
        self._most = most_files() // 4
        self.root = shared_root(path, self._most)

    def plug_virtio(self, io: Virtio) -> None:
        self._workers = Workers(io, self._process, 1, self._slot.id)

    def needs(self) -> Needs:
        """The directory, and root's rights over the owners and modes of what is in it."""
        return share_needs(self.options.path, readonly=self.options.readonly)

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
                return self._files.read(message, request, tag, room)
            call = self._calls.get(kind)
            if call is None:
                raise OSError(errno.EOPNOTSUPP, "not served")
            if self.options.readonly and kind in self._changing:
                raise OSError(errno.EROFS, "read-only share")
            message.room = room - HEAD
            answer = call(message)
            kind += 1
        except OSError as error:
            answer, kind = struct.pack("<I", guests_errno(error)), ERROR
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
            raise OSError(errno.ENFILE, "too many fids")
        self.fids[number] = fid

    def _version(self, message: Message) -> bytes:
        size, version = message.number(4), message.text()
        self.stop()
        self._msize = max(min(size, MSIZE_MAX), MSIZE_MIN)
        return struct.pack("<I", min(size, self._msize)) + text(VERSION if version == VERSION else b"unknown")

    def _attach(self, message: Message) -> bytes:
        number, _, _, _ = message.number(4), message.number(4), message.text(), message.text()
        self._keep(number, Fid(self.root, message.number(4)))
        return self.root.qid()

    def _attribute_walk(self, message: Message) -> bytes:
        fid, number, name = self._fid(message), message.number(4), message.text()
        found = Fid(fid.node, fid.user)
        found.attribute = self._attributes.read(fid.node, name)
        self._keep(number, found)
        return struct.pack("<Q", len(found.attribute.data))

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
                self._keep(number, Fid(node, fid.user))
        return struct.pack("<H", len(qids)) + b"".join(qids)

    def _clunk(self, message: Message) -> bytes:
        number = message.number(4)
        fid = self.fids.pop(number, None)
        if fid is None:
            raise OSError(errno.EBADF, "no such fid")
        fid.close()
        if fid.attribute is not None:
            if self._barred and fid.attribute.writing:
                raise OSError(errno.EACCES, "revoked by the security policy")
            fid.attribute.end(fid.node)
        return b""

    def _remove(self, message: Message) -> bytes:
        fid = self._fid(message)
        self._clunk(message.again())
        parent, name = fid.node.place()
        parent.unlink(name, directory=stat.S_ISDIR(fid.node.stat().st_mode))
        return b""

    # state

    def save(self) -> P9State:
        rows = [(number, list(fid.node.path), fid.flags if fid.fd >= 0 else -1) for number, fid in self.fids.items()]
        users = [(number, fid.user) for number, fid in self.fids.items() if fid.user != NOBODY]
        attributes = [(number, *fid.attribute.row()) for number, fid in self.fids.items() if fid.attribute is not None]
        return P9State(self._msize, rows, users, attributes)

    def load(self, state: P9State) -> None:
        self.stop()
        self._msize, users = state.msize, dict(state.users)
        attributes = {number: row for number, *row in state.attributes}
        for number, names, flags in state.fids:
            node: Any = self.root
            try:
                for name in names:
                    node = node.walk(name)
                fid = Fid(node, users.get(number, NOBODY))
                if number in attributes:
                    fid.attribute = self._attributes.restore(attributes[number])
                if flags >= 0:
                    fid.opened(node.open(flags), flags)
            except OSError as error:
                path = b"/".join(names).decode("utf8", "replace")
                self._slot.log.warning("9p: a file is gone", path=path, why=str(error))
                continue
            self.fids[number] = fid

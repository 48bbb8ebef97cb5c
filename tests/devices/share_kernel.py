"""The part of a guest's kernel that stands between a process and a server of files: paths, links, open files.

It has acts of :class:`share_calls.Direct` over :mod:`share_wire`, as far as they reach a server.
"""

from __future__ import annotations

import errno
import os
import stat
from hashlib import md5
from typing import Any

from share_calls import FOLLOW
from share_wire import NOW, OMITTED

LINKS = 40


def fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Walk:
    """Paths to nodes.

    Args:
        wire: of :mod:`share_wire`.
    """

    def __init__(self, wire: Any) -> None:
        self.wire = wire

    def mode(self, node: int) -> int:
        return int(self.wire.about(node)[0])

    def place(self, path: str, *, follow: bool = False) -> tuple[int, bytes]:
        """The directory and the name in it that *path* ends with, which need not be there."""
        at, todo, links = 1, path.split("/"), 0
        while True:
            name = todo.pop(0)
            if not stat.S_ISDIR(self.mode(at)):
                raise fail(errno.ENOTDIR)
            if not todo and not follow:
                return at, name.encode()
            try:
                node = self.wire.lookup(at, name.encode())
            except self.wire.error as error:
                if todo or error.code != errno.ENOENT:
                    raise
                return at, name.encode()
            if stat.S_ISLNK(self.mode(node)):
                links += 1
                if links > LINKS:
                    raise fail(errno.ELOOP)
                todo = os.fsdecode(self.wire.readlink(node)).split("/") + todo
            elif todo:
                at = node
            else:
                return at, name.encode()

    def node(self, path: str, follow: bool = True) -> int:
        return int(self.wire.lookup(*self.place(path, follow=follow)))


class Open(Walk):
    """Open files: node, handle and flags, by slot."""

    def __init__(self, wire: Any) -> None:
        super().__init__(wire)
        self.held: dict[int, tuple[int, int, int]] = {}

    def slot(self, slot: int, *, reads: bool = False, writes: bool = False) -> tuple[int, int, int]:
        if slot not in self.held:
            raise fail(errno.EBADF)
        kind = self.held[slot][2] & os.O_ACCMODE
        if (reads and kind == os.O_WRONLY) or (writes and kind == os.O_RDONLY):
            raise fail(errno.EBADF)
        if reads and stat.S_ISDIR(self.mode(self.held[slot][0])):
            raise fail(errno.EISDIR)
        return self.held[slot]

    def open(self, slot: int, name: str, flags: int, mode: int) -> list[int]:
        only_new = flags & os.O_CREAT and flags & os.O_EXCL
        place = self.place(name, follow=not only_new and not flags & os.O_NOFOLLOW)
        try:
            node = self.wire.lookup(*place)
        except self.wire.error as error:
            if error.code != errno.ENOENT or not flags & os.O_CREAT:
                raise
            node, handle = self.wire.create(*place, flags, mode | stat.S_IFREG)
        else:
            handle = self._open_found(node, flags)
        self.drop(slot)
        self.held[slot] = node, handle, flags
        return self.about_open(slot)

    def _open_found(self, node: int, flags: int) -> int:
        mode = self.mode(node)
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise fail(errno.EEXIST)
        if stat.S_ISLNK(mode):
            raise fail(errno.ELOOP)
        if stat.S_ISDIR(mode) and flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC):
            raise fail(errno.EISDIR)
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise fail(errno.ENXIO)
        return int(self.wire.open(node, flags & ~(os.O_CREAT | os.O_EXCL)))

    def drop(self, slot: int) -> None:
        if slot in self.held:
            self.wire.drop(self.held.pop(slot)[1])

    def drop_all(self) -> None:
        for slot in list(self.held):
            self.drop(slot)

    def read(self, slot: int, offset: int, size: int) -> str:
        return md5(self.wire.read(self.slot(slot, reads=True)[1], offset, size)).hexdigest()

    def write(self, slot: int, offset: int, size: int, how: int) -> int:
        node, handle, flags = self.slot(slot, writes=True)
        data = b"w" * (size // 2) + b"v" * (size - size // 2)
        flags |= os.O_APPEND if how & os.RWF_APPEND else 0
        if flags & os.O_APPEND:
            offset = self.wire.about(node)[4]
        return self.wire.write(handle, offset, data, flags) if size else 0

    def sync(self, slot: int, call: str) -> None:
        self.wire.sync(self.slot(slot)[1], call == "data")

    def about_open(self, slot: int) -> list[int]:
        return self._about(self.slot(slot)[0])

    def _about(self, node: int) -> list[int]:
        found = self.wire.about(node)[:6]
        found[4] = 0 if stat.S_ISDIR(found[0]) else found[4]
        return list(found)

    def truncate_open(self, slot: int, size: int) -> None:
        node, handle, flags = self.slot(slot)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise fail(errno.EINVAL)
        self.wire.set(node, handle, size=size)

    def chmod_open(self, slot: int, mode: int) -> None:
        self.wire.set(self.slot(slot)[0], mode=mode)

    def chown_open(self, slot: int, user: int, group: int) -> None:
        self._own(self.slot(slot)[0], user, group)

    def _own(self, node: int, user: int, group: int) -> None:
        given = {"uid": user, "gid": group}
        self.wire.set(node, **{name: value for name, value in given.items() if value >= 0})

    def link_open(self, slot: int, name: str) -> None:
        node, place = self.slot(slot)[0], self.place(name)
        if stat.S_ISDIR(self.mode(node)):
            self._must_miss(place)
            raise fail(errno.EPERM)
        self.wire.link(node, *place)

    def _must_miss(self, place: tuple[int, bytes]) -> None:
        try:
            self.wire.lookup(*place)
        except self.wire.error as error:
            if error.code != errno.ENOENT:
                raise
        else:
            raise fail(errno.EEXIST)


class Kernel(Open):
    """Names, and attributes by path."""

    def mkdir(self, name: str, mode: int) -> None:
        self.wire.mkdir(*self.place(name), mode & 0o1777)

    def mknod(self, name: str, mode: int, device: int) -> None:
        if stat.S_ISDIR(mode):
            raise fail(errno.EPERM)
        self.wire.mknod(*self.place(name), mode, device)

    def symlink(self, name: str, target: str) -> None:
        self.wire.symlink(*self.place(name), target.encode())

    def readlink(self, name: str) -> str:
        node = self.node(name, False)
        if not stat.S_ISLNK(self.mode(node)):
            raise fail(errno.EINVAL)
        return os.fsdecode(self.wire.readlink(node))

    def link(self, name: str, to: str, flags: int) -> None:
        node = self.node(name, flags == FOLLOW)
        place = self.place(to)
        if stat.S_ISDIR(self.mode(node)):
            self._must_miss(place)
            raise fail(errno.EPERM)
        self.wire.link(node, *place)

    def unlink(self, name: str) -> None:
        self.wire.unlink(*self.place(name), False)

    def rmdir(self, name: str) -> None:
        self.wire.unlink(*self.place(name), True)

    def rename(self, name: str, to: str, flags: int) -> None:
        if flags & 2 and flags & 5:
            raise fail(errno.EINVAL)
        self.wire.rename(*self.place(name), *self.place(to), flags)

    def names(self, name: str) -> list[str]:
        node = self.node(name)
        if not stat.S_ISDIR(self.mode(node)):
            raise fail(errno.ENOTDIR)
        return sorted(os.fsdecode(one) for one in self.wire.list(node) if one not in (b".", b".."))

    def about(self, name: str, follow: bool) -> list[int]:
        return self._about(self.node(name, follow))

    def chmod(self, name: str, mode: int) -> None:
        self.wire.set(self.node(name), mode=mode)

    def chown(self, name: str, user: int, group: int, follow: bool) -> None:
        self._own(self.node(name, follow), user, group)

    def truncate(self, name: str, size: int) -> None:
        node = self.node(name)
        if not stat.S_ISREG(self.mode(node)):
            raise fail(errno.EISDIR if stat.S_ISDIR(self.mode(node)) else errno.EINVAL)
        self.wire.set(node, size=size)

    def times(self, name: str, accessed: list[int], modified: list[int], follow: bool) -> list[int]:
        given = {"atime": accessed, "mtime": modified}
        node = self.node(name, follow)
        for _, rest in given.values():
            if rest not in (NOW, OMITTED) and rest >= 10**9:
                raise fail(errno.EINVAL)
        self.wire.set(
            node, **{key: (0, NOW) if one[1] == NOW else one for key, one in given.items() if one[1] != OMITTED}
        )
        found = self.wire.about(node)[6:]
        asked = (accessed[1], modified[1])
        return [0 if one in (NOW, OMITTED) else moment for moment, one in zip(found, asked, strict=True)]

    def set_attribute(self, name: str, key: str, size: int, flags: int, follow: bool) -> None:
        self.wire.set_attribute(self.node(name, follow), key.encode(), b"v" * size, flags)

    def attribute(self, name: str, key: str, follow: bool) -> str:
        return str(self.wire.attribute(self.node(name, follow), key.encode()).decode())

    def remove_attribute(self, name: str, key: str, follow: bool) -> None:
        self.wire.remove_attribute(self.node(name, follow), key.encode())

    def attributes(self, name: str, follow: bool) -> list[str]:
        return [one.decode() for one in self.wire.attributes(self.node(name, follow))]

    def room(self, name: str) -> int:
        return int(self.wire.name_max(self.node(name)))

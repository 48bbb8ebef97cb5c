"""A host directory tree that nothing leaves: nodes held by descriptor, walked one name at a time.

Each node is an ``O_PATH`` descriptor, opened from its parent's with ``O_NOFOLLOW``: symbolic links are never followed
here (the guest's kernel follows them itself), ``..`` goes to the parent that was walked through, never to what the host
calls so now, and a rename on the host cannot lead a node elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from struct import pack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from cardcage.errors import ConfigError
from cardcage.security import Needs

from cardcage_virtio.share import hostcalls

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MODE", "OPEN_FLAGS", "Listings", "Node", "check_name", "guests_errno", "names_of", "shared_root"]

O_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_DIRECTORY
MODE = 0o1777
"""Permission bits that a guest may set: no set-user-id on the host, and set-group-id of directories alone."""
DEPTH_MAX = 4096
"""Names of a path that are kept: a guest may nest directories without end."""


def check_name(name: bytes) -> bytes:
    """One component of a path. Raises OSError for what is none."""
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise OSError(errno.EINVAL, "not a name")
    if len(name) > 255:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    return name


class Tally:
    """How many nodes of a tree hold descriptors, and may."""

    __slots__ = ("held", "most")

    def __init__(self, most: int) -> None:
        self.held, self.most = 0, most


OWNERSHIP = ("chown", "dac_override", "fowner", "fsetid", "setfcap", "setgid", "setuid")
"""Capabilities that a file server uses: virtiofsd's, but for device files."""


def share_needs(path: str, *, readonly: bool) -> Needs:
    """The needs of a device that shows the guest the directory *path*."""
    whole = os.path.abspath(path)
    if readonly:
        return Needs(read=(whole,), capabilities=("dac_override",))
    return Needs(write=(whole,), capabilities=OWNERSHIP)


class Node:
    """A file, directory or link. Closing is by reference: the descriptor goes with the last holder.

    Attributes:
        fd: ``O_PATH`` descriptor. parent: ``None`` at the root. name: in the parent, when it was walked.
    """

    __slots__ = ("_tally", "fd", "name", "parent")

    def __init__(self, fd: int, parent: Node | None = None, name: bytes = b"", tally: Tally | None = None) -> None:
        self.fd, self.parent, self.name = fd, parent, name
        self._tally: Tally | None = tally if parent is None else parent._tally
        if self._tally is not None:
            self._tally.held += 1

    def __del__(self) -> None:
        os.close(self.fd)
        if self._tally is not None:
            self._tally.held -= 1

    @classmethod
    def root(cls, path: str, most: int | None = None) -> Node:
        """The directory at *path*, which may be reached through links. *most* nodes may be held. Raises OSError."""
        tally = None if most is None else Tally(most)
        return cls(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), tally=tally)

    def check_room(self) -> None:
        """Raises OSError ENFILE where no more may be held."""
        if self._tally is not None and self._tally.held >= self._tally.most:
            raise OSError(errno.ENFILE, "too many files")

    def walk(self, name: bytes) -> Node:
        """The entry *name*; ``..`` ends at the root. Raises OSError, ENFILE when too many are held."""
        if name == b"..":
            return self.parent or self
        self.check_room()
        return Node(os.open(check_name(name), O_PATH, dir_fd=self.fd), self, name)

    @property
    def path(self) -> tuple[bytes, ...]:
        """Names from the root, as they were walked."""
        return names_of(self)

    @property
    def proc(self) -> str:
        """A path to exactly this file, whatever its name is now."""
        return f"/proc/self/fd/{self.fd}"

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def qid(self) -> bytes:
        """The 13 bytes that identify a file to the guest."""
        return qid_of(self.stat())

    def open(self, flags: int) -> int:
        """A descriptor to read or write it. Only regular files and directories can be opened."""
        mode = self.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.ELOOP if stat.S_ISLNK(mode) else errno.EOPNOTSUPP, "not a file or directory")
        return os.open(self.proc, flags & OPEN_FLAGS | os.O_CLOEXEC | os.O_NONBLOCK)

    def link(self, node: Node, name: bytes) -> None:
        """Another name for *node*: by a path that leads to it alone, a symbolic link itself too."""
        os.link(node.proc, check_name(name), dst_dir_fd=self.fd, follow_symlinks=True)

    def unlink(self, name: bytes, *, directory: bool) -> None:
        (os.rmdir if directory else os.unlink)(check_name(name), dir_fd=self.fd)

    def rename(self, name: bytes, to: Node, new_name: bytes, flags: int = 0) -> None:
        """*flags* are renameat2(2)'s."""
        hostcalls.rename(self.fd, check_name(name), to.fd, check_name(new_name), flags)

    def place(self) -> tuple[Node, bytes]:
        """Parent and name, checked to be this very file still."""
        if self.parent is None:
            raise OSError(errno.EBUSY, "the root")
        there, here = os.stat(self.name, dir_fd=self.parent.fd, follow_symlinks=False), self.stat()
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise OSError(errno.ENOENT, "renamed meanwhile")
        return self.parent, self.name

    def readlink(self) -> bytes:
        return os.readlink(b"", dir_fd=self.fd)

    # attributes: of a symbolic link its own, for /proc/self/fd leads to the link and no further

    def chmod(self, mode: int) -> None:
        found = self.stat().st_mode
        if stat.S_ISLNK(found):  # older kernels change it
            raise OSError(errno.EOPNOTSUPP, "a link")
        os.chmod(self.proc, mode & (MODE | stat.S_ISGID if stat.S_ISDIR(found) else MODE))

    def chown(self, user: int, group: int) -> None:
        """Change the owner where the host allows it and has it; where it does not, ownership stays as it is."""
        try:
            os.chown(self.proc, user, group)
        except OSError as error:  # EINVAL: a user that this process's user namespace has not
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):
                raise

    def truncate(self, size: int) -> None:
        if not stat.S_ISREG(self.stat().st_mode):
            raise OSError(errno.EINVAL, "not a file")
        os.truncate(self.proc, size)

    def utime(self, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
        """Set times, as :func:`cardcage_virtio.share.hostcalls.set_times`."""
        hostcalls.set_times(self.proc, accessed, modified)

    def entries(self, fd: int) -> list[tuple[bytes, bytes, int]]:
        """Names of the directory open as *fd*, with qid and type as ``readdir`` gives it."""
        parent = self.parent or self
        found = [(b".", self.qid(), 4), (b"..", parent.qid(), 4)]
        device = self.stat().st_dev
        for name, inode, kind in hostcalls.entries(fd):
            number = inode ^ device << 40 & (1 << 64) - 1
            found.append((name, pack("<BIQ", {10: 2, 4: 0x80}.get(kind, 0), 0, number), kind))
        return found


def shared_root(path: str, most: int | None = None) -> Node:
    """As :meth:`Node.root`; raises ConfigError with the key ``path``."""
    try:
        return Node.root(path, most)
    except OSError as error:
        raise ConfigError(f"path {path}: {error.strerror}", key="path") from error
    except ValueError as error:  # a NUL, or a letter that the locale cannot say
        raise ConfigError(f"path {path!r}: {error}", key="path") from error


def guests_errno(error: OSError) -> int:
    """The error that the guest hears: that this process has no descriptor left is none of the guest's processes."""
    return {None: errno.EIO, errno.EMFILE: errno.ENFILE}.get(error.errno, error.errno) or errno.EIO


def names_of(at: Any) -> tuple[bytes, ...]:
    """Names from the root to what has ``parent`` and ``name``, the last :data:`DEPTH_MAX`."""
    names: list[bytes] = []
    while at.parent is not None and len(names) < DEPTH_MAX:
        names.append(at.name)
        at = at.parent
    return tuple(reversed(names))


class Listings:
    """Listings of directories as of their first read, by reader: few, and not too long together.

    One that was put away is read again, from the same place on.
    """

    MOST, ROWS = 64, 1 << 18

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()

    def rows(self, reader: Any, read: Callable[[], list[Any]], *, fresh: bool) -> list[Any]:
        """The rows for *reader*; *fresh*: as they are now."""
        found = None if fresh else self._kept.get(reader)
        if found is None:
            self._kept.pop(reader, None)
            found = self._kept[reader] = read()
            while len(self._kept) > 1 and (
                len(self._kept) > self.MOST or sum(map(len, self._kept.values())) > self.ROWS
            ):
                del self._kept[next(iter(self._kept.keys()))]
        return found


def qid_of(found: os.stat_result) -> bytes:
    """Type, version and path of a file."""
    kind = 0x80 if stat.S_ISDIR(found.st_mode) else 2 if stat.S_ISLNK(found.st_mode) else 0
    version = (found.st_mtime_ns ^ found.st_size << 8) & 0xFFFFFFFF
    return pack("<BIQ", kind, version, found.st_ino ^ found.st_dev << 40 & (1 << 64) - 1)

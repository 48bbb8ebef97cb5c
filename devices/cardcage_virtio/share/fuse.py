"""FUSE messages as virtio-fs carries them (Linux ``include/uapi/linux/fuse.h``, protocol 7.31; virtio 1.2, 5.11)."""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from struct import Struct

__all__ = [
    "ATTR",
    "DIRENT",
    "ENTRY",
    "IN_HEADER",
    "IO",
    "MAJOR",
    "MINOR",
    "OUT_HEADER",
    "Args",
    "Init",
    "Op",
    "Set",
    "attributes",
    "io_of",
    "part",
]

MAJOR, MINOR = 7, 31
IN_HEADER = Struct("<IIQQIIII")
"""len opcode unique nodeid uid gid pid padding"""
OUT_HEADER = Struct("<IiQ")
"""len error unique"""
IO = Struct("<QQIIQII")
"""fh offset size flags lock_owner flags padding: ``struct fuse_read_in``, which ``fuse_write_in`` is alike"""
ENTRY = Struct("<QQQQII")
"""nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec, before the attributes"""
ATTR = Struct("<6Q10I")
DIRENT = Struct("<QQII")
"""ino off namelen type, before the name, padded to 8"""


class Op(IntEnum):
    """``enum fuse_opcode``, what is served."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51


class Init:
    """Flags of ``FUSE_INIT`` that this server asks for where the guest has them."""

    ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, AUTO_INVAL_DATA = 1 << 0, 1 << 3, 1 << 5, 1 << 12
    READDIRPLUS, READDIRPLUS_AUTO, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES = 1 << 13, 1 << 14, 1 << 15, 1 << 18, 1 << 22
    WANTED = (
        ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | AUTO_INVAL_DATA | READDIRPLUS | READDIRPLUS_AUTO | ASYNC_DIO
    ) | (PARALLEL_DIROPS | MAX_PAGES)


class Set:
    """``FATTR_*``: what a ``SETATTR`` sets."""

    MODE, UID, GID, SIZE, ATIME, MTIME, FH, ATIME_NOW, MTIME_NOW = (1 << at for at in range(9))


class Args:
    """The body of a request, read field by field; OSError EINVAL when it ends too soon."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, form: Struct) -> tuple[int, ...]:
        """The next fields."""
        end = self._at + form.size
        if end > len(self._data):
            raise OSError(errno.EINVAL, "message cut short")
        found: tuple[int, ...] = form.unpack_from(self._data, self._at)
        self._at = end
        return found

    def name(self) -> bytes:
        """The next string, which a NUL ends."""
        end = self._data.find(b"\0", self._at)
        if end < 0:
            raise OSError(errno.EINVAL, "a name without an end")
        found, self._at = self._data[self._at : end], end + 1
        return found

    def rest(self) -> bytes:
        """All that is left."""
        found, self._at = self._data[self._at :], len(self._data)
        return found


def attributes(found: os.stat_result) -> bytes:
    """``struct fuse_attr``. The inode number tells devices of the host apart, as the guest sees only one."""
    times = [divmod(moment, 1_000_000_000) for moment in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    return ATTR.pack(
        number(found),
        found.st_size,
        found.st_blocks,
        *(seconds & (1 << 64) - 1 for seconds, _ in times),
        *(rest for _, rest in times),
        found.st_mode,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        minor & 0xFF | major << 8 | (minor & ~0xFF) << 12,
        found.st_blksize,
        0,
    )


def number(found: os.stat_result) -> int:
    """The inode number that the guest sees."""
    return found.st_ino ^ found.st_dev << 40 & (1 << 64) - 1


def io_of(head: bytes) -> tuple[int, ...]:
    """The fields of a READ or WRITE, of a message's first bytes. Raises OSError EINVAL."""
    if len(head) < IN_HEADER.size + IO.size:
        raise OSError(errno.EINVAL, "message cut short")
    found: tuple[int, ...] = IO.unpack_from(head, IN_HEADER.size)
    return found


def part(views: list[memoryview], skip: int, size: int) -> list[memoryview]:
    """Views of *size* bytes, or what there is, from *skip* on."""
    found: list[memoryview] = []
    for view in views:
        piece = view[skip:][:size]
        skip, size = max(skip - len(view), 0), size - len(piece)
        if len(piece):
            found.append(piece)
        if size <= 0:
            break
    return found

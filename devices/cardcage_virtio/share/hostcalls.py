"""System calls of Linux that :mod:`os` lacks or has only in part."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from functools import cache
from typing import Any

__all__ = [
    "NOW",
    "OMIT",
    "RENAME_EXCHANGE",
    "entries",
    "fallocate",
    "is_local",
    "list_attributes",
    "most_files",
    "open_cached",
    "rename",
    "set_times",
]

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 0x10
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2
"""In place of nanoseconds for :func:`set_times`: the host's time now, and no change."""
SYS_OPENAT2 = 437
NO_XDEV, CACHED = 1, 0x20
LOCAL = {0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs", 0x794C7630: "overlay"}


FILES = 1 << 18
"""Descriptors that are asked for, where the host allows them: a guest may hold half of them open."""
ATTRIBUTES = 1 << 16
"""The longest list of extended attributes (``XATTR_LIST_MAX``)."""
DIRENT = struct.Struct("<QqHB")
"""ino off reclen type, before the name: ``struct linux_dirent64``"""


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def rename(from_fd: int, name: bytes, to_fd: int, new_name: bytes, flags: int) -> None:
    """renameat2(2) with the flags that Linux 6.1 has. Raises OSError, EINVAL for other flags."""
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT):
        raise OSError(errno.EINVAL, "flags of rename")
    _check(_libc().renameat2(from_fd, name, to_fd, new_name, ctypes.c_uint(flags)))


def open_cached(fd: int, name: bytes, flags: int) -> int:
    """openat2(2) of what is on the same file system, and only if it takes no waiting for a disk.

    Raises OSError, ENOENT for what is known not to be there; others say nothing: before Linux 5.12 there are no others.
    """
    how = _How(flags, 0, NO_XDEV | CACHED)
    found: int = _libc().syscall(SYS_OPENAT2, fd, name, ctypes.byref(how), ctypes.sizeof(how))
    _check(found)
    return found


def is_local(fd: int) -> bool:
    """True if *fd* is on a file system that asks no other machine or process about its files."""
    about = (ctypes.c_uint64 * 64)()
    return _libc().fstatfs(fd, about) == 0 and about[0] in LOCAL


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with what a guest's kernel may ask for: to allocate, punch a hole, or zero. Raises OSError."""
    if mode & ~(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE):
        raise OSError(errno.EOPNOTSUPP, "mode of fallocate")
    if max(offset, length, offset + length) >= 1 << 63:
        raise OSError(errno.EFBIG, "beyond the end of any file")
    _check(_libc().fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def set_times(path: str, accessed: tuple[int, int], modified: tuple[int, int]) -> None:
    """utimensat(2): (seconds, nanoseconds) each, with :data:`NOW` or :data:`OMIT` as nanoseconds. Raises OSError."""
    for seconds, _ in (accessed, modified):
        if not -(1 << 63) <= seconds < 1 << 63:
            raise OSError(errno.EINVAL, "no time")
    _check(_libc().utimensat(-100, path.encode(), (_Time * 2)(_Time(*accessed), _Time(*modified)), 0))


def entries(fd: int) -> list[tuple[bytes, int, int]]:
    """Name, inode number and type (``DT_*``) of what is in the directory open as *fd*, but for ``.`` and ``..``.

    :func:`os.scandir` gives names in the locale's encoding, which may not lead back, and only some types.
    """
    found: list[tuple[bytes, int, int]] = []
    os.lseek(fd, 0, os.SEEK_SET)
    room = ctypes.create_string_buffer(1 << 15)
    while True:
        size: int = _libc().getdents64(fd, room, len(room))
        if not size or (size < 0 and ctypes.get_errno() == errno.ENOENT):  # the directory was removed
            return found
        _check(size)
        data, at = room.raw[:size], 0
        while at < size:
            inode, _, length, kind = DIRENT.unpack_from(data, at)
            name = data[at + DIRENT.size : data.index(b"\0", at + DIRENT.size)]
            if name not in (b".", b".."):
                found.append((name, inode, kind))
            at += length


def list_attributes(path: str) -> list[bytes]:
    """listxattr(2): :func:`os.listxattr` gives names in the locale's encoding. Raises OSError."""
    room = ctypes.create_string_buffer(ATTRIBUTES)
    size: int = _libc().listxattr(path.encode(), room, ATTRIBUTES)
    _check(size)
    return room.raw[:size].split(b"\0")[:-1]


def most_files() -> int:
    """How many descriptors this process may have, after its soft limit was raised as far as it can be.

    The soft limit is usually 1024, for programs that use select(2), and would be the guest's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most

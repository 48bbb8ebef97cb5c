"""Image locking, by QEMU's own scheme, so that neither two machines nor a machine and qemu write one image.

QEMU (block/file-posix.c) keeps an open-file-description read lock on byte 100 + n for each permission n that it uses,
and on byte 200 + n for each that it lets nobody else have; whoever takes one checks the other byte for a holder.
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import Struct

from cardcage.errors import HostError

__all__ = ["lock_image", "unlock_image"]

CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3
USED, UNSHARED = 100, 200

_FLOCK = Struct("hhqqi4x")  # struct flock of x86-64: type, whence, start, length, pid
_NOT_SUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def _held(fd: int, byte: int) -> bool:
    """True if another open file holds a lock on *byte*."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def lock_image(fd: int, path: str, *, write: bool, required: bool) -> bool:
    """Lock *fd* until it is closed, against writers, and with *write* against readers too.

    Args:
        required: raise when the file system has no such locks; else return False.

    Raises :exc:`~cardcage.errors.HostError` when another process, or this one, already uses the image.
    """
    used = (CONSISTENT_READ, WRITE, RESIZE) if write else (CONSISTENT_READ,)
    unshared = (WRITE, RESIZE)
    try:
        # Taken first and looked at afterwards, so that of two who come at once at least one sees the other.
        for byte in [USED + one for one in used] + [UNSHARED + one for one in unshared]:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        if any(_held(fd, USED + one) for one in unshared):
            raise HostError(f"{path}: another process, or another disk of this one, is writing this image")
        if any(_held(fd, UNSHARED + one) for one in used):
            raise HostError(f"{path}: in use elsewhere, where it must not change: open it readonly")
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise HostError(f"{path}: locked by another process") from error
        if error.errno in _NOT_SUPPORTED and not required:
            return False
        raise HostError(f"{path}: cannot be locked: {error.strerror}") from error
    return True


def unlock_image(fd: int) -> None:
    """Take all of :func:`lock_image`'s locks off *fd*; none is there on a file system without them."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, USED, 2 * (UNSHARED - USED), 0))
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise

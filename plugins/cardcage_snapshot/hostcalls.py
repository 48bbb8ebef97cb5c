"""Calls of the kernel that copy between files, share their blocks, and make holes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import suppress
from functools import cache
from typing import Any

__all__ = ["clone", "copy_range", "punch", "write_whole"]

FICLONE = 0x40049409
KEEP_SIZE, PUNCH_HOLE = 1, 2
PIECE = 1 << 26


@cache
def _fallocate() -> Any:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


def punch(fd: int, offset: int, size: int) -> None:
    """Make a range a hole. Raises OSError."""
    if _fallocate()(fd, KEEP_SIZE | PUNCH_HOLE, offset, size):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write_whole(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of *data*: at the end of a disk's room, a call may write a part. Raises OSError."""
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def clone(source: int, target: int) -> bool:
    """Let a file share all blocks of another, each written separately from now on; False where that cannot be."""
    with suppress(OSError):
        fcntl.ioctl(target, FICLONE, source)
        return True
    return False


def copy_range(source: int, target: int, offset: int, size: int) -> None:
    """Copy a range to the same place in another file, inside the kernel where it can. Raises OSError."""
    while size:
        done = 0
        try:
            done = os.copy_file_range(source, target, min(size, PIECE), offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
                raise
        if not done:
            data = os.pread(source, min(size, PIECE), offset)
            if not data:
                raise OSError(errno.EIO, "the file became shorter")
            done = os.pwrite(target, data, offset)
        offset, size = offset + done, size - done

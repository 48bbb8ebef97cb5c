"""A private copy of an open file, in its place: what a forked machine writes to its disk is its own.

It has no name, and ends with its last descriptor. File systems that can (xfs, btrfs) share the blocks; others copy what
is no hole, up to :data:`MOST`.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import tempfile
from contextlib import suppress
from typing import Any

from cardcage.abilities import has
from cardcage.device import Forkable
from cardcage.security import HasNeeds, Needs
from cardcage.units import say_size
from cardcage_jail import open_file

__all__ = ["MOST", "CopiedImage", "folder_of", "obstacle", "replace"]

FICLONE = 0x40049409
MOST = 256 << 20
"""Bytes that are copied: the machine stands still meanwhile."""


class CopiedImage:
    """An image whose file a copy of the machine has for itself; what is below it nobody writes. What waits in memory to
    be written does so in both processes."""

    def may_fork(self) -> str:
        file = self._copied()
        return file.may_fork() if has(file, Forkable) else f"{file.path}: nothing is known of how it could be copied"

    def forked(self) -> None:
        """From now on the guest writes into this process's own file."""
        if has(file := self._copied(), Forkable):
            file.forked()

    def needs(self) -> Needs:
        """The folder in which a copy of the machine has its own file."""
        return file.needs() if has(file := self._copied(), HasNeeds) else Needs()

    def is_at(self, path: str) -> bool:
        """True where *path* is the open image's: not once it was replaced there, nor in a forked process."""
        try:
            return os.path.samestat(os.fstat(self._copied().fd), os.stat(path))
        except OSError:
            return False

    def _copied(self) -> Any:
        return vars(self)["_file"]


def obstacle(fd: int, path: str) -> str:
    """In one line why there can be no copy of *fd*'s file; empty when there can."""
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        return f"{path}: a block device cannot be copied; a copy can share a drive that is readonly or shared"
    size = about.st_blocks * 512
    try:
        made = _nameless(fd)
    except OSError as error:
        return f"{path}: no copy can be made beside it: {error.strerror}"
    try:
        if size <= MOST or _cloned(made, fd):
            return ""
    finally:
        os.close(made)
    return (
        f"{path}: its {say_size(size)} would be copied, {say_size(MOST)} at most are: put an overlay over it "
        "(cardcage image create -b), or it on a file system that shares blocks (xfs, btrfs)"
    )


def replace(fd: int) -> None:
    """Let *fd* be a copy of its file. Raises OSError, and then nothing has changed."""
    made = _nameless(fd)
    try:
        if not _cloned(made, fd):
            _copy(made, fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(made, fcntl.F_SETFL, flags)
        os.dup2(made, fd, inheritable=False)
    finally:
        os.close(made)


def folder_of(fd: int) -> str:
    """The folder of an open file; where that is gone, as a restored machine's overlays are, the nearest one above."""
    folder = os.path.dirname(os.readlink(f"/proc/self/fd/{fd}"))
    while not os.path.isdir(folder) and len(folder) > 1:
        folder = os.path.dirname(folder)
    return folder


def _nameless(fd: int) -> int:
    """A new file without a name in the folder of *fd*'s."""
    folder = folder_of(fd)
    try:
        return open_file(folder, os.O_TMPFILE | os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    made, path = tempfile.mkstemp(dir=folder, prefix=".copy-")
    os.unlink(path)
    return made


def _cloned(made: int, fd: int) -> bool:
    try:
        fcntl.ioctl(made, FICLONE, fd)
    except OSError:  # it cannot, by whichever of its names
        return False
    return True


def _copy(made: int, fd: int) -> None:
    size = os.fstat(fd).st_size
    os.ftruncate(made, size)
    try:
        source = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # an offset of its own, and no O_DIRECT
    except PermissionError:  # in a jail
        source = os.dup(fd)  # nobody reads or writes at its offset
    try:
        end = 0
        while True:
            with suppress(OSError):  # ENXIO: a hole up to the end
                start = os.lseek(source, end, os.SEEK_DATA)
                end = os.lseek(source, start, os.SEEK_HOLE)
                _copy_piece(made, source, start, end)
                continue
            return
    finally:
        os.close(source)


def _copy_piece(made: int, source: int, at: int, end: int) -> None:
    while at < end:
        size = -(-(end - at) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole blocks, for O_DIRECT: past the end is nothing
        done = os.sendfile(made, source, at, size) if os.lseek(made, at, os.SEEK_SET) == at else 0
        if not done:
            return
        at += done

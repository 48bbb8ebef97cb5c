"""RAM in a file: on tmpfs, on a disk, on hugetlbfs, or a DAX device.

The file is locked (flock) for as long as the machine lives, so that no second machine uses it. A plain file cannot be
sealed: when somebody cuts it short, or its file system runs full, the machine that uses it stops with an error that
says so, and the process lives (the guard of :mod:`cardcage.ram`).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from pathlib import Path

from attrs import frozen
from cardcage.errors import ConfigError
from cardcage.ram import PAGE, Backing
from cardcage.units import say_size

__all__ = ["File", "FileOptions"]

TMPFS, HUGETLBFS = 0x01021994, 0x958458F6
"""``f_type`` of statfs(2)."""


@frozen
class FileOptions:
    """Options of memory back end ``file``.

    Attributes:
        path: a file, made when it does not exist; of a directory, a file without a name in it; or a character device
            (``/dev/dax0.0``). What a file holds is the guest's memory at the start.
        shared: guest writes go to the file; else they stay in this process, and the file is a template.
    """

    path: Path
    shared: bool = True


class File:
    """RAM in a file."""

    def __init__(self, options: FileOptions) -> None:
        self.options = options

    @property
    def takes_ram(self) -> bool:
        """A file on a disk can be written out when the host runs short; a file on tmpfs, or a private copy, cannot."""
        where = self.options.path if self.options.path.exists() else self.options.path.absolute().parent
        return not self.options.shared or _file_system(where) == TMPFS

    def allocate(self, size: int, name: str, /) -> Backing:
        fd, made = self._open()
        try:
            page = self._fit(fd, size, made)
            return self._map(fd, size, page)
        except BaseException as error:
            os.close(fd)
            if made:
                self.options.path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._problem(error) from error
            raise

    def _problem(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.options.path}: {error.strerror}", key="path")

    def _open(self) -> tuple[int, bool]:
        """The file, locked, and whether it was made now."""
        path, made = self.options.path, False
        writing = os.O_RDWR if self.options.shared else os.O_RDONLY
        try:
            if path.is_dir():
                return os.open(path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), False
            try:
                fd = os.open(path, writing | os.O_CLOEXEC)
            except FileNotFoundError:
                fd, made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True
        except OSError as error:
            raise self._problem(error) from error
        try:
            # A template may be shared by readers; whoever writes has it alone.
            fcntl.flock(fd, (fcntl.LOCK_EX if self.options.shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise ConfigError(f"{path}: another machine uses it (it is locked)", key="path") from error
        return fd, made

    def _fit(self, fd: int, size: int, made: bool) -> int:
        """See that the file has *size* bytes; returns the least unit in which its memory is taken."""
        path, info = self.options.path, os.fstat(fd)
        if stat.S_ISCHR(info.st_mode):
            return PAGE
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path}: expected a file, a directory or a character device", key="path")
        where = os.fstatvfs(fd)
        page = where.f_bsize if _file_system(path) == HUGETLBFS else PAGE
        if size % page:
            raise ConfigError(f"{path}: its pages are {say_size(page)}, of which RAM must be a multiple", key="path")
        if not info.st_size and (made or self.options.shared):
            free = where.f_bavail * where.f_frsize
            if size > free:
                raise ConfigError(
                    f"{path}: {say_size(size)} are needed, its file system has {say_size(free)} left", key="path"
                )
            os.ftruncate(fd, size)
        elif info.st_size < size:
            raise ConfigError(
                f"{path}: it has {say_size(info.st_size)}, and machine.memory is {say_size(size)}; an empty file grows",
                key="path",
            )
        return page

    def _map(self, fd: int, size: int, page: int) -> Backing:
        if self.options.shared:
            mapped = mmap.mmap(fd, size, mmap.MAP_SHARED)
            return Backing(mapped, fd, page, mmap.MADV_REMOVE, guarded=True)
        mapped = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        # Given back, its pages would read as the file has them, not as zeros: so nothing is. The lock stays with fd.
        return Backing(mapped, -1, page, None, guarded=True, release=lambda: os.close(fd))


def _file_system(path: Path) -> int:
    """``f_type`` of the file system that *path* is on."""
    buffer = (ctypes.c_long * 32)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(path), buffer):
        return 0
    return int(buffer[0])

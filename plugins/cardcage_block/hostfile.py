"""A file or block device of the host: short transfers, direct I/O and holes are its business."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import stat
import threading
from functools import cache
from struct import unpack
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.errors import ConfigError, HostError
from cardcage.security import Needs
from cardcage.segments import Segments
from cardcage_jail import open_file

from cardcage_block import private
from cardcage_block.vector import preadv, pwritev

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.backends import BlockInfo

__all__ = ["File", "HostFile", "Image", "TryFile", "clear", "scatter", "take", "zeros"]

SECTOR = 512
IOV_MAX = 1024
OWN = re.compile(r"/proc/self/fd/([0-9]{1,9})")
WAITED = 0.001
"""Seconds: a write into the page cache that takes longer has waited for something."""
COPIED = 1e-9
"""Seconds that a byte of it may take besides."""
CALM = (64, 4096)
"""So many writes in a row must not have waited before one is tried where nobody may wait; twice as many after one that
did, up to the second."""
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16

_ZEROS = memoryview(bytes(1 << 21))


def zeros(length: int) -> memoryview:
    """*length* zero bytes, 0 to 2 MiB, that cost nothing."""
    return _ZEROS[:length]


def take(buffers: Sequence[memoryview], start: int, length: int) -> Sequence[memoryview]:
    """The buffers that cover bytes *start* to *start* + *length* of *buffers* as one run."""
    if type(buffers) is Segments and not start and length == buffers.size:
        return buffers
    found: list[memoryview] = []
    for buffer in buffers:
        size = len(buffer)
        if start >= size:
            start -= size
            continue
        piece = buffer if not start and size <= length else buffer[start : start + length]
        found.append(piece)
        length -= len(piece)
        start = 0
        if not length:
            break
    return found


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Fill *buffers* one after another from *data*, which is as long as all of them."""
    for buffer in buffers:
        buffer[:] = data[: len(buffer)]
        data = data[len(buffer) :]


def clear(buffers: Sequence[memoryview]) -> None:
    """Fill *buffers* with zeros."""
    for buffer in buffers:
        for at in range(0, len(buffer), len(_ZEROS)):
            buffer[at : at + len(_ZEROS)] = zeros(min(len(_ZEROS), len(buffer) - at))


class File(Protocol):
    """The file below an image format. All offsets and lengths are bytes; errors are :exc:`OSError`."""

    path: str

    def read(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> None:
        """Fill *buffers*, *length* bytes in all; what lies past the end reads as zeros."""

    def write(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> None: ...

    def sync(self) -> None:
        """Return once all that was written is on stable storage."""

    def size(self) -> int: ...

    def truncate(self, size: int, /) -> None: ...

    def punch(self, offset: int, length: int, /) -> bool:
        """Give the range back to the host, to read as zeros; False when the host cannot."""

    def zero(self, offset: int, length: int, /) -> None:
        """Make the range zeros and keep it allocated where the host can."""

    def close(self) -> None: ...


class TryFile(Protocol):
    """A file that can tell whether an act takes waiting; False when it does, and then nothing counts."""

    def try_read(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> bool: ...

    def try_write(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> bool: ...


class Image(Protocol):
    """A block back end that can also say where its data is."""

    @property
    def info(self) -> BlockInfo: ...

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None: ...

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None: ...

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int, /) -> None: ...

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None: ...

    def close(self) -> None: ...

    def data(self, offset: int, end: int, /) -> tuple[bool, int]:
        """Tell if there may be data at *offset* (else zeros), and where that stretch ends, at most *end*."""


@cache
def _fallocate() -> Any:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


def _allocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2); False where the file system has no such mode. Raises OSError for any other failure."""
    while _fallocate()(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def _fits(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _open(path: str, flags: int) -> int:
    """As :func:`open_file`; a descriptor of this process by its name (``/proc/self/fd/N``) also where it is all that
    the process may use of the file, as in a jail: what both say of the file is then shared. Raises OSError."""
    try:
        return open_file(path, flags)
    except PermissionError:
        if (found := OWN.fullmatch(path)) is None:
            raise
        fd = int(found[1])
        status = fcntl.fcntl(fd, fcntl.F_GETFL)
        if status & os.O_ACCMODE not in (os.O_RDWR, flags & os.O_ACCMODE) or (flags & ~status) & os.O_DIRECT:
            raise
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


class HostFile:
    """A regular file or block device. Thread-safe.

    Args:
        path: of the file.
        writable: open it for writing too.
        direct: go past the host's page cache (O_DIRECT); misaligned requests go through a bounce buffer.
        stable: carry out :meth:`sync`; False trades the data on a host crash for speed (QEMU: ``cache=unsafe``).

    ``alignment`` is what direct I/O wants offsets and lengths to be multiples of: 512 or 4096, 1 without direct I/O.

    Raises :exc:`~cardcage.errors.ConfigError` when there is no such file, it is of another kind or may not be opened,
    and :exc:`~cardcage.errors.HostError` when its file system has no direct I/O.
    """

    def __init__(self, path: str, *, writable: bool, direct: bool = False, stable: bool = True) -> None:
        self.path, self._direct, self.stable = path, direct, stable
        self.shared = False  # with other machines, which may write it too
        self.lock: tuple[bool, bool] | None = None  # against readers too, and whether one is insisted on
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not hang us
        try:
            if not _fits(os.stat(path).st_mode):  # before it is opened: that alone does something to some devices
                raise ConfigError("neither a regular file nor a block device", file=path)
            self.fd = _open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                raise HostError(f"{path}: its file system has no direct I/O: use cache=writeback") from error
            raise ConfigError(f"cannot be opened: {error.strerror}", file=path) from error
        except ValueError as error:
            raise ConfigError(f"not a file name: {error}", file=repr(path)) from error
        mode = os.fstat(self.fd).st_mode
        if not _fits(mode):
            os.close(self.fd)
            raise ConfigError("neither a regular file nor a block device", file=path)
        self.device = stat.S_ISBLK(mode)
        self.alignment = self._find_alignment() if direct else 1
        self._edges = threading.Lock()  # read-modify-write of blocks that a request covers in part
        self._closing = threading.Lock()
        self._nowait = self._nowait_writes = True
        self._lost: str | None = None
        self._doubt, self._doubts = CALM[0], CALM[0]

    def may_fork(self) -> str:
        """Why a forked process cannot have its own (:class:`~cardcage.device.Forkable`); empty when it can."""
        return "" if self._stays else private.obstacle(self.fd, self.path)

    def needs(self) -> Needs:
        """The folder in which a forked process makes its own (:class:`~cardcage.security.HasNeeds`)."""
        return Needs() if self._stays else Needs(scratch=(private.folder_of(self.fd),))

    def forked(self) -> None:
        """This is a forked process: what was written so far is in its own file, which ends with it."""
        if not self._stays:
            private.replace(self.fd)

    @property
    def _stays(self) -> bool:
        return self.shared or fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    def _find_alignment(self) -> int:
        if self.device:
            return max(SECTOR, int(unpack("i", fcntl.ioctl(self.fd, BLKSSZGET, bytes(4)))[0]))
        with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view, view[:SECTOR] as sector:
            try:
                os.preadv(self.fd, [sector], SECTOR)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return mmap.PAGESIZE
                raise HostError(f"{self.path}: {error.strerror}") from error
        return SECTOR

    def read(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> None:
        """Fill *buffers*, *length* bytes in all."""
        try:
            done = preadv(self.fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or (not self._direct and len(buffers) <= IOV_MAX):
                raise
            done = 0
        if done != length:
            self._read_rest(offset, take(buffers, done, length - done), done, length)

    def try_read(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> bool:
        """Fill *buffers* if the page cache has all of it; else False, with part of them filled perhaps."""
        if self._direct or not self._nowait:
            return False
        try:
            return preadv(self.fd, buffers, offset, os.RWF_NOWAIT) == length
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._nowait = False  # a file system that cannot tell
            return False

    def at_hand(self) -> tuple[int, int, int]:
        """The descriptor, and the flags of preadv2(2) and pwritev2(2) by which :meth:`try_read` and :meth:`try_write`
        would act now; below 0 where they would not. Of writes, whole pages only."""
        if self._direct:
            return self.fd, -1, -1
        writes = os.RWF_NOWAIT if self._nowait_writes else -1 if self._doubt else 0
        return self.fd, os.RWF_NOWAIT if self._nowait else -1, writes

    def took(self, seconds: float, size: int) -> None:
        """Writes of *size* bytes into the page cache took so long."""
        if not self._nowait_writes and seconds > WAITED + size * COPIED:
            self._doubts = min(2 * self._doubts, CALM[1])
            self._doubt = self._doubts

    def _read_rest(self, offset: int, left: Sequence[memoryview], done: int, length: int) -> None:
        """The uncommon ways: more buffers than the kernel takes, misaligned direct I/O, a short read, the end."""
        while done < length:
            if self._direct:
                got = self._read_bounced(offset + done, left, length - done)
            else:
                got = preadv(self.fd, left[:IOV_MAX], offset + done)
            left, done = take(left, got, length - done - got), done + got
            if not got:
                clear(left)
                return

    def _read_bounced(self, offset: int, buffers: Sequence[memoryview], length: int) -> int:
        low, high = self._widen(offset, length)
        got = 0
        with mmap.mmap(-1, high - low) as page, memoryview(page) as view:
            have = 0
            while have < high - low:  # a direct read is short only at the end, where the next one gives nothing
                with view[have:] as rest:
                    piece = os.preadv(self.fd, [rest], low + have)
                have += piece
                if not piece or have % self.alignment:
                    break
            with view[offset - low : max(offset - low, min(have, offset - low + length))] as found:
                for buffer in buffers:
                    size = min(len(buffer), len(found) - got)
                    buffer[:size] = found[got : got + size]
                    got += size
        return got

    def write(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> None:
        """Write *buffers*, *length* bytes in all."""
        began = perf_counter()
        try:
            done = pwritev(self.fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or (not self._direct and len(buffers) <= IOV_MAX):
                raise
            done = 0
        if perf_counter() - began > WAITED:
            self._doubt = self._doubts
        elif self._doubt:
            self._doubt -= 1
        while done < length:
            left = take(buffers, done, length - done)
            if self._direct:
                self._write_bounced(offset + done, left, length - done)
                return
            got = pwritev(self.fd, left[:IOV_MAX], offset + done)
            if not got:
                raise OSError(errno.EIO, "the host wrote nothing")
            done += got

    def try_write(self, offset: int, buffers: Sequence[memoryview], length: int, /) -> bool:
        """Write *buffers* if the page cache takes them at once; else False, with part of them written perhaps.

        File systems that can tell (xfs, btrfs: RWF_NOWAIT) never wait here. Of others it is expected from how long the
        last writes took, so one write in some hundreds can wait while the host throttles those who write.
        """
        if self._direct or (offset | length) & mmap.PAGESIZE - 1:  # part of a page may have to be read first
            return False
        if self._nowait_writes:
            try:
                return pwritev(self.fd, buffers, offset, os.RWF_NOWAIT) == length
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    return False
                self._nowait_writes = False
        if self._doubt:
            return False
        began = perf_counter()
        done = pwritev(self.fd, buffers, offset)
        self.took(perf_counter() - began, done)
        return done == length

    def _write_bounced(self, offset: int, buffers: Sequence[memoryview], length: int) -> None:
        low, high = self._widen(offset, length)
        with self._edges, mmap.mmap(-1, high - low) as page, memoryview(page) as view:
            before = self.size()
            if (low, high) != (offset, offset + length):
                self._read_bounced(low, [view], high - low)
            at = offset - low
            for buffer in buffers:
                view[at : at + len(buffer)] = buffer
                at += len(buffer)
            done = 0
            while done < high - low:
                with view[done:] as rest:
                    done += os.pwritev(self.fd, [rest], low + done)
                if done % self.alignment:
                    raise OSError(errno.EIO, "the host wrote part of a block")
            # Only what the widening itself added goes: the file may meanwhile have grown by another's write.
            if not self.device and before < high and offset + length < high == self.size():
                os.ftruncate(self.fd, max(before, offset + length))

    def _widen(self, offset: int, length: int) -> tuple[int, int]:
        mask = self.alignment - 1
        return offset & ~mask, (offset + length + mask) & ~mask

    def sync(self) -> None:
        """fdatasync(2), unless the file was opened as not stable. Raises OSError (EIO), from then on each time."""
        if not self.stable:
            return
        if self._lost is None:
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                # The host has dropped what it could not write, and the next call would say that all is well (QEMU:
                # page_cache_inconsistent). So it is no want of room either, after which one may try again.
                self._lost = error.strerror
        if self._lost is not None:
            raise OSError(errno.EIO, f"the host could not make data stable: {self._lost}")

    def size(self) -> int:
        """Bytes in the file or device."""
        if self.device:
            return int(unpack("Q", fcntl.ioctl(self.fd, BLKGETSIZE64, bytes(8)))[0])
        return os.fstat(self.fd).st_size

    def truncate(self, size: int, /) -> None:
        """Set the size of a regular file; a device has to be large enough already (ENOSPC)."""
        if not self.device:
            os.ftruncate(self.fd, size)
        elif size > self.size():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def punch(self, offset: int, length: int, /) -> bool:
        """Give the range back to the host, to read as zeros."""
        return _allocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def zero(self, offset: int, length: int, /) -> None:
        """Make the range zeros."""
        if _allocate(self.fd, ZERO_RANGE, offset, length):
            return
        while length:
            size = min(length, len(_ZEROS))
            self.write(offset, [zeros(size)], size)
            offset, length = offset + size, length - size

    def data(self, offset: int, end: int) -> tuple[bool, int]:
        """Tell if *offset* lies in data (else in a hole), and where that stretch ends, at most *end*."""
        try:
            start = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False, end
            return True, end  # a file system or device that knows no holes
        if start > offset:
            return False, min(start, end)
        return True, min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)

    def close(self) -> None:
        """Idempotent."""
        with self._closing:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

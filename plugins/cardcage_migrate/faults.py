"""Pages that are not there yet: who touches one waits, by userfaultfd(2), until somebody puts it there.

The kernel's own accesses count too (a disk that is read into guest memory, KVM), so it takes a right that not every
user has: the syscall for who may trace others or where ``vm.unprivileged_userfaultfd`` says so, or /dev/userfaultfd.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress
from typing import Any

from cardcage.errors import HostError

__all__ = ["Faults", "open_faults"]

USERFAULTFD, DEVICE = 323, "/dev/userfaultfd"
DEVICE_NEW, API = 0xAA00, 0xAA
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
POISON = 1 << 14
"""UFFD_FEATURE_POISON: Linux 6.6."""
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0x8010AA02
UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_POISON = 0xC028AA03, 0xC020AA04, 0xC020AA08
MISSING = 1
MESSAGE = struct.Struct("<B7xQQQ")
PAGEFAULT = 0x12
MANY = 64
"""Messages that are read at once."""
_libc = ctypes.CDLL(None, use_errno=True)


def open_faults() -> int:
    """A descriptor that watches no memory yet. Raises HostError, in one line that says how it can be allowed."""
    fd = int(_libc.syscall(USERFAULTFD, FLAGS))
    if fd < 0:
        try:
            device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            try:
                fd = fcntl.ioctl(device, DEVICE_NEW, FLAGS)
            finally:
                os.close(device)
        except OSError as error:
            raise HostError(
                f"post-copy: this user may not catch faults of the kernel in memory that is missing: give it {DEVICE} "
                f"({error.strerror}), or set vm.unprivileged_userfaultfd=1"
            ) from error
    try:
        fcntl.ioctl(fd, UFFDIO_API, (ctypes.c_uint64 * 3)(API, POISON, 0))
    except OSError as error:
        os.close(fd)
        raise HostError("post-copy: it takes Linux 6.6 or later here (UFFDIO_POISON)") from error
    return fd


class Faults:
    """*size* bytes of memory at address *base*, of the process that opened *fd*; closes that."""

    def __init__(self, fd: int, base: int, size: int) -> None:
        self.fd, self._base, self._size = fd, base, size

    def register(self) -> None:
        """From now on, who touches a page that is not there waits. Raises OSError."""
        self._call(UFFDIO_REGISTER, self._base, self._size, MISSING, 0)

    def unregister(self) -> None:
        """Watch no longer; nobody waits any more. Raises OSError."""
        self._call(UFFDIO_UNREGISTER, self._base, self._size)

    def waited(self) -> list[int]:
        """Offsets of pages that somebody waits for, since the last call."""
        try:
            data = os.read(self.fd, MESSAGE.size * MANY)
        except BlockingIOError:
            return []
        found = []
        for event, _, address, _ in MESSAGE.iter_unpack(data):
            if event == PAGEFAULT:
                found.append((address - self._base) // 4096 * 4096)
        return found

    def put(self, offset: int, data: memoryview) -> None:
        """Put pages there, and wake who waits for them. Raises OSError: EEXIST where one is there already."""
        source = ctypes.addressof(ctypes.c_char.from_buffer(data))
        self._filled(UFFDIO_COPY, offset, len(data), source)

    def zero(self, offset: int, size: int) -> None:
        """Put pages of zeros there, and wake who waits. Raises OSError: EEXIST where one is there already."""
        self._filled(UFFDIO_ZEROPAGE, offset, size)

    def wake(self, offset: int, size: int) -> None:
        """Let who waits for these look again. Raises OSError."""
        self._call(UFFDIO_WAKE, self._base + offset, size)

    def poison(self, offset: int, size: int) -> None:
        """These never come: whoever touches them has an error, and nobody waits. Pages that are there stay. Raises
        OSError."""
        end = offset + size
        while offset < end:
            try:
                self._filled(UFFDIO_POISON, offset, end - offset)
                return
            except OSError as error:
                if error.errno != errno.EEXIST:
                    raise
                offset = self._at + 4096

    def _filled(self, request: int, offset: int, size: int, source: int | None = None) -> None:
        """Fill a range; what was interrupted goes on. Attribute ``_at``: how far it came."""
        end, self._at = offset + size, offset
        while self._at < end:
            left = end - self._at
            if source is None:
                words = (ctypes.c_int64 * 4)(self._base + self._at, left, 0, 0)
            else:
                words = (ctypes.c_int64 * 5)(self._base + self._at, source + self._at - offset, left, 0, 0)
            failed = _libc.ioctl(self.fd, ctypes.c_ulong(request), words)
            number = ctypes.get_errno()
            self._at += max(words[-1], 0)
            if failed and number != errno.EAGAIN:
                raise OSError(number, os.strerror(number))

    def _call(self, request: int, *words: int) -> Any:
        return fcntl.ioctl(self.fd, request, (ctypes.c_uint64 * len(words))(*words))

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

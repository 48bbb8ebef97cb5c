"""Pages that are not there yet, by userfaultfd(2): who touches one waits until somebody puts it there.

The kernel's own accesses count too (a disk that is read into guest memory, KVM), which not every user may catch.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from cardcage.ram import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_snapshot.pages import Run

__all__ = ["DEVICE", "Faults", "opened_faults"]

USERFAULTFD, DEVICE, DEVICE_NEW = 323, "/dev/userfaultfd", 0xAA00
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
UFFD_API, EVENT_REMOVE, POISON = 0xAA, 1 << 3, 1 << 14
API, REGISTER, UNREGISTER, WAKE = 0xC018AA3F, 0xC020AA00, 0x8010AA01, 0x8010AA02
COPY, ZEROPAGE, POISON_PAGES = 0xC028AA03, 0xC020AA04, 0xC020AA08
MISSING = 1
MESSAGE, FAULT, REMOVED = struct.Struct("<B7xQQQ"), 0x12, 0x15
MANY = 64
"""Messages that are read at once."""


def opened_faults(*, removals: bool = True) -> int:
    """A descriptor that watches no memory yet; *removals*: ranges that are given back are events, too.

    Raises OSError: EPERM or EACCES where this user may not, EINVAL before Linux 6.6.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(USERFAULTFD, FLAGS))
    if fd < 0:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fd = fcntl.ioctl(device, DEVICE_NEW, FLAGS)
        finally:
            os.close(device)
    try:
        fcntl.ioctl(fd, API, (ctypes.c_uint64 * 3)(UFFD_API, EVENT_REMOVE * removals | POISON, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


class Faults:
    """Memory of the process that opened *fd*: *size* bytes from address *base* on."""

    def __init__(self, fd: int, base: int, size: int) -> None:
        self.fd, self._base, self.size = fd, base, size
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl

    def register(self) -> None:
        """From now on, who touches a page that is not there waits. Raises OSError."""
        fcntl.ioctl(self.fd, REGISTER, (ctypes.c_uint64 * 4)(self._base, self.size, MISSING, 0))

    def unregister(self) -> None:
        """A page that is not there is zero again. Raises OSError."""
        fcntl.ioctl(self.fd, UNREGISTER, (ctypes.c_uint64 * 2)(self._base, self.size))

    def events(self) -> Iterator[tuple[bool, Run]]:
        """Events that nobody has read: (True, a page that is waited for), (False, a range that was given back)."""
        try:
            data = os.read(self.fd, MESSAGE.size * MANY)
        except BlockingIOError:
            return
        for event, one, two, _ in MESSAGE.iter_unpack(data):
            if event == FAULT:
                yield True, ((two - self._base) // PAGE * PAGE, PAGE)
            elif event == REMOVED:
                yield False, (one - self._base, two - one)

    def waited(self) -> list[int]:
        """Offsets of pages that somebody waits for, of the events that nobody has read."""
        return [offset for waits, (offset, _) in self.events() if waits]

    def put(self, offset: int, source: int, size: int, *, strict: bool = False) -> None:
        """Put pages there from address *source*; those that are there already stay. Who waits goes on.

        Raises BlockingIOError while ranges are being given back, until that is read of :meth:`events`; FileExistsError
        where one is there, if *strict*; OSError.
        """
        self._fill(COPY, offset, size, source, strict=strict)

    def zero(self, offset: int, size: int, *, strict: bool = False) -> None:
        """The same with zeros."""
        self._fill(ZEROPAGE, offset, size, strict=strict)

    def poison(self, offset: int, size: int) -> None:
        """The same with nothing: who touches them gets SIGBUS."""
        self._fill(POISON_PAGES, offset, size)

    def _fill(self, request: int, offset: int, size: int, source: int | None = None, *, strict: bool = False) -> None:
        at, end = offset, offset + size
        while at < end:
            words = [self._base + at, *(() if source is None else (source + at - offset,)), end - at, 0, 0]
            made = (ctypes.c_int64 * len(words))(*words)
            failed = self._ioctl(self.fd, ctypes.c_ulong(request), made)
            number = ctypes.get_errno()
            at += max(made[-1], 0)
            if failed and number == errno.EEXIST and not strict:
                fcntl.ioctl(self.fd, WAKE, (ctypes.c_uint64 * 2)(self._base + at, PAGE))
                at += PAGE
            elif failed and (number != errno.EAGAIN or made[-1] <= 0):
                raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

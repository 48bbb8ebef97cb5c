"""Which pages of a private mapping are written while it is copied: by asynchronous write protection.

userfaultfd(2) with UFFD_FEATURE_WP_ASYNC and PAGEMAP_SCAN (Linux 6.7) tell it for every writer: guest code of any
accelerator, devices, the kernel. The kernel takes the protection off by itself at the first write, so nobody waits for
this process. It needs no privilege, and nothing of it stays once closed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from cardcage_jail import is_inside

from cardcage_snapshot.pages import SCAN_WRITTEN, keep_pagemap, renew_pagemap, scanned

if TYPE_CHECKING:
    from typing import Self

    from cardcage.machine import Machine
    from cardcage.ram import RamBlock

    from cardcage_snapshot.pages import Run

__all__ = ["WriteWatch", "keep_open", "opened", "renew"]

USERFAULTFD = 323
USER_MODE_ONLY = 1
UFFD_API, WP_UNPOPULATED, WP_ASYNC = 0xAA, 1 << 13, 1 << 15
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
REGISTER_WP = 2
_kept: WeakKeyDictionary[RamBlock, int] = WeakKeyDictionary()


def opened() -> int:
    """A descriptor that watches nothing yet. Raises OSError where the kernel cannot, or in a jail."""
    if is_inside():
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(USERFAULTFD, os.O_CLOEXEC | USER_MODE_ONLY))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        fcntl.ioctl(fd, UFFDIO_API, (ctypes.c_uint64 * 3)(UFFD_API, WP_ASYNC | WP_UNPOPULATED))
    except BaseException:
        os.close(fd)
        raise
    return fd


def keep_open(machine: Machine) -> None:
    """Open what a watch of the machine's RAM needs, for when this process may not any more; nothing where it cannot."""
    block = machine.memory.ranges[0].block
    with suppress(OSError):
        _kept[block] = opened()
        machine.defer(partial(os.close, _kept[block]))
    keep_pagemap()


def renew() -> None:
    """This is a forked process: what was kept open tells of its parent's memory, and is opened anew in its place."""
    for block, fd in list(_kept.items()):
        try:
            _replace(fd, opened())
        except OSError:  # it stays for who closes it, and is not used
            del _kept[block]
    renew_pagemap()


def _replace(fd: int, made: int) -> None:
    os.dup2(made, fd, inheritable=False)
    os.close(made)


class WriteWatch:
    """Watches a block until it is closed. Raises OSError where the kernel cannot.

    Args:
        own: only pages that are no longer the file's below.
    """

    def __init__(self, block: RamBlock, *, own: bool) -> None:
        self._block, self._own = block, own
        self._kept = _kept.get(block)
        self._fd = opened() if self._kept is None else self._kept
        self._range = (ctypes.c_uint64 * 2)(block.host_address, -(-block.size // 4096) * 4096)
        try:
            fcntl.ioctl(self._fd, UFFDIO_REGISTER, (ctypes.c_uint64 * 4)(*self._range, REGISTER_WP))
        except BaseException:
            self.close()
            raise

    def written(self) -> list[Run]:
        """Runs that were written since the last call; at first all that is there. Raises OSError."""
        return scanned(self._block, own=self._own, mode=SCAN_WRITTEN)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0 and self._kept is not None:
            with suppress(OSError):  # it was not registered
                fcntl.ioctl(self._fd, UFFDIO_UNREGISTER, self._range)
        elif self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""What the host does when guest memory is taken away under it: SIGBUS, made into an error with words.

A file that is cut short by somebody else, a file system or a pool of huge pages that runs full, and memory that breaks
(machine check) all end in SIGBUS at the next access, which would end the whole process without a word. The guard puts
a page of zeros where the fault was, so that the access goes on, and signals the block's eventfd: its machine stops with
a :exc:`~cardcage.errors.HostError`, and the process's other machines run on. A fault anywhere else is passed on to
whoever handled SIGBUS before (``faulthandler``, or the default).
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from functools import cache
from typing import Any

from cardcage.values import define

SA_SIGINFO = 4
SIG_DFL, SIG_IGN = None, 1
"""As ctypes has addresses: 0 is None."""
BUS_MCEERR = (4, 5)
"""``si_code`` of memory that broke (asm-generic/siginfo.h); all others are pages that could not be had."""
PROT_READ_WRITE, MAP_FIXED_PRIVATE_ANONYMOUS = 3, 0x10 | 0x02 | 0x20
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _SigAction(ctypes.Structure):
    """``struct sigaction`` of glibc on x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@define(eq=False)
class Watch:
    """One guarded range of host memory.

    Attributes:
        start, end: addresses. page: bytes that are replaced at a fault.
        fd: an eventfd that is readable once there was a fault.
        offset: where the first fault was, in bytes from the start; None so far. broke: the memory itself is broken.
    """

    start: int
    end: int
    page: int
    fd: int
    offset: int | None = None
    broke: bool = False


class Guard:
    """The process's handler of SIGBUS; :func:`guard` gives the one there is."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        self._watches: tuple[Watch, ...] = ()
        self._lock = threading.Lock()
        self._handler = _HANDLER(self._handle)
        self._address = ctypes.cast(self._handler, ctypes.c_void_p).value
        self._call: Any = None
        self._passing: set[int] = set()

    def watch(self, start: int, size: int, page: int) -> Watch:
        """Guard a range until :meth:`release`; *page* is the least unit in which its mapping can be replaced."""
        watch = Watch(start, start + size, page, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        with self._lock:
            self._watches = (*self._watches, watch)
            self._install()
        return watch

    def release(self, watch: Watch) -> None:
        """Guard the range no longer. Idempotent."""
        with self._lock:
            if watch in self._watches:
                self._watches = tuple(one for one in self._watches if one is not watch)
                os.close(watch.fd)
                watch.fd = -1

    def _install(self) -> None:
        # Looked at each time: others (the translator, pytest's faulthandler) put their own handler on top, which is
        # right when it passes on what is not its own, as the translator's does.
        before = _SigAction()
        self._libc.sigaction(signal.SIGBUS, None, ctypes.byref(before))
        if before.handler == self._address:
            return
        mine = _SigAction(handler=self._address, flags=SA_SIGINFO)
        self._libc.sigaction(signal.SIGBUS, ctypes.byref(mine), None)
        self._call = _HANDLER(before.handler) if before.handler not in (SIG_DFL, SIG_IGN) else None

    def _handle(self, signum: int, info: int, context: int) -> None:
        """On the thread that faulted, inside its access: takes no lock, and touches nothing but the mapping."""
        if not self._replace(info):
            self._pass_on(signum, info, context)

    def _replace(self, info: int) -> bool:
        """Put zeros where the fault was. False when that is in none of our ranges, or cannot be done."""
        code = ctypes.c_int.from_address(info + 8).value
        address = ctypes.c_uint64.from_address(info + 16).value
        for watch in self._watches:
            if watch.start <= address < watch.end:
                page = address - (address - watch.start) % watch.page
                flags = MAP_FIXED_PRIVATE_ANONYMOUS
                if self._libc.mmap(page, watch.page, PROT_READ_WRITE, flags, -1, 0) != page:
                    return False
                if watch.offset is None:
                    watch.offset, watch.broke = page - watch.start, code in BUS_MCEERR
                if watch.fd >= 0:
                    os.eventfd_write(watch.fd, 1)
                return True
        return False

    def _pass_on(self, signum: int, info: int, context: int) -> None:
        """To who was there before; when that leads back here, or there was nobody, to the default at the next try."""
        thread = threading.get_ident()
        if self._call is not None and thread not in self._passing:
            self._passing.add(thread)
            self._call(signum, info, context)
            self._passing.discard(thread)
        else:
            self._libc.sigaction(signum, ctypes.byref(_SigAction(handler=SIG_DFL)), None)


@cache
def guard() -> Guard:
    """The one guard: what a signal does is the process's, so there cannot be one for each host or machine."""
    return Guard()

"""preadv2(2) and pwritev2(2), straight from :class:`~cardcage.segments.Segments` where a request has many parts.

Python's own calls take a view of each part, which for 250 pages costs more than the kernel's work.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from cardcage.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["preadv", "pwritev"]


@cache
def _function(name: str) -> Any:
    """Of the C library; ``None`` where it has no such function."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int)
        function.restype = ctypes.c_ssize_t
    return function


def _call(function: Any, fd: int, parts: Segments, offset: int, flags: int) -> int:
    iovec = parts.iovec()
    while (done := function(fd, iovec.buffer_info()[0], len(parts), offset, flags)) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return int(done)


def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
    """As :func:`os.preadv`."""
    if type(buffers) is Segments and (function := _function("preadv2")) is not None:
        return _call(function, fd, buffers, offset, flags)
    return os.preadv(fd, buffers, offset, flags)


def pwritev(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
    """As :func:`os.pwritev`."""
    if type(buffers) is Segments and (function := _function("pwritev2")) is not None:
        return _call(function, fd, buffers, offset, flags)
    return os.pwritev(fd, buffers, offset, flags)

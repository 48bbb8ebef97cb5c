"""Memory of the translator's own: what a forked process has of it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os

from cardcage_tcg.library import Area, advise_areas

SIZE = 1 << 20
MAP_FIXED = 0x10


def test_memory_of_somebody_else_stays_in_forks() -> None:
    """Where an area was that nobody closed, there may be other memory: a fork of a machine leaves that to children."""
    address = Area(SIZE).address
    gc.collect()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long),
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    assert libc.mmap(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address
    try:
        ctypes.memset(address, 1, SIZE)
        advise_areas(mmap.MADV_DOFORK)
        advise_areas(mmap.MADV_DONTFORK)
        if (pid := os.fork()) == 0:
            os._exit(ctypes.string_at(address, 1)[0])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    finally:
        libc.munmap(address, SIZE)

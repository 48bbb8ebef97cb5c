"""A memory back end: the kernel places, preallocates and discards; the back end only maps."""

import ctypes
import os

from attrs import evolve
from cardcage.ram import Backing, address_of, fenced


class Locked:
    takes_ram = True

    def allocate(self, size: int, name: str, /) -> Backing:
        backing = fenced(size)
        start = ctypes.c_void_p(address_of(backing.map) + backing.offset)
        if ctypes.CDLL(None, use_errno=True).mlock(start, ctypes.c_size_t(size)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))  # RLIMIT_MEMLOCK: becomes a HostError
        return evolve(backing, discard=None)

"""A memory back end: the core places, preallocates and discards; the back end only maps."""

import mmap

from cardcage.ram import Backing

MAP_LOCKED = 0x2000


class Locked:
    takes_ram = True

    def allocate(self, size: int, name: str, /) -> Backing:
        # What cannot be locked is an OSError (EAGAIN, RLIMIT_MEMLOCK), which becomes the machine's HostError.
        return Backing(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_LOCKED), discard=None)

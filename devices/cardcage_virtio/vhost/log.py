"""Which pages of guest memory a vhost-user back end wrote: VHOST_F_LOG_ALL, in memory that both map."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from cardcage.memory import PAGE

if TYPE_CHECKING:
    from cardcage_virtio.vhost.channel import Channel, MemoryRegion

__all__ = ["WriteLog"]


class WriteLog:
    """A bitmap of pages from address 0 on, in which back ends set bits.

    A back end without LOG_SHMFD cannot say what it writes: then that is all it can reach.
    """

    def __init__(self, regions: list[MemoryRegion]) -> None:
        self._reach = [(one.address, one.size) for one in regions]
        pages = max((address + size for address, size in self._reach), default=PAGE) // PAGE
        self._size = -(-pages // (8 * PAGE)) * PAGE
        self._blind = False
        self._fd = self._make()

    def _make(self) -> int:
        fd = os.memfd_create("cardcage-vhost-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self._size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)  # shorter, it would fault us
        return fd

    def follow(self, channel: Channel) -> bool:
        """Have the back end use the bitmap, before it begins; False when it cannot log."""
        if channel.logs:
            channel.set_log(self._fd, self._size)
        else:
            self._blind = True
        return channel.logs

    def take(self, channel: Channel | None) -> list[tuple[int, int]]:
        """(address, size) of what was written since the last time. *channel* is that of a back end at work.

        The back end changes to a new bitmap first, so that none of its bits is lost.
        """
        fresh = self._make()
        try:
            if channel is not None and channel.logs:
                channel.set_log(fresh, self._size)
        except BaseException:
            os.close(fresh)
            self._blind = True  # nobody knows which of the two it used
            raise
        old, self._fd = self._fd, fresh
        with mmap.mmap(old, self._size) as view:
            found = view[:]
        os.close(old)
        blind, self._blind = self._blind, channel is not None and not channel.logs
        return list(self._reach) if blind else runs(found)

    def close(self) -> None:
        """Give the bitmap up."""
        os.close(self._fd)


def runs(bitmap: bytes) -> list[tuple[int, int]]:
    """(address, size) of the runs of pages whose bits are set."""
    found: list[tuple[int, int]] = []
    for at in range(0, len(bitmap), 8):
        word = int.from_bytes(bitmap[at : at + 8], "little")
        while word:
            page = at * 8 + (word & -word).bit_length() - 1
            word &= word - 1
            if found and sum(found[-1]) == page * PAGE:
                found[-1] = found[-1][0], found[-1][1] + PAGE
            else:
                found.append((page * PAGE, PAGE))
    return found

"""Images whose bytes others may move by themselves (``cardcage_virtio.devices.blk.Plain``)."""

from __future__ import annotations

from typing import Any

from cardcage_block.formats import EDGE
from cardcage_block.hostfile import HostFile

__all__ = ["PlainImage"]


class PlainImage:
    """An image with a file of the host's."""

    info: Any

    def plain(self) -> tuple[int, int, int, int, int] | None:
        """The file and how it may be used now, by who goes past :meth:`try_readv` and :meth:`try_writev`."""
        own = vars(self)
        file = own["_file"]
        if not isinstance(file, HostFile):
            return None
        fd, reads, writes = file.at_hand()
        if own["_readonly"]:
            writes = -1
        if own.get("_guessed"):
            return fd, reads, writes, EDGE, file.size() - EDGE
        return fd, reads, writes, 0, self.info.size

    def took(self, seconds: float, size: int, /) -> None:
        """Writes of *size* bytes by :meth:`plain` took so long."""
        file = vars(self)["_file"]
        if isinstance(file, HostFile):
            file.took(seconds, size)

"""Images whose bytes others may move by themselves (``Plain`` and ``Placed`` in ``cardcage_virtio.devices.blk``)."""

from __future__ import annotations

from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

from cardcage_block.formats import EDGE
from cardcage_block.hostfile import HostFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cardcage.backends import BlockInfo

__all__ = ["PlacedImage", "PlainImage", "own_place"]


class PlainImage:
    """An image with a file of the host's."""

    info: BlockInfo

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


class PlacedImage(PlainImage):
    """A qcow2 image."""

    @contextmanager
    def places(self, rows: Sequence[tuple[int, int, bool]], /) -> Iterator[list[int | None]]:
        """Where in the file each (offset, length, to be written) lies as one run, for as long as the block lasts; None
        where it does not, or its table entries are not in memory."""
        image: Any = self
        me = get_ident()
        image._inflight[me] = image._limbo.epoch  # from here on no cluster that we look up is given to somebody else
        try:
            yield [
                (own_place(image, offset, length) if write else image._map.readable(offset, length)) or None
                for offset, length, write in rows
            ]
        finally:
            image._inflight.pop(me, None)


def own_place(image: Any, offset: int, length: int) -> int:
    """Where in the file of a qcow2 *image* a range may be written over, 0 when that takes more."""
    fine = not image._readonly and image._health.broken is None
    return image._map.overwritable(offset, length) if fine else 0

"""Block back end ``commit``: an overlay whose contents go into an image below it, while it is used.

A pass copies what the overlay has; what is written meanwhile is noted, and copied by the next. What the overlay shows
is the same all the time, so whoever opens it after a crash finds all of it. Once the two are equal, the image below can
stand for the overlay: :meth:`Committing.let_go` copies the last, while no request is under way.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cardcage.config import HostPath
from cardcage.errors import ConfigError
from cardcage.segments import total
from cardcage.values import frozen

from cardcage_block.drive import Drive, allowed, open_image
from cardcage_block.mapping import UNALLOCATED, ZEROS
from cardcage_block.qcow2 import Qcow2Image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import BlockInfo
    from cardcage.device import Slot

    from cardcage_block.hostfile import Image

__all__ = ["CommitOptions", "Committing", "open_commit"]

PIECE = 1 << 20
"""Bytes that are copied at once."""
CHUNK_BITS = 16
"""Of the bytes by which it is noted that they were written."""


@frozen
class CommitOptions(Drive):
    """Options of ``commit``: the overlay's, and the image below it that is to have its contents.

    Attributes:
        into: its path.
    """

    into: HostPath = HostPath("")


class Committing:
    """The overlay, with its way into *base*. Satisfies :class:`cardcage.backends.BlockBackend`.

    Args:
        top: the overlay. base: an image that it stands on, and that can be written; closed with it.

    Attributes:
        done: bytes of the disk that the first pass has seen.
    """

    def __init__(self, top: Qcow2Image, base: Image) -> None:
        self._top, self._base = top, base
        self._written = bytearray(-(-top.info.size >> CHUNK_BITS))
        self.done, self._given_up = 0, False

    @property
    def info(self) -> BlockInfo:
        """The overlay's."""
        return self._top.info

    # copying

    def copy(self, told: Callable[[], bool] = lambda: True) -> bool:
        """Copy all that the overlay has, piece by piece, while *told* says so; True once all was. Raises OSError."""
        size = self.info.size
        if self._base.info.size < size:
            self._base.grow(size)  # type: ignore[attr-defined]  # raw and qcow2 images do
        while self.done < size and told():
            self.done = self._copy_run(self.done, size)
        return self.done >= size

    def catch_up(self, told: Callable[[], bool] = lambda: True) -> int:
        """Copy what was written meanwhile, while *told* says so; the bytes that were. Raises OSError."""
        copied, at = 0, -1
        while told() and (at := self._written.find(1, at + 1)) >= 0:
            self._written[at] = 0  # what is written from here on is noted anew
            here, end = at << CHUNK_BITS, min(at + 1 << CHUNK_BITS, self.info.size)
            copied += end - here
            try:
                while here < end:
                    here = self._copy_run(here, end)
            except BaseException:
                self._written[at] = 1
                raise
        return copied

    def give_up(self) -> None:
        """Nothing goes into the base any more: the overlay stays."""
        self._given_up = True

    def _copy_run(self, offset: int, end: int) -> int:
        """Copy a stretch that is of one kind; returns its end."""
        kind, stop = _above(self._top, self._base, offset, end)
        if kind == UNALLOCATED:
            return stop
        if kind == ZEROS:
            self._base.write_zeroes(offset, stop - offset, unmap=True)
            return stop
        length = min(stop - offset, PIECE)
        data = [memoryview(bytearray(length))]
        self._top.readv(offset, data)
        self._base.writev(offset, data)
        return offset + length

    def _note(self, offset: int, length: int) -> None:
        """It was written, just now."""
        if length:
            first, last = offset >> CHUNK_BITS, offset + length - 1 >> CHUNK_BITS
            self._written[first : last + 1] = b"\1" * (last + 1 - first)

    # the guest's

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        self._top.readv(offset, buffers)

    def try_readv(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Fill the *buffers* if that takes no waiting."""
        return self._top.try_readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        try:
            self._top.writev(offset, buffers)
        finally:  # part of it, perhaps
            self._note(offset, total(buffers))

    def flush(self) -> None:
        self._top.flush()

    def discard(self, offset: int, length: int, /) -> None:
        try:
            self._top.discard(offset, length)
        finally:
            self._note(offset, length)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        try:
            self._top.write_zeroes(offset, length, unmap=unmap)
        finally:
            self._note(offset, length)

    def layers(self) -> list[dict[str, Any]]:
        """The overlay's."""
        return self._top.layers()

    def close(self) -> None:
        """Idempotent."""
        self._top.close()

    # its end, and the machine's moves

    def may_move(self) -> str:
        """It cannot, before that is over."""
        return "it is being merged into the image that it stands on"

    def let_go(self) -> None:
        """Have the base show what the overlay does, unless that was given up, make both stable, and let others have
        them. No request is under way. Raises OSError."""
        if not self._given_up:
            self.copy()
            self.catch_up()
        base: Any = self._base
        base.let_go()  # first: what the overlay has is there then
        self._top.let_go()

    def take_back(self) -> None:
        """Lock both, and those between, again. Raises HostError where somebody else has one."""
        self._top.take_back()


def _above(top: Any, base: Any, offset: int, end: int) -> tuple[int, int]:
    """What the images from *top* down to *base*, which is not looked at, have at *offset*, and where that ends."""
    image = top
    while image is not base:
        if offset >= image.info.size:  # it hides what is below
            return ZEROS, end
        end = min(end, image.info.size)
        kind, _, length = image._map.extent(offset, min(end - offset, 1 << 30))
        end = offset + length
        if kind != UNALLOCATED:
            return kind, end
        image = image._backing
    return UNALLOCATED, end


def open_commit(slot: Slot, options: CommitOptions) -> Committing:
    """Back end ``block:commit``. Raises ConfigError or HostError."""
    into = os.path.realpath(options.into)
    top = open_image(options, warn=slot.log.warning, allow=allowed(slot, options), into=into)
    image: Any = top
    while isinstance(image, Qcow2Image) and image._backing is not None:
        image = image._backing
        if image.is_at(into) and isinstance(top, Qcow2Image) and not options.readonly:
            return Committing(top, image)
    top.close()
    raise ConfigError(f"does not stand on {options.into}, or cannot be written", file=options.file)

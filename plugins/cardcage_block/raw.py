"""Raw images: what the guest reads at an offset is what the file holds there."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.backends import BlockInfo
from cardcage.segments import total

from cardcage_block.formats import EDGE, probe
from cardcage_block.handing import HandedImage
from cardcage_block.hostfile import take
from cardcage_block.layers import LayeredImage
from cardcage_block.plain import PlainImage
from cardcage_block.private import CopiedImage
from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage_block.hostfile import HostFile

__all__ = ["RawImage"]


class RawImage(CopiedImage, HandedImage, LayeredImage, PlainImage):
    """A raw disk. Thread-safe; satisfies :class:`cardcage.backends.BlockBackend`.

    Args:
        file: the file or device; closed with the image.
        readonly: refuse to change anything.
        discard: give discarded ranges back to the host.
        guessed: nobody said that the image is raw. A guest that writes another format's marks into its first or last
            sector would choose what the host opens next time, so such a write fails with EPERM.

    The last sector of a file whose size is no multiple of 512 reads as padded with zeros.
    """

    def __init__(self, file: HostFile, *, readonly: bool = False, discard: bool = True, guessed: bool = False) -> None:
        self._file, self._readonly, self._guessed = file, readonly, guessed
        self._discard = discard and not readonly
        self._edges = threading.Lock()  # two writes to one edge are looked at one after another
        self.info = BlockInfo(
            -(-file.size() // 512) * 512, max(file.alignment, 512), readonly, self._discard, not readonly
        )

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Fill the writable *buffers* one after another."""
        self._file.read(offset, buffers, total(buffers))

    def try_readv(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Fill the *buffers* if that takes no waiting."""
        return self._file.try_read(offset, buffers, total(buffers))

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Write *buffers* one after another."""
        if self._readonly:
            raise OSError(errno.EROFS, f"{self._file.path}: opened readonly")
        length = total(buffers)
        if self._guessed and self._touches_edge(offset, length):
            with self._edges:
                self._file.write(offset, self._guarded(offset, buffers, length), length)
            return
        self._file.write(offset, buffers, length)

    def try_writev(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Write *buffers* if that takes no waiting."""
        length = total(buffers)
        if self._readonly or (self._guessed and self._touches_edge(offset, length)):
            return False
        return self._file.try_write(offset, buffers, length)

    def _touches_edge(self, offset: int, length: int) -> bool:
        return offset < EDGE or offset + length > self._file.size() - EDGE

    def _guarded(self, offset: int, buffers: Sequence[memoryview], length: int) -> Sequence[memoryview]:
        """*buffers*, with copies of what goes to the edges: the guest may change its memory after this looked at it.

        Raises OSError when the edges, once this is written, would show another format.
        """
        size = max(self._file.size(), offset + length)
        head = min(max(EDGE - offset, 0), length)
        tail = min(max(offset + length - (size - EDGE), 0), length - head)
        first = b"".join(take(buffers, 0, head))
        last = b"".join(take(buffers, length - tail, tail))
        edges = []
        for start in (0, max(size - EDGE, 0)):
            edge = bytearray(read_bytes(self._file, start, EDGE))
            for at, piece in ((offset, first), (offset + length - tail, last)):
                low, high = max(start, at), min(start + EDGE, at + len(piece))
                if low < high:
                    edge[low - start : high - start] = piece[low - at : high - at]
            edges.append(bytes(edge))
        if probe(*edges) != "raw":
            problem = "refused to turn a disk that is assumed to be raw into another format: use format=raw"
            raise OSError(errno.EPERM, f"{self._file.path}: {problem}")
        return [memoryview(first), *take(buffers, head, length - head - tail), memoryview(last)]

    def grow(self, size: int, /) -> None:
        """Make the disk *size* bytes long, more than now; a host's device has to be that large already.

        What is added to a file reads as zeros. Raises OSError.
        """
        if self._readonly:
            raise OSError(errno.EROFS, f"{self._file.path}: opened readonly")
        self._file.truncate(size)
        self.info = evolve(self.info, size=size)

    def flush(self) -> None:
        """Return once all earlier completed writes are on stable storage."""
        if not self._readonly:
            self._file.sync()

    def discard(self, offset: int, length: int, /) -> None:
        """Give the range back to the host; it reads as zeros where the host has holes, else as before."""
        if self._discard:
            self._file.punch(offset, length)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        """Make the range read as zeros; *unmap* lets the host free it."""
        if self._readonly:
            raise OSError(errno.EROFS, f"{self._file.path}: opened readonly")
        if not (unmap and self._discard and self._file.punch(offset, length)):
            self._file.zero(offset, length)

    def data(self, offset: int, end: int, /) -> tuple[bool, int]:
        """Tell if there may be data at *offset* (else zeros), and where that stretch ends, at most *end*."""
        return self._file.data(offset, end)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

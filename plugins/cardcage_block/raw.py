"""Raw images: what the guest reads at an offset is what the file holds there."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cardcage.backends import BlockInfo
from cardcage.segments import total

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage_block.hostfile import HostFile

__all__ = ["MAGICS", "RawImage"]

MAGICS = (
    b"QFI\xfb",  # qcow, qcow2
    b"QED\0",
    b"KDMV",  # vmdk
    b"COWD",
    b"# Disk DescriptorFile",
    b"conectix",  # vpc
    b"vhdxfile",
    b"<<< ",  # vdi: "<<< QEMU VM Virtual Disk Image >>>" and others
    b"WithoutFreeSpace",  # parallels
    b"WithouFreSpacExt",
    b"LUKS\xba\xbe",
)
"""The first bytes of other image formats."""


class RawImage:
    """A raw disk. Thread-safe; satisfies :class:`cardcage.backends.BlockBackend`.

    Args:
        file: the file or device; closed with the image.
        readonly: refuse to change anything.
        discard: give discarded ranges back to the host.
        guessed: nobody said that the image is raw. A guest that writes another format's beginning into its first sector
            would choose what the host opens next time, so such a write fails with EPERM.

    The last sector of a file whose size is no multiple of 512 reads as padded with zeros.
    """

    def __init__(self, file: HostFile, *, readonly: bool = False, discard: bool = True, guessed: bool = False) -> None:
        self._file, self._readonly, self._guessed = file, readonly, guessed
        self._discard = discard and not readonly
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
        if offset == 0 and self._guessed:
            self._guard(b"".join(bytes(one[:64]) for one in buffers)[:64])
        self._file.write(offset, buffers, total(buffers))

    def try_writev(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """Write *buffers* if that takes no waiting."""
        if self._readonly or (offset == 0 and self._guessed):
            return False
        return self._file.try_write(offset, buffers, total(buffers))

    def _guard(self, head: bytes) -> None:
        if head.startswith(MAGICS):
            problem = "refused to turn a disk that is assumed to be raw into another format: use format=raw"
            raise OSError(errno.EPERM, f"{self._file.path}: {problem}")

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

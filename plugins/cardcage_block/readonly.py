"""The half of a block back end that refuses, for those that are only read."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cardcage.backends import BlockInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ReadOnly"]


class ReadOnly:
    """With ``readv`` it satisfies :class:`cardcage.backends.BlockBackend`, and :class:`cardcage.device.Forkable`.

    Args:
        size: bytes, a multiple of 512.
        what: for the OSError (EROFS) that each change raises, such as ``"a disc"``.
    """

    def __init__(self, size: int, what: str) -> None:
        self.info = BlockInfo(size, readonly=True)
        self._what = what

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """Refuse."""
        raise OSError(errno.EROFS, f"{self._what} is only read")

    def flush(self) -> None:
        """Nothing was written."""

    def discard(self, offset: int, length: int, /) -> None:
        """Refuse."""
        self.writev(offset, ())

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        """Refuse."""
        self.writev(offset, ())

    def may_fork(self) -> str:
        """A copy of the machine reads the same."""
        return ""

    def forked(self) -> None:
        """There is nothing to make anew."""

    def close(self) -> None:
        """Nothing is held."""

"""Faults of a qcow2 image, and if it can still be written."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cardcage_block.header import INCOMPAT_CORRUPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_block.header import Header
    from cardcage_block.hostfile import File

__all__ = ["Health"]


class Health:
    """The faults of an image.

    Attributes:
        broken: why nothing can be written any more, ``None`` while it can.
    """

    def __init__(self, file: File, header: Header, readonly: bool, warn: Callable[[str], object]) -> None:
        self._file, self._header, self._readonly, self._warn = file, header, readonly, warn
        self.broken: str | None = None

    def check(self) -> None:
        """Raise OSError when nothing can be written any more."""
        if self.broken is not None:
            raise OSError(errno.EIO, f"{self._file.path}: {self.broken}")

    def corrupt(self, problem: str) -> OSError:
        """Mark the image as corrupt and stop writing; gives the error to raise."""
        if self.broken is None:
            self.broken = f"qcow2 image is corrupt: {problem}"
            self._warn(f"{self._file.path}: {self.broken}")
            if not self._readonly and self._header.version >= 3:
                self._header.incompatible |= INCOMPAT_CORRUPT
                packed = self._header.pack()
                self._file.write(0, [memoryview(packed)], len(packed))
                self._file.sync()
        return OSError(errno.EIO, f"{self._file.path}: qcow2 image is corrupt: {problem}")

    def sync(self) -> None:
        """Make all that was written stable. Raises OSError, after which nothing is written any more."""
        try:
            self._file.sync()
        except OSError as error:
            # The host has dropped what it could not write: from now on nothing here can be promised.
            self.broken = f"the host could not make data stable: {error.strerror}"
            raise

"""Memory back end ``snapshot``: a private map of a snapshot's RAM.

What no guest touches is never read, and all machines of one snapshot share its pages in the host's page cache until
they write to them.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from attrs import field, frozen
from cardcage.config import HostPath
from cardcage.errors import ConfigError
from cardcage.ram import PAGE, Backing
from cardcage.units import say_size

from cardcage_snapshot.places import Folder

__all__ = ["RamOptions", "SnapshotRam"]


@frozen
class RamOptions:
    """Options of memory back end ``snapshot``.

    Attributes:
        path: the snapshot's directory. file: of its RAM, in it.
    """

    path: HostPath
    file: str = field(default="ram")


class SnapshotRam:
    """RAM as a snapshot has it; what a guest writes stays in this process. Attribute ``fd``: the file, while mapped."""

    takes_ram = True

    def __init__(self, options: RamOptions) -> None:
        self.options, self.fd = options, -1

    def allocate(self, size: int, name: str, /) -> Backing:

        path = Path(self.options.path)
        with Folder(path) as folder:
            fd = folder.open(self.options.file)
        try:
            there = os.fstat(fd).st_size
            if there != -(-size // PAGE) * PAGE:
                sizes = f"has {say_size(there)}: expected {say_size(size)}, the machine's memory"
                raise ConfigError(f"{path / self.options.file}: {sizes}")
            mapped = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        # Given back, its pages would read as the file has them, not as zeros: so nothing is.
        return Backing(mapped, -1, PAGE, None, guarded=True, release=self._release)

    def _release(self) -> None:
        os.close(self.fd)
        self.fd = -1

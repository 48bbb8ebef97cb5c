"""A memory cgroup of the process's own, below its present cgroup: its soft limit presses before the host is short.

Under v1 that is ``memory.soft_limit_in_bytes``, under v2 ``memory.high``, which needs the memory controller to be
delegated to the group that the process is in, and no other process in that (Documentation/admin-guide/cgroup-v2.rst,
"No Internal Process Constraint").
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cardcage_fleet.hostmemory import memory_group, own_group

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage_fleet.hostmemory import MemoryGroup

__all__ = ["OwnGroup", "enter"]


class OwnGroup:
    """The group that this process moved into; :meth:`leave` undoes it."""

    def __init__(self, folder: Path, parent: MemoryGroup) -> None:
        self.folder, self.parent = folder, parent
        self._file = folder / ("memory.high" if parent.version == 2 else "memory.soft_limit_in_bytes")

    def limit(self, size: int) -> None:
        """Press on the process's memory from *size* bytes on. Raises OSError."""
        self._file.write_text(str(size))

    def leave(self) -> None:
        """Back to where the process was. Raises OSError; a group that child processes are still in stays."""
        (self.parent.folder / "cgroup.procs").write_text(str(os.getpid()))
        self.folder.rmdir()


def enter(parent: MemoryGroup | None = None) -> OwnGroup:
    """Make a group below *parent* (by default the present group) and move this process there.

    Raises OSError, with nothing left, when there is none, or it may not be done.
    """
    parent = parent or memory_group()
    if parent is None:
        raise FileNotFoundError(2, "no memory cgroup is mounted")
    folder = parent.folder / own_group()
    folder.mkdir()
    try:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            if parent.version == 2:
                (parent.folder / "cgroup.subtree_control").write_text("+memory")
        except OSError:
            (parent.folder / "cgroup.procs").write_text(str(os.getpid()))
            raise
    except OSError:
        folder.rmdir()
        raise
    return OwnGroup(folder, parent)

"""The kernel's OOM killer: who it takes first, and whether it was it that ended a machine.

A process that it kills says nothing any more: what is left is the machine's entry on the roster, whose lock is gone.
The kernel's log (``/dev/kmsg``, where it may be read) names those that were killed; the memory cgroup counts them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage_fleet.hostmemory import MemoryGroup

if TYPE_CHECKING:
    from cardcage_fleet.roster import RosterEntry

__all__ = ["killed_pids", "score", "set_score", "why_ended"]

KILLED = re.compile(r"(Memory cgroup out of memory|Out of memory[^:]*): Killed process (\d+) ")
RECORD = 8192
"""The longest record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg)."""


def killed_pids(log: str = "/dev/kmsg") -> dict[int, str] | None:
    """Processes that the kernel's log says were killed, each with the log's words; ``None`` when it cannot be read."""
    try:
        fd = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    found = {}
    try:
        while True:
            try:
                record = os.read(fd, RECORD)
            except BrokenPipeError:  # the oldest records were overwritten meanwhile: go on with the next
                continue
            except BlockingIOError:
                break
            if not record:
                break
            for words in KILLED.finditer(record.decode(errors="replace")):
                found[int(words[2])] = words[1]
    except OSError:
        return None
    finally:
        os.close(fd)
    return found


def why_ended(entry: RosterEntry, killed: dict[int, str] | None) -> str:
    """Why a machine ended without a word, as far as the host still knows."""
    where = f"in cgroup {entry.group}" if entry.group else "of the host"
    if killed is not None and entry.here and entry.pid in killed:
        place = where if killed[entry.pid].startswith("Memory cgroup") else "of the host"
        return f"killed by the kernel's OOM killer {place}"
    group = MemoryGroup(entry.group, Path(entry.group_folder), entry.group_version)
    now = group.oom_kills() if entry.group_folder and entry.oom_kills >= 0 else None
    if now is not None and now > entry.oom_kills:
        return f"probably killed by the kernel's OOM killer {where}, which ended {now - entry.oom_kills} there since"
    return "its process was killed or crashed"


def score(pid: int | str = "self") -> int:
    """``oom_score_adj``: -1000 (never) to 1000 (first)."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def set_score(value: int, pid: int | str = "self") -> None:
    """Set it. Raises OSError: to go below what the process had takes CAP_SYS_RESOURCE."""
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(value))

"""The host's figures about its memory: /proc/meminfo, pressure stall information, cgroup limits (v1 and v2)."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import HostError
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HostMemory",
    "MemoryGroup",
    "MemoryLimit",
    "memory_group",
    "memory_limits",
    "own_group",
    "own_memory_group",
    "read_host_memory",
]

UNLIMITED = 1 << 60
"""cgroup v1 writes no limit as a number a little below 2**63."""


@frozen
class HostMemory:
    """Memory of the host as this process may use it. Sizes are bytes.

    Attributes:
        total: all of it. available: what can be taken without swapping (MemAvailable).
        swap_free: left in swap space, 0 without any.
        group: path of the cgroup whose limit is nearest, empty where none has a limit.
        limit: that limit, ``None`` without. usage: what the group uses. reclaimable: file pages in it, which can go.
        some, full: pressure: per cent of the last 10 s in which some, or all, tasks waited for memory; 0 where the
            kernel does not say (CONFIG_PSI). Of the cgroup (v2) where it has a figure, else of the host.
    """

    total: int
    available: int
    swap_free: int = 0
    group: str = ""
    limit: int | None = None
    usage: int = 0
    reclaimable: int = 0
    some: float = 0.0
    full: float = 0.0

    @property
    def headroom(self) -> int:
        """Bytes that can be taken before the host swaps or kills: the lesser of host and cgroup. May be below 0."""
        if self.limit is None:
            return self.available
        return min(self.available, self.limit - self.usage + self.reclaimable)


@frozen
class MemoryLimit:
    """One thing that sets a limit to this process's memory.

    Attributes:
        name: ``the host``, or ``cgroup /path``. path: of the cgroup, empty for the host.
        size: bytes that there are in all. available: bytes that can be taken now before it swaps or kills.
    """

    name: str
    path: str
    size: int
    available: int


@frozen
class MemoryGroup:
    """The memory cgroup of a process: its path, the folder of its files, and the version of its hierarchy (1 or 2)."""

    path: str
    folder: Path
    version: int

    def oom_kills(self) -> int | None:
        """How many processes of it the kernel's OOM killer has ended; ``None`` where that is not counted."""
        return _pairs(self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")).get("oom_kill")


def memory_limits(root: Path = Path("/")) -> tuple[MemoryLimit, ...]:
    """The host, and each cgroup around this process that has a limit, the nearest first. Raises HostError.

    Pools of huge pages (hugetlb) are left out: they are set aside already.
    """
    host, pool = read_host_memory(root), _pairs(root / "proc/meminfo", 1024).get("Hugetlb", 0)
    found = [MemoryLimit("the host", "", host.total - pool, host.available)]
    for path, folder, (limit, usage, reclaimable) in _groups(root):
        if folder.name == own_group():  # its soft limit is what our machines were promised, and grows with them
            continue
        found.append(MemoryLimit(f"cgroup {path}", path, limit, max(0, limit - usage + reclaimable)))
    return tuple(found)


def memory_group(root: Path = Path("/")) -> MemoryGroup | None:
    """This process's own memory cgroup (v1's where that has the controller), with a limit or not; ``None`` without."""
    found = None
    for v1, top, mount, path in _hierarchies(root):
        inside = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
        if v1 or (mount / inside / "memory.current").exists():
            group = MemoryGroup(path, mount / inside, 1 if v1 else 2)
            found = group if found is None or v1 else found
    return found


def own_memory_group() -> MemoryGroup | None:
    """The same, looked for among all mounts once a process, and again when that is in other cgroups."""
    return _own_memory_group(_text(Path("/proc/self/cgroup")))


@lru_cache(maxsize=1)
def _own_memory_group(cgroups: str) -> MemoryGroup | None:
    return memory_group()


def own_group() -> str:
    """The name of a cgroup that this process made for itself."""
    return f"cardcage-{os.getpid()}"


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """Look now: about 20 small files. *root* is where ``proc`` and ``sys`` are. Raises HostError without /proc."""
    info = _pairs(root / "proc/meminfo", 1024)
    if "MemTotal" not in info:
        raise HostError(f"{root / 'proc/meminfo'}: cannot be read, and memory policies need it")
    found = HostMemory(info["MemTotal"], info.get("MemAvailable", info.get("MemFree", 0)), info.get("SwapFree", 0))
    group, folder, numbers = min(_groups(root), key=_left, default=("", root, (0, 0, 0)))
    pressure = _pressure(folder / "memory.pressure") if group else None
    some, full = pressure or _pressure(root / "proc/pressure/memory") or (0.0, 0.0)
    if not group:
        return HostMemory(found.total, found.available, found.swap_free, some=some, full=full)
    return HostMemory(found.total, found.available, found.swap_free, group, *numbers, some, full)


def _left(one: tuple[str, Path, tuple[int, int, int]]) -> int:
    limit, usage, reclaimable = one[2]
    return limit - usage + reclaimable


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not every kernel, mount or account has it
        return ""


def _pairs(path: Path, unit: int = 1) -> dict[str, int]:
    """``name value`` lines."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) * unit for row in rows if len(row) > 1 and row[1].isdigit()}


def _pressure(path: Path) -> tuple[float, float] | None:
    """avg10 of the lines ``some`` and ``full`` (Documentation/accounting/psi.rst)."""
    found = {}
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[1].startswith("avg10="):
            found[words[0]] = float(words[1].removeprefix("avg10="))
    return (found.get("some", 0.0), found.get("full", 0.0)) if found else None


def _groups(root: Path) -> Iterator[tuple[str, Path, tuple[int, int, int]]]:
    """This process's cgroup and those above it that have a limit: path, folder, (limit, usage, reclaimable)."""
    for v1, top, mount, path in _hierarchies(root):
        inside = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
        for part in (inside, *inside.parents):
            numbers = _read_v1(mount / part) if v1 else _read_v2(mount / part)
            if numbers is not None:
                yield str(Path(top) / part), mount / part, numbers


def _hierarchies(root: Path) -> Iterator[tuple[bool, str, Path, str]]:
    """(whether it is v1, root inside the hierarchy, folder of the mount, this process's path) of each with memory."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        v1 = "memory" in controllers.split(",")
        if v1 or number == "0":
            for top, mount in _mounts(root, v1):
                yield v1, top, mount, path


def _mounts(root: Path, v1: bool) -> Iterator[tuple[str, Path]]:
    """(root inside the hierarchy, folder) of each mounted memory hierarchy (proc_pid_mountinfo(5))."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        fields = before.split()
        if (kind == "cgroup" and "memory" in options.split()[-1].split(",")) if v1 else kind == "cgroup2":
            yield fields[3], root / fields[4].lstrip("/")


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _read_v1(folder: Path) -> tuple[int, int, int] | None:
    limit, usage = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is None or usage is None or limit >= UNLIMITED:
        return None
    stat = _pairs(folder / "memory.stat")
    return limit, usage, stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)


def _read_v2(folder: Path) -> tuple[int, int, int] | None:
    limits = [one for name in ("max", "high") if (one := _number(folder / f"memory.{name}")) is not None]
    usage = _number(folder / "memory.current")
    if not limits or usage is None:
        return None
    stat = _pairs(folder / "memory.stat")
    return min(limits), usage, stat.get("inactive_file", 0) + stat.get("active_file", 0)

"""What the host says about its memory: /proc/meminfo, pressure stall information, cgroup limits (v1 and v2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from cardcage.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HostMemory", "read_host_memory"]

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
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        v1 = "memory" in controllers.split(",")
        if not v1 and number != "0":
            continue
        for top, mount in _mounts(root, v1):
            inside = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
            for part in (inside, *inside.parents):
                numbers = _read_v1(mount / part) if v1 else _read_v2(mount / part)
                if numbers is not None:
                    yield str(Path(top) / part), mount / part, numbers


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

"""This process's memory as the host maps it (proc_pid_smaps(5))."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HostMapping", "cannot_merge", "cannot_move_out", "mappings", "no_huge_pages", "no_swap"]


def cannot_merge(address: int) -> str:
    """Why KSM cannot merge the mapping at *address* of this process; empty when it can (proc_pid_smaps(5))."""
    flags = _flags(address)
    if flags is None:
        return "it is not mapped"
    if "ht" in flags:
        return "it is made of huge pages (hugetlb)"
    if "sh" in flags:
        return "it is shared (a memfd, or a file behind it), and KSM merges only private memory"
    return ""


def cannot_move_out(address: int) -> str:
    """Why ``MADV_PAGEOUT`` can move no page of the mapping at *address* of this process out; empty when it can."""
    flags = _flags(address)
    if flags is None:
        return "it is not mapped"
    if "ht" in flags:
        return "it is made of huge pages (hugetlb), which stay"
    if "lo" in flags:
        return "it is locked in memory (mlock)"
    return "" if _on_disk(address) else no_swap()


def no_swap() -> str:
    """Why this process has nowhere to swap to; empty when it has (proc_meminfo(5), cgroups(7))."""
    with open("/proc/meminfo") as lines:
        if any(line.split() == ["SwapTotal:", "0", "kB"] for line in lines):
            return "this host has no swap space (swapon(8))"
    with open("/proc/self/cgroup") as lines:
        group = next((line[3:].strip() for line in lines if line.startswith("0::")), "")
    while group.strip("/"):
        try:
            with open(f"/sys/fs/cgroup{group}/memory.swap.max") as file:
                if file.read().strip() == "0":
                    return f"cgroup {group} may not swap (memory.swap.max)"
        except OSError:  # v1, or without the memory controller
            pass
        group = group.rpartition("/")[0]
    return ""


def no_huge_pages() -> str:
    """Why advice for huge pages does nothing here; empty when it does (Documentation/admin-guide/mm/transhuge.rst)."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            return "transparent huge pages are off on this host" if "[never]" in file.read() else ""
    except OSError:
        return "this kernel has no transparent huge pages"


def _flags(address: int) -> tuple[str, ...] | None:
    return next((one.flags for one in mappings() if one.start <= address < one.end), None)


def _on_disk(address: int) -> bool:
    """True when a file of a file system that is not memory itself is behind *address*."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, _, _, device, inode, *path = line.split(maxsplit=5)
            low, high = (int(one, 16) for one in span.split("-"))
            if low <= address < high:
                break
        else:
            return False
    if inode == "0" or not path or path[0].startswith(("/memfd:", "/dev/zero", "/SYSV")):
        return False
    number = ":".join(str(int(one, 16)) for one in device.split(":"))
    with open("/proc/self/mountinfo") as mounts:
        kinds = {line.split(" - ")[1].split()[0] for line in mounts if line.split()[2] == number}
    return not kinds & {"tmpfs", "ramfs", "devtmpfs"}


@frozen
class HostMapping:
    """A mapping of this process (proc_pid_smaps(5)).

    Attributes:
        start, end: addresses. flags: two letters each, such as ``mg`` (mergeable).
        sizes: bytes by name: ``Rss Pss Referenced Anonymous KSM Swap``, ...
    """

    start: int
    end: int
    flags: tuple[str, ...]
    sizes: dict[str, int]


def mappings() -> Iterator[HostMapping]:
    """Each mapping of this process; the kernel looks at every page of it, about 10 ms for a GiB."""
    start = end = 0
    sizes: dict[str, int] = {}
    with open("/proc/self/smaps") as lines:
        for line in lines:
            words = line.split()
            if words[0] == "VmFlags:":
                yield HostMapping(start, end, tuple(words[1:]), sizes)
            elif words[0].endswith(":"):
                sizes[words[0][:-1]] = int(words[1]) * 1024 if words[-1] == "kB" else int(words[1])
            else:
                low, _, high = words[0].partition("-")
                start, end, sizes = int(low, 16), int(high, 16), {}

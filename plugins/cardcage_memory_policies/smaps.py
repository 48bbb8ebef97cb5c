"""This process's memory as the host maps it (proc_pid_smaps(5))."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HostMapping", "cannot_merge", "mappings"]


def cannot_merge(address: int) -> str:
    """Why KSM cannot merge the mapping at *address* of this process; empty when it can (proc_pid_smaps(5))."""
    flags = next((one.flags for one in mappings() if one.start <= address < one.end), None)
    if flags is None:
        return "it is not mapped"
    if "ht" in flags:
        return "it is made of huge pages (hugetlb)"
    if "sh" in flags:
        return "it is shared (a memfd, or a file behind it), and KSM merges only private memory"
    return ""


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

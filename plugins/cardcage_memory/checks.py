"""Lines of ``cardcage doctor``: (whether it works, what was found, what would enable it)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from cardcage.ram import MADV_POPULATE_WRITE, numa_nodes, sealed_memfd
from cardcage.units import say_size

from cardcage_memory.hugetlb import pool, pool_command

__all__ = [
    "check_huge_pages_of_1_gib",
    "check_huge_pages_of_2_mib",
    "check_memfd",
    "check_numa",
    "check_preallocation",
    "check_transparent_huge_pages",
]

Finding = tuple[bool, str, str]


def check_preallocation() -> Finding:
    """MADV_POPULATE_WRITE, tried on one page."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        page.madvise(MADV_POPULATE_WRITE)
    except OSError as error:
        return False, f"page by page: madvise: {error.strerror}", "Linux 5.14 or later"
    return True, "by madvise (MADV_POPULATE_WRITE)", ""


def check_transparent_huge_pages() -> Finding:
    """The kernel's setting for advice about transparent huge pages."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    except OSError:
        return (
            False,
            "this kernel has no transparent huge pages",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
        )
    enable = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    return "[never]" not in text, text, enable


def check_memfd() -> Finding:
    """A sealed memfd, made and closed."""
    try:
        os.close(sealed_memfd(mmap.PAGESIZE, "check", 0))
    except OSError as error:
        return False, f"memfd: {error.strerror}", "a kernel with CONFIG_MEMFD_CREATE=y"
    return True, "sealed memory for other processes", ""


def check_huge_pages_of_2_mib() -> Finding:
    """The pool of pages of 2 MiB."""
    return _pool(2 << 20, 256, "a kernel with CONFIG_HUGETLBFS=y")


def check_huge_pages_of_1_gib() -> Finding:
    """The pool of pages of 1 GiB."""
    return _pool(1 << 30, 1, "a processor with pdpe1gb, and a kernel with CONFIG_HUGETLBFS=y")


def _pool(page: int, pages: int, without: str) -> Finding:
    total, free = pool(page, "nr_hugepages"), pool(page, "free_hugepages")
    if total is None:
        return False, f"the host has no pages of {say_size(page)}", without
    return bool(total), f"{free} of {total} pages are free", pool_command(page, pages)


def check_numa() -> Finding:
    """The nodes, and whether the kernel takes mbind(2)."""
    nodes = numa_nodes()
    libc = ctypes.CDLL(None, use_errno=True)
    if not nodes or libc.syscall(239, None, None, 0, None, 0):  # get_mempolicy
        return False, "the kernel has no NUMA", "a kernel with CONFIG_NUMA=y"
    return True, f"node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))}", ""

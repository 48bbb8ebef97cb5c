"""Huge pages out of the host's pool (hugetlb, Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from attrs import field, frozen
from cardcage.errors import ConfigError
from cardcage.ram import Backing, sealed_memfd
from cardcage.units import Size

__all__ = ["Hugetlb", "HugetlbOptions", "pool", "pool_command"]

POOLS = Path("/sys/kernel/mm/hugepages")
MFD_HUGETLB = 4
MAP_HUGETLB = 0x40000
SHIFT = 26
"""Where the binary logarithm of the page's size stands in the flags of memfd_create(2) and mmap(2)."""


@frozen
class HugetlbOptions:
    """Options of memory back end ``hugetlb``.

    Attributes:
        page: size of a page: ``2M`` or ``1G``, as the host has them.
        shared: as a memfd, which other processes can map (vhost-user); else private.
    """

    page: Size = field(default=Size("2M"))
    shared: bool = True


def pool(page: int, name: str) -> int | None:
    """A number of the host's pool of pages of *page* bytes (``free_hugepages``), None when it has no such pool."""
    try:
        return int((POOLS / f"hugepages-{page >> 10}kB" / name).read_text())
    except (OSError, ValueError):
        return None


def pool_command(page: int, pages: int) -> str:
    """The command that makes *pages* pages of *page* bytes available."""
    return f"echo {pages} | sudo tee {POOLS}/hugepages-{page >> 10}kB/nr_hugepages"


class Hugetlb:
    """RAM out of the host's pool of huge pages, reserved whole at once: a guest never finds it empty later."""

    takes_ram = False

    def __init__(self, options: HugetlbOptions) -> None:
        self.options = options

    def allocate(self, size: int, name: str, /) -> Backing:
        page = self.options.page
        total = pool(page, "nr_hugepages") if page else None
        if total is None:
            known = sorted(Size(int(one.name[10:-2]) << 10) for one in POOLS.glob("hugepages-*kB"))
            text = ", ".join(map(str, known)) or "none"
            raise ConfigError(f"the host has no pages of {page} (it has: {text})", key="page")
        if size % page:
            raise ConfigError(f"expected a multiple of {page}, the page size in [memory], got {Size(size)}")
        try:
            return self._map(size, name)
        except OSError as error:
            free, wanted = pool(page, "free_hugepages") or 0, size // page
            raise ConfigError(
                f"{wanted} pages of {page} are needed, {free} of the host's {total} are free ({error.strerror}): "
                f"{pool_command(page, total - free + wanted)}",
                key="page",
            ) from error

    def _map(self, size: int, name: str) -> Backing:
        flags = (self.options.page.bit_length() - 1) << SHIFT
        page = int(self.options.page)
        if not self.options.shared:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB | flags
            return Backing(mmap.mmap(-1, size, flags=private), page=page, guarded=True)
        fd = sealed_memfd(size, name, MFD_HUGETLB | flags)
        try:
            mapped = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return Backing(mapped, fd, page, mmap.MADV_REMOVE, guarded=True)

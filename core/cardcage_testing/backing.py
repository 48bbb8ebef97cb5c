"""``check_memory_backend``: the contract of :class:`~cardcage.ram.MemoryBackend`."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from cardcage.abilities import near_misses, require
from cardcage.errors import ConfigError, HostError
from cardcage.ram import PAGE, MemoryBackend, RamBlock

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_memory_backend"]


def check_memory_backend(make: Callable[[], MemoryBackend], size: int = 4 << 20, *, zeros: bool = True) -> None:
    """Hold what *make* gives (as for one machine) to the contract, with *size* bytes. Raises AssertionError.

    Args:
        size: bytes, a multiple of the back end's page.
        zeros: whether the memory reads as zeros at first (a file may hold something).
    """
    files = len(os.listdir("/proc/self/fd"))
    backend = make()
    misses = near_misses(require(backend, MemoryBackend), (MemoryBackend,))
    assert not misses, f"{type(backend).__name__}: {'; '.join(misses)}"
    assert isinstance(backend.takes_ram, bool), "takes_ram is not a bool"
    block = RamBlock(size, "check", backend)
    page = block.page
    assert page in [1 << at for at in range(12, 31)], f"page: {page} is not a power of two from {PAGE} up"
    assert isinstance(block.map, mmap.mmap), "map is no mmap.mmap"
    assert len(block.map) >= block.offset + size, "the mapping is shorter than was asked for"
    assert block.host_address % page == 0, f"the mapping does not begin at a page of {page} bytes"
    if zeros:
        assert not any(block.view[at] for at in range(0, size, PAGE)), "new memory does not read as zeros"
    block.view[0], block.view[size - 1] = 0x5A, 0xA5
    assert (block.view[0], block.view[size - 1]) == (0x5A, 0xA5), "the memory does not keep what is written"
    if block.fd >= 0:
        _check_shared(block, size)
    _check_discard(block, size)
    block.close()
    block.close()
    del block, backend
    assert len(os.listdir("/proc/self/fd")) == files, "a closed block leaves file descriptors open"
    _check_too_much(make, files)


def _check_shared(block: RamBlock, size: int) -> None:
    with mmap.mmap(block.fd, size) as other:
        assert (other[0], other[size - 1]) == (0x5A, 0xA5), "fd does not show the memory's bytes"
        other[1] = 0x77
        assert block.view[1] == 0x77, "what another process writes through fd does not show"


def _check_discard(block: RamBlock, size: int) -> None:
    if block.discard(0, block.page):
        assert not any(block.view[: block.page]), "discarded memory does not read as zeros"
    else:
        assert block.view[0] == 0x5A, "a discard that is refused changed memory"
    if size > block.page:
        assert block.view[size - 1] == 0xA5, "a discard reaches further than it was asked to"
    assert not block.discard(1, block.page), "a discard of part of a page is not refused"
    block.view[0] = 1
    assert block.view[0] == 1, "discarded memory cannot be written again"


def _check_too_much(make: Callable[[], MemoryBackend], files: int) -> None:
    try:
        RamBlock(1 << 62, "check", make())
    except (ConfigError, HostError):
        assert len(os.listdir("/proc/self/fd")) == files, "a refused allocation leaves file descriptors open"
        return
    raise AssertionError("4 EiB: expected ConfigError or HostError")

"""Which parts of a machine's RAM hold anything, found without reading it: the kernel knows what was ever touched."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from cardcage.ram import PAGE, Anonymous
from cardcage_jail import open_file

from cardcage_snapshot.backing import SnapshotRam

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage.ram import RamBlock

__all__ = ["SCAN_WRITTEN", "file_runs", "held", "keep_pagemap", "renew_pagemap", "runs_of", "scanned", "touched"]

PAGEMAP_SCAN = 0xC0606610
WRITTEN, FILE, PRESENT, SWAPPED, ZERO = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
"""Categories of pages (linux/fs.h, Linux 6.7)."""
SCAN_WRITTEN = 3
"""PM_SCAN_WP_MATCHING and PM_SCAN_CHECK_WPASYNC: what was written since it was last protected; it is protected anew."""
REGIONS = 4096
HAS = bytes(int(one >= 0x40) for one in range(256))
"""By the highest byte of an entry of pagemap(5): bit 63 present, 62 swapped."""
OWN = bytes(int(one >= 0x40 and not one & 0x20) for one in range(256))
"""The same without bit 61: a page of a file, or shared."""

_kept: list[Any] = []
Run = tuple[int, int]
"""Offset and size in bytes."""


class _Scan(ctypes.Structure):
    """``struct pm_scan_arg``."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in "size flags start end walk_end vec vec_len max_pages inverted mask anyof returned".split()
    )


def keep_pagemap() -> None:
    """Hold pagemap(5) open for a process that goes into a jail."""
    if not _kept:
        with suppress(OSError):
            _kept.append(open("/proc/self/pagemap", "rb", buffering=0, opener=open_file))  # noqa: SIM115  for good


def renew_pagemap() -> None:
    """This is a forked process: the file that is held open is of its parent."""
    if _kept:
        _kept.pop().close()
        keep_pagemap()


def _pagemap() -> Any:
    """The file, in a context. Raises OSError."""
    return nullcontext(_kept[0]) if _kept else open("/proc/self/pagemap", "rb", buffering=0, opener=open_file)


def runs_of(block: RamBlock) -> tuple[list[Run], int]:
    """Where *block* may hold other bytes than zeros, or than the file below it: sorted runs of whole pages.

    Returns them, and a descriptor of the file below them, -1 where there is none.
    """
    if block.fd >= 0:
        return list(file_runs(block.fd, block.size)), -1
    if isinstance(block.backend, SnapshotRam):
        return touched(block, own=True), block.backend.fd
    if isinstance(block.backend, Anonymous):
        return touched(block, own=False), -1
    return [(0, block.size)], -1  # hugetlb, or another's private file: who knows what it shows untouched


def held(runs: list[Run]) -> int:
    """Bytes in *runs*."""
    return sum(size for _, size in runs)


def file_runs(fd: int, end: int) -> Iterator[Run]:
    """Where a file has data, up to *end*."""
    at = 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            stop = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= end:
            return
        yield start, min(stop, end) - start
        at = stop


def touched(block: RamBlock, *, own: bool) -> list[Run]:
    """The pages of a private mapping that are there; with *own* only those that are no longer the file's."""
    try:
        return scanned(block, own=own)
    except OSError:  # before Linux 6.7
        pass
    try:
        return _mapped(block, own=own)
    except OSError:  # a jail that was not told
        return [(0, block.size)]


def scanned(block: RamBlock, *, own: bool, mode: int = 0) -> list[Run]:
    """Runs of pages that are there, by PAGEMAP_SCAN; *mode* are its flags. Raises OSError before Linux 6.7."""
    base, without = block.host_address, ZERO | FILE if own else ZERO
    regions = (ctypes.c_uint64 * (3 * REGIONS))()
    found: list[Run] = []
    with _pagemap() as pagemap:
        at, end = base, base + block.size
        while at < end:
            scan = _Scan(ctypes.sizeof(_Scan), mode, at, end, 0, ctypes.addressof(regions), REGIONS, 0)
            scan.inverted = without
            scan.mask = without | WRITTEN if mode else without
            scan.anyof, scan.returned = PRESENT | SWAPPED, ZERO
            count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, scan)
            for start, stop in zip(regions[0 : 3 * count : 3], regions[1 : 3 * count : 3], strict=True):
                if found and sum(found[-1]) == start - base:
                    found[-1] = (found[-1][0], stop - base - found[-1][0])
                else:
                    found.append((start - base, stop - start))
            at = scan.walk_end
    return found


def _mapped(block: RamBlock, *, own: bool) -> list[Run]:
    kinds, found, step = OWN if own else HAS, [], 64 << 20
    with _pagemap() as pagemap:
        for at in range(0, block.size, step):
            size = min(step, block.size - at) // PAGE * 8
            flags = os.pread(pagemap.fileno(), size, (block.host_address + at) // PAGE * 8)[7::8].translate(kinds)
            for one in re.finditer(b"\1+", flags):
                found.append((at + one.start() * PAGE, (one.end() - one.start()) * PAGE))
    return found

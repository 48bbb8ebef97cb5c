"""Host memory that guests use as RAM: the seam of memory back ends, and the two that need nothing of the host.

A back end maps memory; the core does what is the same for all of them: NUMA nodes, advice about transparent huge
pages, preallocation, the guard against SIGBUS. A card offers a back end with ``registry.memory(name, factory,
options=...)``, and ``[memory] type = "name"`` uses it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from attrs import field

from cardcage._memory.sigbus import guard
from cardcage.errors import ConfigError, HostError
from cardcage.units import say_size
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._memory.sigbus import Watch

__all__ = [
    "PAGE",
    "Anonymous",
    "Backing",
    "Memfd",
    "MemoryBackend",
    "Placement",
    "RamBlock",
    "address_of",
    "fenced",
    "numa_nodes",
    "sealed_memfd",
]

PAGE = 4096
CHUNK = 64 << 20
"""Bytes that are preallocated in one go: between two, other threads of the interpreter run."""
MADV_POPULATE_WRITE = 23
SYS_MBIND = 237
MPOL = {"preferred": 1, "bind": 2, "interleave": 3}
MAP_NORESERVE = 0x4000
FENCE = 2 << 20


def _nothing() -> None:
    """Give back nothing besides the mapping, as most back ends do."""


@frozen(eq=False)
class Backing:
    """The memory that a back end gives.

    Attributes:
        map: the memory, readable and writable. offset: where in it RAM begins, a multiple of ``page``.
        fd: a file with the same bytes from offset 0 on, which another process can map; -1 if there is none. The block
            closes it.
        page: the least unit, in bytes, that the host gives or takes back.
        discard: the advice of madvise(2) that gives pages back and makes them read as zeros, None when none does.
        guarded: whether an access can end in SIGBUS. release: called once after the memory is unmapped.
    """

    map: mmap.mmap
    fd: int = -1
    page: int = PAGE
    discard: int | None = mmap.MADV_DONTNEED
    guarded: bool = False
    release: Callable[[], None] = _nothing
    offset: int = 0


class MemoryBackend(Protocol):
    """A memory back end card's factory product: made for one machine, asked once."""

    takes_ram: bool
    """True if the memory comes out of the host's ordinary memory, which admission counts."""

    def allocate(self, size: int, name: str, /) -> Backing:
        """Map *size* bytes (whole pages of 4 KiB). *name* is for listings. On failure nothing is left.

        Raises ConfigError (its ``key`` an option of the back end) or HostError when that cannot be.
        """


@frozen
class Placement:
    """Keys of ``[memory]`` that hold for each back end.

    Attributes:
        preallocate: take all of it from the host at once; else each page when it is first used.
        huge_pages: advice to the kernel about transparent huge pages; ``default`` gives none.
        nodes: NUMA nodes of the host that it may come from; empty for wherever the host likes.
        numa: how the nodes are used: ``bind`` only these, ``preferred`` these first, ``interleave`` by turns.
    """

    preallocate: bool = False
    huge_pages: Literal["default", "always", "never"] = "default"
    nodes: list[int] = field(factory=list)
    numa: Literal["bind", "preferred", "interleave"] = "bind"


class Anonymous:
    """Anonymous private memory: the default. KSM can merge it; no other process can map it."""

    takes_ram = True

    def allocate(self, size: int, name: str, /) -> Backing:
        return fenced(size)


class Memfd:
    """Memory with a file descriptor, so that vhost-user back ends can map it; sealed, so that none can cut it short."""

    takes_ram = True

    def allocate(self, size: int, name: str, /) -> Backing:
        fd = sealed_memfd(size, name, 0)
        try:
            mapped = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return Backing(mapped, fd, discard=mmap.MADV_REMOVE, guarded=True)


def fenced(size: int) -> Backing:
    """Anonymous private memory between two stretches that nobody can touch. Raises OSError.

    Without them the kernel joins neighbours, two machines' RAM say, into one mapping, and no longer counts them apart.
    """
    # 2 MiB, so that what lies between can be made of huge pages
    whole = FENCE + -(-size // FENCE) * FENCE + FENCE
    mapped = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    libc = ctypes.CDLL(None, use_errno=True)
    start = address_of(mapped)
    for low, high in ((0, FENCE), (FENCE + size, whole)):
        if libc.mprotect(ctypes.c_void_p(start + low), ctypes.c_size_t(high - low), 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return Backing(mapped, offset=FENCE)


def address_of(mapped: mmap.mmap) -> int:
    """Where it is mapped."""
    export = ctypes.c_char.from_buffer(mapped)
    try:
        return ctypes.addressof(export)
    finally:
        del export


def sealed_memfd(size: int, name: str, flags: int) -> int:
    """A memfd of *size* bytes that nobody can shrink or grow; *flags* are MFD_HUGETLB and a size of pages."""
    import fcntl

    fd = os.memfd_create(f"cardcage-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def numa_nodes() -> list[int]:
    """The NUMA nodes of the host that are online; empty when the kernel has no NUMA."""
    try:
        text = Path("/sys/devices/system/node/online").read_text().strip()
    except OSError:
        return []
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


class RamBlock:
    """Host memory that guests use as RAM.

    Args:
        size: bytes, rounded up to whole pages.
        name: for listings.
        backend: who maps it. placement: NUMA nodes, advice and preallocation.

    Raises :exc:`~cardcage.errors.HostError` when the host has not that much, ConfigError for what a key is to blame.
    Attributes: ``map offset view host_address fd page`` (see :class:`Backing`), ``watch`` while it is guarded.
    """

    def __init__(
        self, size: int, name: str = "ram", backend: MemoryBackend | None = None, placement: Placement | None = None
    ) -> None:
        self.name, self.size = name, -(-size // PAGE) * PAGE
        self.backend: MemoryBackend = backend or Anonymous()
        try:
            self._backing = self.backend.allocate(self.size, name)
        except (OSError, ValueError, OverflowError) as error:
            raise HostError(f"{name}: the host cannot give {size} bytes of memory: {error}") from error
        self.map, self.fd, self.page = self._backing.map, self._backing.fd, self._backing.page
        self._release, self.offset = self._backing.release, self._backing.offset
        self._export = ctypes.c_char.from_buffer(self.map)
        self.host_address = ctypes.addressof(self._export) + self.offset
        self.view = memoryview(self.map)[self.offset : self.offset + self.size]
        self.watch: Watch | None = None
        if self._backing.guarded:
            self.watch = guard().watch(self.host_address, self.size, self.page)
        try:
            self.map.madvise(mmap.MADV_DONTFORK)
            self._place(placement or Placement())
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise HostError(f"{name}: {error.strerror}") from error
            raise

    def _place(self, placement: Placement) -> None:
        if placement.nodes:
            _bind(self.host_address, self.size, placement)
        if placement.huge_pages != "default":
            advice = mmap.MADV_HUGEPAGE if placement.huge_pages == "always" else mmap.MADV_NOHUGEPAGE
            try:
                self.map.madvise(advice, self.offset, self.size)
            except OSError as error:
                raise ConfigError(
                    f"the kernel does not accept advice about transparent huge pages here: {error.strerror}",
                    key="huge_pages",
                ) from error
        if placement.preallocate:
            self.populate()

    def populate(self) -> None:
        """Take all pages from the host now. Raises ConfigError, key ``preallocate``, when it has not that many."""
        left = _available()
        if self.backend.takes_ram and self.size > left:  # a cgroup's limit is the fleet card's to see
            raise ConfigError(
                f"{say_size(self.size)} cannot be allocated at once: the host has {say_size(left)} left",
                key="preallocate",
            )
        libc = ctypes.CDLL(None, use_errno=True)
        step = max(CHUNK, self.page)
        for at in range(0, self.size, step):
            length = min(step, self.size - at)
            address = ctypes.c_void_p(self.host_address + at)
            while libc.madvise(address, ctypes.c_size_t(length), MADV_POPULATE_WRITE):
                number = ctypes.get_errno()
                if number == 22:  # before Linux 5.14: touch each page, and let the guard see what cannot be had
                    self._touch(at, length)
                    break
                if number not in (4, 11):  # EINTR, EAGAIN
                    raise self._short(at, os.strerror(number))

    def _touch(self, at: int, length: int) -> None:
        for offset in range(at, at + length, self.page):
            self.view[offset] = self.view[offset]
        if self.watch is not None and self.watch.offset is not None:
            raise self._short(self.watch.offset, "out of pages")

    def _short(self, had: int, why: str) -> ConfigError:
        text = (
            f"{say_size(self.size)} cannot all be allocated: the host gave about {say_size(had)}, then no more ({why})"
        )
        return ConfigError(text, key="preallocate")

    def discard(self, offset: int, size: int) -> bool:
        """Give pages back to the host; they read as zeros from now on. False when the host cannot do that."""
        advice = self._backing.discard
        if advice is None or offset % self.page or size % self.page:
            return False
        try:
            self.map.madvise(advice, self.offset + offset, size)
        except OSError:
            return False
        return True

    def fault(self) -> HostError | None:
        """The reason why memory was taken away under the guest; None if it was not."""
        if self.watch is None or self.watch.offset is None:
            return None
        at = say_size(self.watch.offset)
        if self.watch.broke:
            return HostError(f"{self.name}: the host's memory broke at {at} (machine check)")
        return HostError(f"{self.name}: no memory at {at}: its file was cut short, or its file system or pool is full")

    def close(self) -> None:
        """Give the memory back. Idempotent. Views still held keep it alive until they are released."""
        try:
            self.view.release()
            del self._export
            self.map.close()
        except (BufferError, AttributeError):
            pass
        if self.watch is not None:
            guard().release(self.watch)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        release, self._release = self._release, _nothing
        release()


def _available() -> int:
    """Bytes that the host can give without swapping (MemAvailable, proc_meminfo(5))."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _bind(address: int, size: int, placement: Placement) -> None:
    """mbind(2) of a mapping, before its pages are touched. Raises ConfigError for nodes that the host has not."""
    online = numa_nodes()
    for at, node in enumerate(placement.nodes):
        if node not in online:
            known = ", ".join(map(str, online)) or "none: its kernel has no NUMA"
            raise ConfigError(f"the host has no NUMA node {node} (online: {known})", key=f"nodes[{at}]")
    words = max(placement.nodes) // 64 + 1
    mask = (ctypes.c_ulong * words)()
    for node in placement.nodes:
        mask[node // 64] |= 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    mode, most = ctypes.c_long(MPOL[placement.numa]), ctypes.c_ulong(64 * words + 1)
    where = ctypes.c_void_p(address), ctypes.c_ulong(size)
    if libc.syscall(ctypes.c_long(SYS_MBIND), *where, mode, mask, most, ctypes.c_ulong(0)):
        why = os.strerror(ctypes.get_errno())
        raise ConfigError(f"the kernel does not allocate memory from these NUMA nodes: {why}", key="nodes")

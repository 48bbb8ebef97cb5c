"""Guest memory: the physical address space that shows RAM blocks, and how devices reach it.

RAM above the PCI hole follows QEMU's ``pc`` sizes: up to 3.5 GiB all of it starts at 0; with more, 3 GiB stays below
and the rest starts at 4 GiB.
"""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from cardcage.accelerator import MemorySlot
from cardcage.errors import ConfigError, UsageError
from cardcage.ram import PAGE, RamBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cardcage.accelerator import AcceleratedVm
    from cardcage.errors import HostError

__all__ = [
    "PAGE",
    "GuestMemory",
    "GuestMemoryError",
    "PhysicalMemory",
    "RamBlock",
    "RamRange",
    "SlotListener",
    "check_ram",
    "split_ram",
]

GIB = 1 << 30


class GuestMemoryError(UsageError):
    """An access to guest-physical memory that is not RAM, or not all of it; the message gives the range."""


def split_ram(size: int) -> tuple[int, int]:
    """Return (bytes from address 0, bytes from 4 GiB) for *size* bytes of RAM."""
    return (size, 0) if size <= 0xE0000000 else (3 * GIB, size - 3 * GIB)


@frozen(eq=False)
class RamRange:
    """Where a block shows in the physical address space. Of ranges that overlap, the higher priority shows."""

    address: int
    size: int
    block: RamBlock
    offset: int = 0
    readonly: bool = False
    priority: int = 0


class SlotListener(Protocol):
    """Told of changes of the flat view, in an order in which slots never overlap."""

    def map_memory(self, slot: MemorySlot, /) -> None: ...

    def unmap_memory(self, slot: MemorySlot, /) -> None: ...


class GuestMemory(Protocol):
    """How devices and boot images reach guest RAM. Addresses are guest-physical; every range is checked.

    Raises :exc:`GuestMemoryError` for a range that is not all RAM.
    """

    def read(self, address: int, size: int, /) -> bytes: ...

    def write(self, address: int, data: bytes | memoryview, /) -> None: ...

    def view(self, address: int, size: int, /) -> memoryview:
        """RAM without a copy, within one RAM range. After writing through it, call :meth:`written`."""
        ...

    def written(self, address: int, size: int, /) -> None:
        """Bytes were changed through a view, or by preadv, io_uring or a back end process."""
        ...

    def written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """As :meth:`written` for each (address, size), at the cost of one."""
        ...

    def contains(self, address: int, size: int, /) -> bool: ...

    def discard(self, address: int, size: int, /) -> bool:
        """Give whole pages back to the host; they read as zeros from now on. False when the host cannot."""
        ...


class PhysicalMemory:
    """The physical address space's RAM: ranges by priority, flattened into sorted disjoint slots.

    ``listener`` (the accelerator's VM) hears of slots; ``on_written`` hears of ranges that the host changed, and
    ``on_written_many``, where there is one, of many at once.
    """

    def __init__(self) -> None:
        self.ranges: list[RamRange] = []
        self.slots: list[MemorySlot] = []
        self._views: list[tuple[int, int, memoryview, bool]] = []
        self._starts: list[int] = []
        self.generation = 0
        """Counts changes of what is shown where: what was kept of :meth:`span` holds until the next."""
        self.listener: SlotListener | None = None
        self.on_written: Callable[[int, int], None] | None = None
        self.on_written_many: Callable[[Sequence[tuple[int, int]]], None] | None = None

    def add(self, *ranges: RamRange) -> None:
        """Show more RAM. Addresses and sizes are page aligned; raises UsageError otherwise."""
        self.change(add=ranges)

    def change(self, add: tuple[RamRange, ...] = (), remove: tuple[RamRange, ...] = ()) -> None:
        """Add and remove ranges in one step. With vCPUs running, call it inside the accelerator's ``quiesce()``."""
        for one in add:
            if one.address % PAGE or one.size % PAGE or one.size <= 0 or one.offset % PAGE:
                raise UsageError(f"{one.block.name}: {one.address:#x}+{one.size:#x} is not made of whole pages")
            if one.offset + one.size > one.block.size:
                raise UsageError(f"{one.block.name}: the range reaches past the block's {one.block.size:#x} bytes")
        self.ranges = [one for one in self.ranges if not any(one is gone for gone in remove)] + list(add)
        self._flatten()

    def _flatten(self) -> None:
        edges = sorted({edge for one in self.ranges for edge in (one.address, one.address + one.size)})
        ordered = sorted(self.ranges, key=lambda one: -one.priority)
        flat: list[tuple[MemorySlot, RamRange]] = []
        for low, high in itertools.pairwise(edges):
            top = next((one for one in ordered if one.address <= low and high <= one.address + one.size), None)
            if top is None:
                continue
            host = top.block.host_address + top.offset + low - top.address
            if flat:
                last, owner = flat[-1]
                if (
                    last.address + last.size == low
                    and last.host_address + last.size == host
                    and last.readonly == top.readonly
                    and owner.block is top.block
                ):
                    flat[-1] = (
                        MemorySlot(last.address, last.size + high - low, last.host_address, last.readonly),
                        owner,
                    )
                    continue
            flat.append((MemorySlot(low, high - low, host, top.readonly), top))
        old, new = set(self.slots), {slot for slot, _ in flat}
        if self.listener is not None:
            for slot in sorted(old - new, key=lambda one: one.address):
                self.listener.unmap_memory(slot)
            for slot in sorted(new - old, key=lambda one: one.address):
                self.listener.map_memory(slot)
        self.slots = [slot for slot, _ in flat]
        views = []
        for slot, owner in flat:
            start = slot.host_address - owner.block.host_address
            views.append((slot.address, slot.size, owner.block.view[start : start + slot.size], slot.readonly))
        self._starts, self._views = [one[0] for one in views], views
        self.generation += 1

    def attach(self, listener: SlotListener) -> None:
        """Tell *listener* all slots, and from now on each change."""
        for slot in self.slots:
            listener.map_memory(slot)
        self.listener = listener

    def _find(self, address: int, size: int) -> tuple[memoryview, int]:
        views, starts = self._views, self._starts
        at = bisect_right(starts, address) - 1
        if at >= 0 and size >= 0:
            base, length, view, _ = views[at]
            offset = address - base
            if offset + size <= length:
                return view, offset
        raise GuestMemoryError(f"guest memory {address:#x}+{size:#x}: not RAM")

    def contains(self, address: int, size: int, /) -> bool:
        """Whether the whole range is RAM inside one slot."""
        try:
            self._find(address, size)
        except GuestMemoryError:
            return False
        return True

    def view(self, address: int, size: int, /) -> memoryview:
        view, offset = self._find(address, size)
        return view[offset : offset + size]

    def span(self, address: int, /) -> tuple[int, memoryview]:
        """The stretch of RAM around *address*: its start, and a view to keep until :attr:`generation` changes."""
        view, offset = self._find(address, 1)
        return address - offset, view

    def read(self, address: int, size: int, /) -> bytes:
        return b"".join(self._pieces(address, size))

    def write(self, address: int, data: bytes | memoryview, /) -> None:
        pieces = list(self._pieces(address, len(data)))  # all checked before the first byte changes
        if len(pieces) == 1:
            pieces[0][:] = data
        else:
            at, whole = 0, memoryview(data)  # a slice of bytes would be a copy, of a kernel say
            for piece in pieces:
                piece[:] = whole[at : at + len(piece)]
                at += len(piece)
        self.written(address, len(data))

    def _pieces(self, address: int, size: int) -> Iterator[memoryview]:
        if size < 0:
            raise GuestMemoryError(f"guest memory {address:#x}: size {size} is below 0")
        while size:
            at = bisect_right(self._starts, address) - 1
            if at < 0 or address >= self._views[at][0] + self._views[at][1]:
                raise GuestMemoryError(f"guest memory {address:#x}+{size:#x}: not RAM")
            base, length, view, _ = self._views[at]
            take = min(size, base + length - address)
            yield view[address - base : address - base + take]
            address, size = address + take, size - take

    def discard(self, address: int, size: int, /) -> bool:
        """Give the whole pages of one RAM range back to the host (balloon): they read as zeros from now on."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address % PAGE or size % PAGE or size <= 0 or not self.contains(address, size):
            raise GuestMemoryError(f"guest memory {address:#x}+{size:#x}: not whole pages of RAM")
        host = self.slots[at].host_address + address - self.slots[at].address
        block = next(one.block for one in self.ranges if 0 <= host - one.block.host_address < one.block.size)
        if not block.discard(host - block.host_address, size):
            return False
        self.written(address, size)
        return True

    def written(self, address: int, size: int, /) -> None:
        if self.on_written is not None and size:
            self.on_written(address, size)

    def written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        if self.on_written_many is not None:
            if ranges:
                self.on_written_many(ranges)
        else:
            for address, size in ranges:
                self.written(address, size)

    def report_to(self, vm: AcceleratedVm) -> None:
        """Tell *vm* of what the host writes, many ranges at once where it can take them."""
        self.on_written = vm.memory_written
        self.on_written_many = getattr(vm, "memory_written_many", None)

    @contextmanager
    def writable(self, address: int, size: int) -> Iterator[memoryview]:
        """A view for writing; leaving the block reports the range as written."""
        view = self.view(address, size)
        try:
            yield view
        finally:
            self.written(address, size)

    def fault(self) -> HostError | None:
        """What the host took away under the guest (:meth:`cardcage.ram.RamBlock.fault`), ``None`` when nothing."""
        return next((error for one in self.ranges if (error := one.block.fault()) is not None), None)

    def close(self) -> None:
        """Release the views and blocks. Idempotent."""
        for _, _, view, _ in self._views:
            view.release()
        self._views, self._starts, self.slots = [], [], []
        for block in {id(one.block): one.block for one in self.ranges}.values():
            block.close()
        self.ranges = []


def check_ram(size: int, *, limited: bool = True) -> int:
    """Check a configured amount of RAM against the host (when it is *limited* by that).

    Raises :exc:`~cardcage.errors.ConfigError`.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size < 1 << 20:
        raise ConfigError(f"{int(size)} bytes of memory is too little: expected at least 1M")
    if size % PAGE:
        raise ConfigError(f"expected a multiple of {PAGE} bytes, got {size}")
    if limited and size > total:
        raise ConfigError(f"{size / GIB:.1f} GiB of memory is more than this host has ({total / GIB:.1f} GiB)")
    return size

"""Guest memory: the physical address space that shows RAM blocks, and how devices reach it and give it back."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from attrs import field

from cardcage.abilities import has
from cardcage.accelerator import MemorySlot, WrittenMany
from cardcage.errors import UsageError
from cardcage.ram import PAGE, RamBlock
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cardcage.accelerator import AcceleratedVm
    from cardcage.errors import HostError

__all__ = [
    "PAGE",
    "GuestMemory",
    "GuestMemoryError",
    "GuestMemoryReport",
    "MemoryBalloon",
    "PhysicalMemory",
    "RamBlock",
    "RamMap",
    "RamRange",
    "SharedRange",
    "SlotListener",
    "Spans",
]


class GuestMemoryError(UsageError):
    """An access to guest-physical memory that is not RAM, or not all of it; the message gives the range."""


@frozen(eq=False)
class RamRange:
    """Where a block shows in the physical address space. Of ranges that overlap, the higher priority shows."""

    address: int
    size: int
    block: RamBlock
    offset: int = 0
    readonly: bool = False
    priority: int = 0


@frozen
class SharedRange:
    """Guest RAM as another process maps it.

    Attributes:
        address, size: guest-physical, in bytes. readonly: for the guest.
        fd: file descriptor that *offset* is in, below 0 where the memory has none. name: the block's, for errors.
        host_address: this process's address of the block's first byte.
    """

    address: int
    size: int
    offset: int
    readonly: bool
    name: str
    fd: int
    host_address: int


Stretches = tuple[list[int], list[tuple[int, int, memoryview]]]


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

    def written(self, address: int, size: int, /) -> None:
        """Bytes were changed through a view, or by preadv, io_uring or a back end process."""

    def written_many(self, ranges: Sequence[tuple[int, int]], /) -> None:
        """As :meth:`written` for each (address, size), at the cost of one."""

    def contains(self, address: int, size: int, /) -> bool: ...

    def discard(self, address: int, size: int, /) -> bool:
        """Give whole pages back to the host; they read as zeros from now on. False when the host cannot."""


class Spans(Protocol):
    """Guest memory whose views may be kept, and cut up by who keeps them."""

    @property
    def generation(self) -> int:
        """Counts changes of what is shown where: what was kept of :meth:`span` holds until the next."""

    def span(self, address: int, /) -> tuple[int, memoryview]:
        """The stretch of RAM around *address*: its start, and a view to keep until :attr:`generation` changes."""


class RamMap(ABC):
    """RAM by guest-physical address: what reads, writes and views it, over the stretches that it is given.

    Another thread may be inside one of its calls while it is given others: each looks at them once.
    """

    __slots__ = ("__weakref__", "_shown")

    def __init__(self) -> None:
        self._shown: Stretches = ([], [])

    def show(self, stretches: Stretches) -> None:
        """Answer from *stretches* from now on: their starts, sorted, and each as (address, size, view)."""
        self._shown = stretches

    @abstractmethod
    def written(self, address: int, size: int, /) -> None:
        """See :meth:`GuestMemory.written`."""

    def _missing(self, address: int, what: str) -> GuestMemoryError:
        return GuestMemoryError(f"guest memory {what}")

    def _find(self, address: int, size: int) -> tuple[memoryview, int]:
        starts, stretches = self._shown
        at = bisect_right(starts, address) - 1
        if at >= 0 and size >= 0:
            base, length, view = stretches[at]
            offset = address - base
            if offset + size <= length:
                return view, offset
        raise self._missing(address, f"{address:#x}+{size:#x}: not RAM")

    def contains(self, address: int, size: int, /) -> bool:
        """True when the whole range is RAM inside one slot."""
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
        starts, stretches = self._shown
        while size:
            at = bisect_right(starts, address) - 1
            if at < 0 or address >= stretches[at][0] + stretches[at][1]:
                raise self._missing(address, f"{address:#x}+{size:#x}: not RAM")
            base, length, view = stretches[at]
            take = min(size, base + length - address)
            yield view[address - base : address - base + take]
            address, size = address + take, size - take


class PhysicalMemory(RamMap):
    """The physical address space's RAM: ranges by priority, flattened into sorted disjoint slots.

    ``listener`` (the accelerator's VM) hears of slots; ``on_written`` hears of ranges that the host changed, and
    ``on_written_many``, where there is one, of many at once.
    """

    def __init__(self) -> None:
        self.ranges: list[RamRange] = []
        self.slots: list[MemorySlot] = []
        super().__init__()
        self._followers: WeakSet[RamMap] = WeakSet()
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
            views.append((slot.address, slot.size, owner.block.view[start : start + slot.size]))
        self.show(([one[0] for one in views], views))

    def show(self, stretches: Stretches) -> None:
        """The same for all that follow."""
        super().show(stretches)
        for one in self._followers:
            one.show(stretches)
        self.generation += 1

    def follow(self, follower: RamMap, on: bool = True) -> None:
        """Show *follower* the same, now and after each change, for as long as somebody holds it; or nothing any more.

        Either way :attr:`generation` counts on: views that were kept are asked for again.
        """
        (self._followers.add if on else self._followers.discard)(follower)
        follower.show(self._shown if on else ([], []))
        self.generation += 1

    def attach(self, listener: SlotListener) -> None:
        """Tell *listener* all slots, and from now on each change."""
        for slot in self.slots:
            listener.map_memory(slot)
        self.listener = listener

    def discard(self, address: int, size: int, /) -> bool:
        """Give the whole pages of one RAM range back to the host (balloon): they read as zeros from now on."""
        at = bisect_right(self._shown[0], address) - 1
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
        self.on_written_many = vm.memory_written_many if has(vm, WrittenMany) else None

    @contextmanager
    def writable(self, address: int, size: int) -> Iterator[memoryview]:
        """A view for writing; leaving the block reports the range as written."""
        view = self.view(address, size)
        try:
            yield view
        finally:
            self.written(address, size)

    def shared(self) -> list[SharedRange]:
        """The RAM that shows now, as another process can map it."""
        return [
            SharedRange(one.address, one.size, one.offset, one.readonly, block.name, block.fd, block.host_address)
            for one in self.ranges
            for block in [one.block]
        ]

    def fault(self) -> HostError | None:
        """Memory that the host took away under the guest (:meth:`cardcage.ram.RamBlock.fault`), or None."""
        return next((error for one in self.ranges if (error := one.block.fault()) is not None), None)

    def close(self) -> None:
        """Release the views and blocks. Idempotent."""
        views, self.slots = self._shown[1], []
        self.show(([], []))
        for _, _, view in views:
            view.release()
        for block in {id(one.block): one.block for one in self.ranges}.values():
            block.close()
        self.ranges = []


@frozen
class GuestMemoryReport:
    """A guest's last report about its memory.

    Attributes:
        at: ``time.monotonic()`` when it came.
        values: bytes or counts by name: ``available_memory free_memory disk_caches total_memory major_faults``, ...;
            a guest may leave out any, and may lie.
        ballooned: bytes that it had given then.
    """

    at: float
    values: dict[str, int] = field(factory=dict)
    ballooned: int = 0


class MemoryBalloon(Protocol):
    """A device by which a guest gives memory back; it makes itself known by
    ``slot.host.provide("balloon", self)``.

    Called under the machine's lock, but for the three that only tell.
    """

    @property
    def live(self) -> bool:
        """True when the guest has a driver for it that is ready."""

    @property
    def size(self) -> int:
        """Bytes that the guest has given."""

    @property
    def report(self) -> GuestMemoryReport | None:
        """The guest's last statistics, ``None`` before the first."""

    def resize(self, size: int, /) -> None:
        """Ask the guest to have given *size* bytes in all; it does so in its own time, or never."""

    def ask_statistics(self) -> None:
        """Ask for a new :attr:`report`."""

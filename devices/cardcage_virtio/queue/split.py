"""Split virtqueues, the device's side (virtio 1.2, section 2.7).

The ring's three parts are mapped once, when the queue is enabled. Indices are loaded and stored whole, as 16-bit
elements of a cast view; x86 keeps stores in order, and the lock's atomic instructions are the fence that is needed
where a store must be seen before a later load.
"""

from __future__ import annotations

from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING

from cardcage_virtio.queue.request import (
    STRAIGHT,
    Request,
    RingError,
    Window,
    areas_within,
    pieces,
    report_written,
    straight,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.memory import GuestMemory

__all__ = ["SplitRing"]

NEXT, WRITE, INDIRECT = 1, 2, 4
INDIRECT_MAX = 1024
descriptor, descriptors = Struct("<QIHH").unpack_from, Struct("<QIHH").iter_unpack
element = Struct("<II").pack_into


class SplitRing:
    """A split ring.

    Args:
        index: queue number. size: entries, a power of two up to 32768.
        table, avail, used: guest-physical addresses of the descriptor table, driver area and device area.
        event_index: VIRTIO_F_EVENT_IDX was agreed.
        interrupt: called with the queue number, on any thread.
        segments: requests of many parts may have them as :class:`~cardcage.segments.Segments`.

    Attributes:
        position: the available index up to which requests were taken. longest: entries of an indirect table.

    Raises RingError for a bad size or alignment, GuestMemoryError when a part is not RAM.
    """

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        table: int,
        avail: int,
        used: int,
        event_index: bool,
        interrupt: Callable[[int], None],
        segments: bool = False,
    ) -> None:
        if not 0 < size <= 32768 or size & (size - 1):
            raise RingError(f"queue size {size} is not a power of two up to 32768")
        if table & 15 or avail & 1 or used & 3:
            raise RingError(f"ring parts {table:#x}, {avail:#x}, {used:#x} are not aligned")
        self.index, self.size, self.batching, self.dead = index, size, False, False
        self._memory, self.event_index, self._interrupt = memory, event_index, interrupt
        self._window = Window(memory)
        self._table = memory.view(table, 16 * size)
        self._avail = memory.view(avail, 6 + 2 * size).cast("H")
        self._used = memory.view(used, 6 + 8 * size)
        self._used16 = self._used.cast("H")
        self._used_area = (used, 6 + 8 * size)
        self._mask, self.longest = size - 1, max(size, INDIRECT_MAX)
        self.position = 0
        self._tail = self._signalled = 0
        self._straight = STRAIGHT if segments else 1 << 32
        self._lock = Lock()

    def pop(self) -> Request | None:
        last, avail = self.position, self._avail
        index = avail[1]
        if index == last:
            return None
        if index - last & 0xFFFF > self.size:
            raise RingError(f"available index jumped from {last} to {index} in a ring of {self.size}")
        head = at = avail[2 + (last & self._mask)]
        table, size = self._table, self.size
        left = size
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        areas: list[tuple[int, int]] = []
        window = self._window
        window.renew()
        low, high, ram = window.low, window.high, window.ram
        entries: list[tuple[int, int, int, int]] = []
        while True:
            if at >= size:
                raise RingError(f"descriptor {at} is outside its table of {size}")
            address, length, flags, at = entries[at] if entries else descriptor(table, at << 4)
            if flags & INDIRECT:
                if entries or flags & NEXT or not length or length & 15 or length >> 4 > self.longest:
                    raise RingError(f"indirect table of {length} bytes, flags {flags:#x}, is invalid")
                size, at = length >> 4, 0
                inside = low <= address and address + length <= high
                view = ram[address - low : address - low + length] if inside else self._memory.view(address, length)
                if size >= self._straight and not readable and not areas:
                    found = straight(view, window, packed=False)
                    if found is not None:
                        self.position = last + 1 & 0xFFFF
                        return Request(self, head, 1, *found)
                entries = list(descriptors(view))
                left += size
                continue
            if length:
                piece: memoryview | None
                if low <= address and address + length <= high:
                    piece = ram[address - low : address - low + length]
                else:
                    piece = window.piece(address, length)
                    low, high, ram = window.low, window.high, window.ram
                    if piece is None:
                        (writable if flags & WRITE else readable).extend(pieces(self._memory, address, length))
                if flags & WRITE:
                    areas.append((address, length))
                    if piece is not None:
                        writable.append(piece)
                elif areas:
                    raise RingError("a readable descriptor follows a writable one")
                elif piece is not None:
                    readable.append(piece)
            if not flags & NEXT:
                break
            left -= 1
            if not left:
                raise RingError(f"descriptor chain at {head} is longer than its table: a loop?")
        self.position = last + 1 & 0xFFFF
        return Request(self, head, 1, readable, writable, areas)

    @property
    def parts(self) -> tuple[memoryview, memoryview, memoryview]:
        """Descriptor table, driver area and device area."""
        return self._table, self._avail, self._used

    def unpop(self, request: Request) -> None:
        self.position = self.position - 1 & 0xFFFF

    def push(self, request: Request, written: int) -> None:
        if written > 0:
            self._memory.written_many(areas_within(request.areas, written))
        with self._lock:
            if self.dead:
                return
            tail = self._tail
            element(self._used, 4 + ((tail & self._mask) << 3), request.id, written)
            self._tail = self._used16[1] = tail + 1 & 0xFFFF

    def push_many(self, done: list[tuple[Request, int]]) -> None:
        report_written(self._memory, done)
        with self._lock:
            if self.dead:
                return
            tail, used, mask = self._tail, self._used, self._mask
            for request, written in done:
                element(used, 4 + ((tail & mask) << 3), request.id, written)
                tail += 1
            self._tail = self._used16[1] = tail & 0xFFFF

    def push_elements(self, elements: memoryview, count: int) -> None:
        """As :meth:`push_many` for *count* requests, as the used ring holds them. What they changed is reported."""
        with self._lock:
            if self.dead:
                return
            tail, at = self._tail, self._tail & self._mask
            first = min(count, self.size - at)
            self._used[4 + 8 * at : 4 + 8 * (at + first)] = elements[: 8 * first]
            self._used[4 : 4 + 8 * (count - first)] = elements[8 * first : 8 * count]
            self._tail = self._used16[1] = tail + count & 0xFFFF

    def signal(self) -> None:
        with self._lock:
            tail, before = self._tail, self._signalled
            if tail == before or self.dead:
                return
            self._signalled = tail
        self._memory.written(*self._used_area)
        if self.event_index:
            if tail - self._avail[2 + self.size] - 1 & 0xFFFF >= tail - before & 0xFFFF:
                return
        elif self._avail[0] & 1:
            return
        self._interrupt(self.index)

    def more(self) -> bool:
        return self._avail[1] != self.position

    @property
    def waiting(self) -> int:
        """Requests that are available, as the driver has it."""
        return self._avail[1] - self.position & 0xFFFF

    def rearm(self) -> bool:
        if self.event_index:
            self._used16[2 + 4 * self.size] = self.position
        elif self._used16[0]:
            self._used16[0] = 0
        with self._lock:
            return self._avail[1] != self.position

    def silence(self) -> None:
        if not self.event_index:  # with EVENT_IDX the old event index, now passed, is silent by itself
            self._used16[0] = 1

    def close(self) -> None:
        with self._lock:
            self.dead = True

    def save(self) -> tuple[int, int, int, int]:
        return self.position, self._tail, 0, 0

    def stands_at(self, state: tuple[int, int, int, int]) -> bool:
        return (self.position, self._tail, self._signalled) == (state[0], state[1], state[1])

    def load(self, state: tuple[int, int, int, int]) -> None:
        self.position, self._tail = state[0], state[1]
        self._signalled = self._tail

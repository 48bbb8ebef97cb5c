"""Packed virtqueues, the device's side (virtio 1.2, section 2.8). How it reaches memory: see :mod:`.split`."""

from __future__ import annotations

from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING

from cardcage_virtio.queue.request import STRAIGHT, Request, RingError, Window, pieces, report_written, straight

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.memory import GuestMemory

__all__ = ["PackedRing"]

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
ENABLE, DISABLE, DESCRIPTOR = 0, 1, 2
INDIRECT_MAX = 1024
descriptor, descriptors = Struct("<QIHH").unpack_from, Struct("<QIHH").iter_unpack
completion = Struct("<IH").pack_into


class PackedRing:
    """A packed ring.

    Args:
        index: queue number. size: descriptors, 1 to 32768.
        table, driver, device: guest-physical addresses of the ring and the two event suppression areas.
        event_index: VIRTIO_F_EVENT_IDX was agreed.
        interrupt: called with the queue number, on any thread.
        segments: requests of many parts may have them as :class:`~cardcage.segments.Segments`.

    Raises RingError for a bad size or alignment, GuestMemoryError when a part is not RAM.
    """

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        table: int,
        driver: int,
        device: int,
        event_index: bool,
        interrupt: Callable[[int], None],
        segments: bool = False,
    ) -> None:
        if not 0 < size <= 32768:
            raise RingError(f"queue size {size} is not in 1 to 32768")
        if table & 15 or driver & 3 or device & 3:
            raise RingError(f"ring parts {table:#x}, {driver:#x}, {device:#x} are not aligned")
        self.index, self.size, self.batching, self.dead = index, size, False, False
        self._memory, self._event_index, self._interrupt = memory, event_index, interrupt
        self._window = Window(memory)
        self._table = memory.view(table, 16 * size)
        self._table16 = self._table.cast("H")
        self._driver = memory.view(driver, 4).cast("H")
        self._device = memory.view(device, 4).cast("H")
        self._areas = ((table, 16 * size), (device, 4))
        self._at, self._wrap = 0, 1
        self._used, self._used_wrap, self._unsignalled = 0, 1, 0
        self._straight = STRAIGHT << 4 if segments else 1 << 32
        self._lock = Lock()

    def _available(self, at: int, wrap: int) -> bool:
        flags = self._table16[(at << 3) + 7]
        return flags >> 7 & 1 == wrap and flags >> 15 != wrap

    def pop(self) -> Request | None:
        at, wrap, table, size = self._at, self._wrap, self._table, self.size
        flags = self._table16[(at << 3) + 7]
        if flags >> 7 & 1 != wrap or flags >> 15 == wrap:
            return None
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        areas: list[tuple[int, int]] = []
        count = 0
        self._window.renew()
        while True:
            address, length, id, flags = descriptor(table, at << 4)
            count += 1
            at += 1
            if at == size:
                at, wrap = 0, wrap ^ 1
            if flags & INDIRECT:
                if flags & NEXT or count > 1 or not length or length & 15 or length >> 4 > max(size, INDIRECT_MAX):
                    raise RingError(f"indirect table of {length} bytes, flags {flags:#x}, is invalid")
                view = self._window.piece(address, length)
                view = view if view is not None else self._memory.view(address, length)
                if length >= self._straight and (found := straight(view, self._window, packed=True)) is not None:
                    self._at, self._wrap = at, wrap
                    return Request(self, id, count, *found)
                for start, size, _, more in list(descriptors(view)):
                    if more & INDIRECT:
                        raise RingError("an indirect table inside an indirect table")
                    self._take(start, size, more, readable, writable, areas)
                break
            self._take(address, length, flags, readable, writable, areas)
            if not flags & NEXT:
                break
            if count == size:
                raise RingError(f"descriptor chain is longer than the ring of {size}: a loop?")
        self._at, self._wrap = at, wrap
        return Request(self, id, count, readable, writable, areas)

    def _take(
        self,
        address: int,
        length: int,
        flags: int,
        readable: list[memoryview],
        writable: list[memoryview],
        areas: list[tuple[int, int]],
    ) -> None:
        if not length:
            return
        if flags & WRITE:
            into = writable
            areas.append((address, length))
        elif areas:
            raise RingError("a readable descriptor follows a writable one")
        else:
            into = readable
        piece = self._window.piece(address, length)
        if piece is not None:
            into.append(piece)
        else:
            into.extend(pieces(self._memory, address, length))

    def unpop(self, request: Request) -> None:
        self._at -= request.slots
        if self._at < 0:
            self._at, self._wrap = self._at + self.size, self._wrap ^ 1

    def push(self, request: Request, written: int) -> None:
        self.push_many([(request, written)])

    def push_many(self, done: list[tuple[Request, int]]) -> None:
        report_written(self._memory, done)
        with self._lock:
            if self.dead:
                return
            first = None
            for request, written in done:
                used = self._used
                completion(self._table, (used << 4) + 8, written, request.id)
                flags = (AVAIL | USED if self._used_wrap else 0) | (WRITE if written else 0)
                if first is None:
                    first = (used << 3) + 7, flags
                else:
                    self._table16[(used << 3) + 7] = flags
                used += request.slots
                if used >= self.size:
                    used -= self.size
                    self._used_wrap ^= 1
                self._used = used
                self._unsignalled += request.slots
            if first is not None:  # the first last: a driver that sees it finds all the others
                self._table16[first[0]] = first[1]

    def signal(self) -> None:
        with self._lock:
            fresh, used, wrap = self._unsignalled, self._used, self._used_wrap
            if not fresh or self.dead:
                return
            self._unsignalled = 0
        self._memory.written_many(self._areas)
        wish = self._driver[1]
        if wish == DISABLE:
            return
        if wish == DESCRIPTOR and self._event_index:
            event = self._driver[0]
            offset = event & 0x7FFF
            if event >> 15 != wrap:
                offset -= self.size
            if not 0 <= used - offset - 1 < fresh:
                return
        self._interrupt(self.index)

    def more(self) -> bool:
        return self._available(self._at, self._wrap)

    def rearm(self) -> bool:
        if self._event_index:
            self._device[0] = self._at | self._wrap << 15
            self._device[1] = DESCRIPTOR
        elif self._device[1] != ENABLE:
            self._device[1] = ENABLE
        with self._lock:
            return self._available(self._at, self._wrap)

    def silence(self) -> None:
        self._device[1] = DISABLE

    def close(self) -> None:
        with self._lock:
            self.dead = True

    def save(self) -> tuple[int, int, int, int]:
        return self._at, self._wrap, self._used, self._used_wrap

    def stands_at(self, state: tuple[int, int, int, int]) -> bool:
        return (self._at, self._wrap, self._used, self._used_wrap) == tuple(state) and not self._unsignalled

    def load(self, state: tuple[int, int, int, int]) -> None:
        self._at, self._wrap, self._used, self._used_wrap = state

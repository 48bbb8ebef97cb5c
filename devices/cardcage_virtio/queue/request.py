"""A request: one buffer chain that the driver made available, checked, as views of guest memory."""

from __future__ import annotations

from operator import add
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.abilities import has
from cardcage.errors import GuestError
from cardcage.memory import PAGE, GuestMemoryError, Spans
from cardcage.segments import Areas, Segments, total

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.memory import GuestMemory

__all__ = [
    "STRAIGHT",
    "Request",
    "Ring",
    "RingError",
    "Window",
    "areas_within",
    "pieces",
    "report_written",
    "straight",
]


STRAIGHT = 12
"""Descriptors from which on it is cheaper to look at all of a table together."""


class RingError(GuestError):
    """The driver broke its ring or a request's form: the device goes to NEEDS_RESET."""


class Request:
    """A buffer chain.

    Attributes:
        ring: the ring it came from; ``ring.index`` is the queue's number.
        id: buffer id. slots: ring entries it takes (packed rings).
        readable: views that the device reads, in order. writable: views that it writes. For a device that says
            ``segments = True``, each may be a :class:`~cardcage.segments.Segments` where there are many.
        areas: ``(guest-physical address, length)`` of the writable part.
    """

    __slots__ = ("areas", "id", "readable", "ring", "slots", "writable")

    def __init__(
        self,
        ring: Ring,
        id: int,
        slots: int,
        readable: Sequence[memoryview],
        writable: Sequence[memoryview],
        areas: Sequence[tuple[int, int]],
    ) -> None:
        self.ring, self.id, self.slots = ring, id, slots
        self.readable: list[memoryview] = readable  # type: ignore[assignment]  # no list only for those who asked for it
        self.writable: list[memoryview] = writable  # type: ignore[assignment]  # as above
        self.areas = areas

    @property
    def readable_size(self) -> int:
        return total(self.readable)

    @property
    def writable_size(self) -> int:
        return total(self.writable)

    def read(self) -> bytes:
        """All readable bytes."""
        return bytes(self.readable[0]) if len(self.readable) == 1 else b"".join(self.readable)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Write *data* at *offset* of the writable part; returns the bytes that found room."""
        at, source = 0, memoryview(data)
        for view in self.writable:
            if offset >= len(view):
                offset -= len(view)
                continue
            take = min(len(view) - offset, len(source) - at)
            view[offset : offset + take] = source[at : at + take]
            at, offset = at + take, 0
            if at == len(source):
                break
        return at

    def done(self, written: int = 0) -> None:
        """Give the buffer back, with the first *written* bytes of its writable part changed. Once; thread-safe."""
        ring = self.ring
        ring.push(self, written)
        if not ring.batching:
            ring.signal()


class Ring(Protocol):
    """A virtqueue's ring while it is enabled; :class:`~cardcage_virtio.queue.split.SplitRing` or the packed ring."""

    index: int
    size: int
    batching: bool
    """While True, completions do not signal: whoever set it will."""
    dead: bool

    def pop(self) -> Request | None:
        """The next request, ``None`` when there is none. Raises RingError or GuestMemoryError."""

    def unpop(self, request: Request) -> None:
        """Put back the request popped last, as if it had not been; several go back in reverse order."""

    def push(self, request: Request, written: int) -> None:
        """Mark a request used; the driver is told by :meth:`signal`. Thread-safe."""

    def push_many(self, done: list[tuple[Request, int]]) -> None:
        """As :meth:`push` for each, made visible to the driver together. Thread-safe."""

    def signal(self) -> None:
        """Interrupt the driver if it wants to hear of what was used since the last time. Thread-safe."""

    def more(self) -> bool:
        """True if there is a request to pop."""

    def rearm(self) -> bool:
        """Ask the driver to notify of the next buffer; True when there is a buffer already."""

    def silence(self) -> None:
        """Tell the driver that it need not notify until :meth:`rearm`."""

    def close(self) -> None:
        """Reset: later completions go nowhere, and the ring's memory is not touched again. Thread-safe."""

    def save(self) -> tuple[int, int, int, int]: ...

    def load(self, state: tuple[int, int, int, int]) -> None: ...

    def stands_at(self, state: tuple[int, int, int, int]) -> bool:
        """True where :meth:`load` would change nothing."""


class Window:
    """Cuts views of buffers out of one long view of the RAM they lie in, which is kept from buffer to buffer.

    Memory that checks each access by itself (security) has no such view; there each buffer is asked for.
    ``low``, ``high`` and ``ram`` are that view's addresses and bytes, for callers that cut by themselves; they hold
    until :meth:`renew` is called, which those do before each request.
    """

    __slots__ = ("_generation", "_memory", "_spans", "high", "low", "ram")

    def __init__(self, memory: GuestMemory) -> None:
        self._memory: Any = memory  # asked for its "span" each time: a call that was kept could not be revoked
        self._spans = has(memory, Spans)
        self.low = self.high = 0
        self.ram = memoryview(b"")
        self._generation = -1

    def renew(self) -> None:
        """Forget the view if RAM is laid out anew."""
        generation = getattr(self._memory, "generation", 0)
        if generation != self._generation:
            self.low = self.high = 0
            self.ram, self._generation = memoryview(b""), generation

    def piece(self, address: int, length: int) -> memoryview | None:
        """A buffer's view, ``None`` when it lies in more than one RAM range. Raises GuestMemoryError outside RAM."""
        if address < self.low or address + length > self.high:
            if not self._spans:
                return self._memory.view(address, length) if self._memory.contains(address, length) else None
            self.low, self.ram = self._memory.span(address)
            self.high = self.low + len(self.ram)
            if address + length > self.high:
                return None
        at = address - self.low
        return self.ram[at : at + length]


def straight(table: memoryview, window: Window, *, packed: bool) -> tuple[Segments, Segments, Areas] | None:
    """Readable and writable parts of an indirect table, and the latter's areas, all looked at together.

    That works for what drivers make: descriptors that follow one another, none empty, all in the stretch of RAM that
    *window* shows. ``None`` for any other: the caller looks at them one by one.
    """
    words = memoryview(bytes(table))  # each value is read once: the guest may change it at any time
    addresses, lengths, halves = words.cast("Q")[::2].tolist(), words.cast("I")[2::4].tolist(), words.cast("H")
    count = len(addresses)
    if packed:
        flags = halves[7::8].tolist()
        readable = flags.count(0)
        fine = flags == [0] * readable + [2] * (count - readable)
    else:
        flags = halves[6::8].tolist()
        readable = flags.index(3) if 3 in flags else count - (flags[-1] == 2)
        expected = [1] * readable + [3] * (count - readable)
        expected[-1] &= ~1  # the last has no next
        fine = flags == expected and halves[7:-8:8].tolist() == list(range(1, count))
    low = window.low
    if not fine or 0 in lengths or min(addresses) < low or max(map(add, addresses, lengths)) > window.high:
        return None
    starts = [at - low for at in addresses] if low else addresses
    return (
        Segments(window.ram, starts[:readable], lengths[:readable]),
        Segments(window.ram, starts[readable:], lengths[readable:]),
        Areas(addresses[readable:], lengths[readable:]),
    )


def report_written(memory: GuestMemory, done: Sequence[tuple[Request, int]]) -> None:
    """Tell *memory* what requests have changed: (request, bytes written)."""
    changed: list[tuple[int, int]] = []
    for request, written in done:
        if written > 0:
            areas = areas_within(request.areas, written)
            if type(areas) is Areas:
                memory.written_many(areas)
            else:
                changed += areas
    if changed:
        memory.written_many(changed)


def areas_within(areas: Sequence[tuple[int, int]], size: int) -> Sequence[tuple[int, int]]:
    """The first *size* bytes of (address, length) areas."""
    if type(areas) is Areas and size >= areas.size:
        return areas
    for at, (address, length) in enumerate(areas):
        if size <= length:
            if size == length and at + 1 == len(areas):
                return areas
            return [*areas[:at], (address, size)] if size > 0 else areas[:at]
        size -= length
    return areas


def pieces(memory: GuestMemory, address: int, length: int) -> list[memoryview]:
    """Views of a buffer that lies in more than one RAM range; raises GuestMemoryError when any of it is not RAM."""
    found: list[memoryview] = []
    while length:
        take = length
        while not memory.contains(address, take):
            within = PAGE - address % PAGE
            if take <= within:
                raise GuestMemoryError(f"guest memory {address:#x}+{length:#x}: not RAM")
            take = max(within, within + (take - within) // 2 // PAGE * PAGE)
        found.append(memory.view(address, take))
        address, length = address + take, length - take
    return found

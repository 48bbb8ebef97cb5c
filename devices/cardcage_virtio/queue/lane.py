"""A disk's queue as native code sees it: requests that it can serve by itself go past the walk in Python.

Which those are is told in ``native/serve.c``; whatever else the ring holds is left there for :meth:`SplitRing.pop`. Its
answers are the same, so that a driver cannot tell which of the two it had.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cardcage.abilities import has
from cardcage.memory import GuestMemoryError, Spans
from cardcage.segments import Areas

from cardcage_virtio.native.build import LIBRARY, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from cardcage_virtio.queue.split import SplitRing

    Places = Callable[[Sequence[tuple[int, int, bool]]], AbstractContextManager[Sequence[int | None]]]

__all__ = ["EMPTY", "MAY_READ", "MAY_WRITE", "MORE", "MOST", "OTHER", "Lane", "why_not"]

EMPTY, MORE, OTHER, UNKNOWN = range(4)
"""Why it came back: nothing is left, and the driver was asked to notify; enough were served; a request is not for it;
(to itself) it does not know a stretch of RAM."""
RAMS, MOST, PARTS, AREAS, MAY_READ, MAY_WRITE = 8, 64, 1024, 4096, 1, 2
WANT, NOWHERE = 7, (1 << 64) - 1
"""Words of a request that was gathered: offset, size, place, where its status byte is; then half words, the first of
them whether it is a write. The place where none is."""
U32, S32, U64 = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64


class _Stretch(ctypes.Structure):
    _fields_ = (("low", U64), ("high", U64), ("host", U64))


class _Lane(ctypes.Structure):
    """``struct lane``."""

    _fields_ = (
        *((name, U64) for name in ("table", "avail", "used")),
        *((name, U32) for name in ("size", "longest", "event_index", "last")),
        ("ram", _Stretch * RAMS),
        *((name, U32) for name in ("rams", "most")),
        *((name, S32) for name in ("fd", "may", "read_flags", "write_flags")),
        *((name, U64) for name in ("bytes", "mask", "write_low", "write_high", "budget", "unknown")),
        *((name, U32) for name in ("served", "areas", "reads", "writes")),
        *((name, U64) for name in ("read_bytes", "write_bytes")),
        ("done", U64 * MOST),
        ("area", U64 * (2 * AREAS)),
        ("part", U64 * (2 * PARTS)),
        *((name, U32) for name in ("wanted", "parts", "at", "kept")),
        ("want", U64 * (WANT * MOST)),
    )


class Functions(NamedTuple):
    """Of the library, on a lane's address."""

    serve: Callable[[int], int]
    gather: Callable[[int], int]
    move: Callable[[int, int], int]


def _functions(path: str) -> Functions:
    """Raises OSError for what is not such a library."""
    library = ctypes.CDLL(path)
    library.cardcage_lane_size.restype = U64
    assert library.cardcage_lane_size() == ctypes.sizeof(_Lane)
    found: list[Any] = [getattr(library, f"cardcage_{name}") for name in Functions._fields]
    for function in found:
        function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_int
    found[2].argtypes = ctypes.c_void_p, ctypes.c_int
    return Functions(*found)


@cache
def _load() -> tuple[Functions | None, str]:
    """The library's functions, or why there are none."""
    path = Path(__file__).parent.with_name(LIBRARY)
    again = "to build it: python -m cardcage_virtio.native.build"
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(-len(f"\nsources {'0' * 64}\n"), 2)
            if file.read() != f"\nsources {digest()}\n".encode():
                return None, f"{path} was built from other sources; {again}"
        return _functions(str(path)), ""
    except OSError as error:  # not built, or for another processor
        return None, f"{path}: {error.strerror or error}; {again}"


def why_not() -> str:
    """Why requests are served by Python alone; empty when they are not."""
    return _load()[1]


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Lane:
    """One split ring, and what native code needs to know. Called by one thread at a time.

    Attributes:
        lane: the request for the next call, and what the last one did: ``fd``, ``may``, flags, the disk's size, where
            it may be written, ``budget``; ``reads``, ``writes``, ``read_bytes``, ``write_bytes``.
    """

    def __init__(self, ring: SplitRing, memory: Any, functions: Functions) -> None:
        self.ring, self._memory = ring, memory  # which is asked for its "span" each time, as Window does
        self._serve, self._gather, self._move = functions
        self._map = mmap.mmap(-1, ctypes.sizeof(_Lane), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.lane: Any = _Lane.from_buffer(self._map)  # Any: its fields are no attributes for a type checker
        self._pointer = ctypes.addressof(self.lane)
        whole = memoryview(self._map)
        at = _Lane.area.offset
        self._areas = whole[at : at + 16 * AREAS].cast("Q")
        at = _Lane.done.offset
        self._done = whole[at : at + 8 * MOST]
        at = _Lane.want.offset
        self._want = whole[at : at + 8 * WANT * MOST].cast("Q")
        self._views: list[memoryview] = []
        self._generation = -1
        lane, (table, avail, used) = self.lane, ring.parts
        lane.table, lane.avail, lane.used = _address(table), _address(avail), _address(used)
        lane.size, lane.longest, lane.event_index = ring.size, ring.longest, ring.event_index

    @classmethod
    def of(cls, ring: Any, memory: Any) -> Lane | None:
        """That of *ring*; None where there is no library, or the ring or the memory is not of a kind that it knows."""
        functions = _load()[0]
        if functions is None or not hasattr(ring, "parts") or not has(memory, Spans):
            return None
        return cls(ring, memory, functions)

    def serve(self, most: int, count: Callable[[Any], None], places: Places | None = None) -> int:
        """Serve up to *most* requests; return EMPTY, MORE or OTHER. The driver sees them, and is to be signalled.

        Args:
            count: told of what was done (:attr:`lane`), once or more.
            places: of a disk that does not lie in its file as it is, tells where requests do.
        """
        generation = self._memory.generation
        lane = self.lane
        if generation != self._generation:
            lane.rams, self._views, self._generation = 0, [], generation
        for _ in range(2 * RAMS):
            lane.most, lane.last = most, self.ring.position
            why = self._serve(self._pointer) if places is None else self._serve_placed(places)
            if served := lane.served:
                most -= served
                self.ring.position = lane.last
                areas = self._areas[: 2 * lane.areas]
                self._memory.written_many(Areas(areas[::2].tolist(), areas[1::2].tolist()))
                self.ring.push_elements(self._done, served)
                count(lane)
            if why != UNKNOWN:
                return why
            if not self._learn(lane.unknown):
                break
        return OTHER

    def _serve_placed(self, places: Places) -> int:
        why = self._gather(self._pointer)
        count = self.lane.wanted
        if not count:
            return why
        words = self._want[: WANT * count]
        rows = zip(words[::WANT].tolist(), words[1::WANT].tolist(), words[4::WANT].tolist(), strict=True)
        with places([(offset, size, bool(half & 1)) for offset, size, half in rows]) as found:
            words[2::WANT] = memoryview(array("Q", [NOWHERE if place is None else place for place in found]))
            return self._move(self._pointer, why)

    def _learn(self, address: int) -> bool:
        """Look for the stretch of RAM around *address*."""
        try:
            low, ram = self._memory.span(address)
        except GuestMemoryError:
            return False
        view, lane = ram[:], self.lane
        at = lane.rams if lane.rams < RAMS else 0
        stretch = lane.ram[at]
        stretch.low, stretch.high, stretch.host = low, low + len(view), _address(view)
        self._views[at:] = [view]
        lane.rams = at + 1
        return True

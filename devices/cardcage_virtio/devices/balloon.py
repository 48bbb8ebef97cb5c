"""Memory balloon (virtio 1.2, section 5.5): inflate and deflate, statistics, free page reporting."""

from __future__ import annotations

import struct
import time
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from attrs import define, field, frozen
from attrs.validators import ge
from cardcage.memory import GuestMemoryReport

from cardcage_virtio.parking import HasNoThread, HoldsNothing
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.virtio import DRIVER_OK

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.clock import Timer
    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.virtio import Virtio

__all__ = ["Balloon", "BalloonOptions", "BalloonState"]

PAGE = 4096
LIST_MAX = 4096
"""Pages in one list: Linux sends 256, others 1024. Each may be a system call under the machine's lock."""
F_TELL, F_STATS, F_OOM, F_POISON, F_REPORTING = 0, 1, 2, 4, 5
INFLATE, DEFLATE, STATS = 0, 1, 2
STATISTICS = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
)


@frozen
class BalloonOptions:
    """Options of ``virtio-balloon``.

    Attributes:
        deflate_on_oom: the guest may take pages back instead of killing a process.
        free_page_reporting: the guest tells of pages that it does not use, which go back to the host at once.
        stats_interval: seconds between two requests for statistics, 0 for only when asked.
    """

    deflate_on_oom: bool = True
    free_page_reporting: bool = True
    stats_interval: float = field(default=0.0, validator=ge(0))


@define
class BalloonState:
    """Saved state."""

    version: ClassVar[int] = 1
    target: int = 0
    actual: int = 0
    poison: int = 0


class Balloon(HasNoThread, HoldsNothing):
    """A balloon, which the machine's memory policies use too (:class:`~cardcage_memory_policies.policy.MemoryBalloon`).

    Attributes:
        target: pages of 4 KiB that the guest is asked to give (:meth:`set_target`). actual: what it says it has given.
        statistics: what the guest last said, bytes or counts by name; empty before. report: the same, with its time.
        reported: bytes that free page reporting gave back so far.
        on_statistics: called with them each time they arrive.
    """

    device_id = 5
    # 3 or 4 reports free pages: drivers before Linux 6.11 number the queues that exist, others as the specification
    queue_sizes = (128, 128, 128, 128, 128)

    def __init__(self, options: BalloonOptions | None = None) -> None:
        self.options = options or BalloonOptions()
        self.features = 1 << F_STATS | 1 << F_TELL
        self.features |= 1 << F_OOM if self.options.deflate_on_oom else 0
        self.features |= 1 << F_REPORTING | 1 << F_POISON if self.options.free_page_reporting else 0
        self.target = self.actual = self.reported = self._poison = 0
        self.statistics: dict[str, int] = {}
        self.report: GuestMemoryReport | None = None
        self.on_statistics: Callable[[dict[str, int]], None] | None = None
        self._pending: Request | None = None
        self._asked = False
        self._io: Virtio
        self._timer: Timer | None = None

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        slot.host.provide("balloon", self)
        if self.options.stats_interval:
            self._timer = slot.clock.timer(self._tick)

    def plug_virtio(self, io: Virtio) -> None:
        self._io = io

    def unplug(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def config(self) -> bytes:
        return struct.pack("<IIII", self.target, self.actual, 0, self._poison)

    def config_written(self, offset: int, data: bytes) -> None:
        config = bytearray(self.config())
        config[offset : offset + len(data)] = data
        if 4 <= offset < 8:
            (self.actual,) = struct.unpack_from("<I", config, 4)
        elif 12 <= offset < 16:
            (self._poison,) = struct.unpack_from("<I", config, 12)

    @property
    def live(self) -> bool:
        """True if the guest has a driver that is ready."""
        return bool(self._io.status & DRIVER_OK)

    @property
    def size(self) -> int:
        """Bytes that the guest says it has given."""
        return self.actual * PAGE

    def resize(self, size: int) -> None:
        """Ask the guest to give *size* bytes in all, in whole pages (under the machine's lock)."""
        if size // PAGE != self.target:
            self.set_target(size // PAGE)

    def set_target(self, pages: int) -> None:
        """Ask the guest to give *pages* pages of 4 KiB in all (under the machine's lock)."""
        self.target = pages
        self._io.config_changed()

    def ask_statistics(self) -> None:
        """Ask the guest for its statistics; they are in :attr:`statistics` soon after."""
        self._asked = True
        self._return_statistics()

    def _return_statistics(self) -> None:
        if self._pending is not None and self._asked:
            pending, self._pending, self._asked = self._pending, None, False
            pending.done()

    def _tick(self) -> None:
        self.ask_statistics()
        if self._timer is not None:
            self._timer.arm(self._slot.clock.now() + int(self.options.stats_interval * 1e9))

    def start(self) -> None:
        if self._timer is not None:
            self._timer.arm(self._slot.clock.now() + int(self.options.stats_interval * 1e9))

    def drain(self) -> None:
        """The statistics buffer that waits here goes back, so that no ring holds anything of it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.done()

    def stop(self) -> None:
        self.actual, self._pending, self.statistics, self.report = 0, None, {}, None
        self._poison = 0

    def handle(self, request: Request) -> None:
        index = request.ring.index
        if index == INFLATE:
            self._inflate(request)
        elif index == STATS and self._io.has(F_STATS):
            self._take_statistics(request)
        elif index > DEFLATE and self._io.has(F_REPORTING):
            self._report(request)
        else:
            request.done()

    def _inflate(self, request: Request) -> None:
        size = request.readable_size
        if size % 4 or size > 4 * LIST_MAX:
            raise RingError(f"a list of pages of {size} bytes")
        pages = sorted({page for (page,) in struct.iter_unpack("<I", request.read())})
        start = None
        for page, following in pairwise([*pages, -1]):
            start = page if start is None else start
            if following != page + 1:
                self._discard(start * PAGE, (page + 1 - start) * PAGE)
                start = None
        request.done()

    def _report(self, request: Request) -> None:
        if not self._poison:  # with poisoned free pages their bytes must stay as they are
            for address, size in request.areas:
                inside = (address + PAGE - 1) & -PAGE
                size = (address + size & -PAGE) - inside
                if size > 0:
                    self.reported += size * self._discard(inside, size)
        request.done()

    def _discard(self, address: int, size: int) -> bool:
        memory = self._slot.memory
        if not memory.contains(address, size):
            self._io.warn("balloon: not RAM", address=hex(address), size=size)
            return False
        return memory.discard(address, size)

    def _take_statistics(self, request: Request) -> None:
        size = request.readable_size
        if size % 10 or size > 10 * 64:
            raise RingError(f"statistics of {size} bytes")
        rows = struct.iter_unpack("<HQ", request.read())
        self.statistics = {STATISTICS[tag]: value for tag, value in rows if tag < len(STATISTICS)}
        self.report = GuestMemoryReport(time.monotonic(), self.statistics, self.actual * PAGE)
        if self._pending is not None:
            self._pending.done()
        self._pending = request
        if self.statistics and self.on_statistics is not None:
            self.on_statistics(self.statistics)
        self._return_statistics()

    # state

    def save(self) -> BalloonState:
        return BalloonState(self.target, self.actual, self._poison)

    def load(self, state: BalloonState) -> None:
        self.target, self.actual, self._poison = state.target, state.actual, state.poison

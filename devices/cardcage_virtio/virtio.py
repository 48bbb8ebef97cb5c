"""The common part of virtio devices (virtio 1.2, chapters 2 and 3): status, features, queues, configuration space.

A device's author writes the methods of :mod:`cardcage_virtio.device`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import field
from cardcage.abilities import calls, has, require, tell_near_misses
from cardcage.errors import CardError, ConfigError
from cardcage.memory import GuestMemoryError
from cardcage.security import HasNeeds, Needs
from cardcage.values import define

from cardcage_virtio.device import OPTIONAL, VirtioDevice
from cardcage_virtio.parking import AsksTheDevice
from cardcage_virtio.queue.packed import PackedRing
from cardcage_virtio.queue.request import RingError
from cardcage_virtio.queue.split import SplitRing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.device import Slot

    from cardcage_virtio.queue.request import Ring

__all__ = ["Queue", "Transport", "Virtio", "VirtioState", "needs_of", "unchanged"]

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_PACKED, F_RING_RESET = 1 << 28, 1 << 29, 1 << 32, 1 << 34, 1 << 40
COMMON = F_INDIRECT | F_EVENT_IDX | F_VERSION_1 | F_RING_RESET
BURST = 4096
"""Requests served in one notification before others get their turn."""


class Transport(Protocol):
    """How the driver is told. Called on any thread."""

    def queue_interrupt(self, index: int, /) -> None: ...

    def config_interrupt(self) -> None: ...

    def connect(self, index: int, kick: int, call: int, /) -> None:
        """A back end outside this process takes the queue: eventfds for notifications and interrupts."""

    def disconnect(self, index: int, /) -> None: ...


@define
class Queue:
    """A queue as the driver sets it up. ``table``, ``driver`` and ``device`` are the guest-physical ring addresses."""

    maximum: int
    size: int = 0
    table: int = 0
    driver: int = 0
    device: int = 0
    enabled: bool = False
    vector: int = 0xFFFF

    def clear(self) -> None:
        """As after reset."""
        self.size, self.table, self.driver, self.device = self.maximum, 0, 0, 0
        self.enabled, self.vector = False, 0xFFFF


@define
class VirtioState:
    """Saved state of any virtio device; ``device`` is the device's own state."""

    version: ClassVar[int] = 1
    status: int = 0
    features: int = 0
    generation: int = 0
    queues: list[Queue] = field(factory=list)
    rings: list[tuple[int, int, int, int] | None] = field(factory=list)
    device: Any = None


def needs_of(device: Any) -> Needs:
    """The needs of an author's object, none where it states none."""
    return device.needs() if has(device, HasNeeds) else Needs()


def _checked_sizes(device: Any) -> Iterator[int]:
    """Its queue sizes. Raises CardError for one that drivers cannot use: they set up split rings, at the most as long
    as that says, whose sizes are powers of two (virtio 1.2, 2.7 and 4.1.4.3.1)."""
    for at, size in enumerate(device.queue_sizes):
        if type(size) is not int or not 0 < size <= 32768 or size & (size - 1):
            what = f"queue_sizes[{at}] is {size!r}, expected a power of two from 1 to 32768"
            raise CardError(f"{type(device).__name__}: {what}")
        yield size


class Virtio(AsksTheDevice):
    """One virtio device between its transport and its author's object.

    Attributes:
        features: agreed bits, 0 before FEATURES_OK. status: the status field. generation: of the configuration space.
        queues: as set up. rings: those that are live, ``None`` for the others.
        slot: the machine's slot; log: its logger.
    """

    def __init__(self, device: Any, transport: Transport) -> None:
        self.device, self.transport = device, transport
        self._calls = calls(require(device, VirtioDevice), OPTIONAL)
        self.offered: int = getattr(device, "ring_features", COMMON) | getattr(device, "features", 0)
        self.features = self.driver_features = self.status = self.generation = 0
        self.queues = [Queue(size, size) for size in _checked_sizes(device)]
        self.rings: list[Ring | None] = [None] * len(self.queues)
        self.slot: Slot
        self.paused = False
        self._warned = (0, 0)
        self._handle, self._notified = self._calls.get("handle"), self._calls.get("notified")
        if self._handle is None and self._notified is None:
            raise CardError(f"{type(device).__name__}: a virtio device has a method handle(request) or notified(index)")
        self._config, self._config_written = self._calls.get("config"), self._calls.get("config_written")

    def _tell(self, method: str, *arguments: Any) -> Any:
        found = self._calls.get(method)
        return None if found is None else found(*arguments)

    def plug(self, slot: Slot) -> None:
        """Give the device its slot and this object."""
        self.slot, self.log = slot, slot.log
        tell_near_misses(self.device, (VirtioDevice, *OPTIONAL), f'virtio device "{slot.id}"', slot.log)
        self._tell("plug", slot)
        self._tell("plug_virtio", self)
        common = getattr(self.device, "ring_features", COMMON)
        self.offered = common | getattr(self.device, "features", 0)  # a back end may have decided some

    def unplug(self) -> None:
        """Let the device give back what it holds, after :meth:`reset`."""
        self._tell("unplug")

    def has(self, bit: int) -> bool:
        """True if feature *bit* was negotiated."""
        return bool(self.features >> bit & 1)

    @property
    def live(self) -> bool:
        """The driver is ready, nothing is broken, and the machine is not paused."""
        return self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK and not self.paused

    # status

    def set_status(self, value: int) -> None:
        """The driver wrote the status field; 0 resets.

        Only a reset clears a bit (virtio 1.2, section 2.1.1): a device that runs without DRIVER_OK would be started
        twice, and neither paused nor reset with its requests ended.
        """
        if value == 0:
            self.reset()
            return
        value = value & 0xFF & ~NEEDS_RESET | self.status
        if value & FEATURES_OK and not self.status & FEATURES_OK:
            agreed = self.driver_features
            if agreed & ~self.offered or not agreed & F_VERSION_1 or self._tell("accept", agreed) is False:
                value &= ~FEATURES_OK
                self.warn("driver asked for features not on offer", features=hex(agreed))
            else:
                self.features = agreed
        started = value & DRIVER_OK and not self.status & DRIVER_OK
        self.status = value
        if started:
            if not value & FEATURES_OK:
                self.break_down("DRIVER_OK without FEATURES_OK")
                return
            for index, queue in enumerate(self.queues):
                if queue.enabled and self.rings[index] is None:
                    self._open(index)
            if not self.status & NEEDS_RESET:
                self._tell("start")
                for index, queue in enumerate(self.queues):
                    if queue.enabled:
                        self.kick(index)

    def reset(self) -> None:
        """Back to the state after power-up; returns when no buffer is in use any more."""
        if self.status & DRIVER_OK:
            self._tell("drain")
        for index in range(len(self.rings)):
            self._close(index)
        self._tell("stop")
        self.status = self.features = self.driver_features = self.generation = 0
        for queue in self.queues:
            queue.clear()

    def break_down(self, why: str) -> None:
        """The driver broke a rule: NEEDS_RESET, one log line, and nothing is served until it resets the device."""
        if self.status & NEEDS_RESET:
            return
        self.status |= NEEDS_RESET
        self.warn("virtio device needs reset", why=why)
        if self.status & DRIVER_OK:
            self.transport.config_interrupt()

    def warn(self, event: str, **values: Any) -> None:
        """Log what a guest can repeat at will: at most ten lines in a second of guest time."""
        now = self.slot.clock.now()
        if now - self._warned[0] > 1_000_000_000:
            self._warned = (now, 0)
        self._warned = (self._warned[0], self._warned[1] + 1)
        if self._warned[1] <= 10:
            self.log.warning(event, **values)

    def config_changed(self) -> None:
        """The device's configuration space is another now: tell the driver."""
        self.generation = self.generation + 1 & 0xFF
        if self.status & DRIVER_OK:
            self.transport.config_interrupt()

    # queues

    def enable(self, index: int) -> None:
        """The driver enabled queue *index*."""
        queue = self.queues[index]
        if not queue.enabled:
            queue.enabled = True
            if self.status & DRIVER_OK:  # only after a queue reset; else the rings open together at DRIVER_OK
                self._open(index)

    def _open(self, index: int) -> None:
        queue = self.queues[index]
        kind = PackedRing if self.features & F_PACKED else SplitRing
        try:
            if queue.size > queue.maximum:
                raise RingError(f"queue {index}: size {queue.size} is more than {queue.maximum}")
            self.rings[index] = kind(
                self.slot.memory,
                index,
                queue.size,
                queue.table,
                queue.driver,
                queue.device,
                bool(self.features & F_EVENT_IDX),
                self.transport.queue_interrupt,
                getattr(self.device, "segments", False),
            )
        except (RingError, GuestMemoryError) as error:
            self.break_down(str(error))

    def _close(self, index: int) -> None:
        ring, self.rings[index] = self.rings[index], None
        if ring is not None:
            ring.close()

    def reset_queue(self, index: int) -> None:
        """VIRTIO_F_RING_RESET: stop one queue and forget its ring."""
        self._tell("drain")
        self._close(index)
        vector = self.queues[index].vector
        self.queues[index].clear()
        self.queues[index].vector = vector
        self._notify_all()

    def _notify_all(self) -> None:
        for index in range(len(self.queues)):  # what a drained device left in its rings
            self.kick(index)

    def kick(self, index: int) -> None:
        """The driver made buffers available in queue *index*."""
        if not self.live or index >= len(self.rings):
            return
        ring = self.rings[index]
        if ring is None:
            return
        try:
            if self._notified is not None:
                self._notified(index)
            elif self._handle is not None:
                self._serve(ring, self._handle)
        except (RingError, GuestMemoryError) as error:
            self.break_down(f"queue {index}: {error}")

    def guarded(self, act: Callable[[], None]) -> None:
        """Do what takes requests outside a notification: what the driver broke puts the device in NEEDS_RESET.

        Nothing is done while the machine is paused; each queue is notified afterwards.
        """
        if self.paused:
            return
        try:
            act()
        except (RingError, GuestMemoryError) as error:
            self.break_down(str(error))

    def _serve(self, ring: Ring, handle: Any) -> None:
        pop, left = ring.pop, BURST
        ring.batching = True
        try:
            while left:
                request = pop()
                if request is None:
                    if not ring.rearm():
                        break
                    continue
                handle(request)
                left -= 1
        finally:
            ring.batching = False
            ring.signal()
        if not left:
            self.slot.loop.call_soon(lambda: self.kick(ring.index))

    # configuration space

    def config_read(self, offset: int, size: int) -> int:
        """Bytes past the end of the device's configuration space read as 0."""
        data: bytes = self._config() if self._config is not None else b""
        return int.from_bytes(data[offset : offset + size], "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        if self._config_written is not None:
            self._config_written(offset, value.to_bytes(size, "little"))

    # state

    def pause(self) -> None:
        """The machine pauses: no request is in flight, and none is taken, until :meth:`resume`."""
        if self.status & DRIVER_OK:
            self._tell("drain")
        self._tell("pause")
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        self._tell("resume")
        self._notify_all()

    def save(self) -> VirtioState:
        self._tell("drain")
        state = VirtioState(
            status=self.status,
            features=self.features,
            generation=self.generation,
            queues=[Queue(q.maximum, q.size, q.table, q.driver, q.device, q.enabled, q.vector) for q in self.queues],
            rings=[None if ring is None else ring.save() for ring in self.rings],
            device=self._tell("save"),
        )
        self._notify_all()
        return state

    def load(self, state: VirtioState) -> None:
        """Take a saved state over, with guest memory already in place. Raises ConfigError when it does not fit."""
        if len(state.queues) != len(self.queues) or state.features & ~self.offered:
            raise ConfigError(f"{self.slot.id}: the saved device has different queues or features from this device")
        self.reset()
        self.features = self.driver_features = state.features
        self.generation = state.generation
        self.queues = [Queue(q.maximum, q.size, q.table, q.driver, q.device, q.enabled, q.vector) for q in state.queues]
        if state.device is not None:
            own = _structured(state.device, type(self._tell("save")), self.slot.id)
            self._tell("load", own)
        self.status = state.status
        if self.status & DRIVER_OK:
            for index, kept in enumerate(state.rings):
                if kept is not None:
                    self._open(index)
                    ring = self.rings[index]
                    if ring is not None:
                        ring.load(kept)
            self._tell("start")
            for index in range(len(self.queues)):
                self.kick(index)


@cache
def _converter() -> Any:
    from cattrs.preconf.json import make_converter

    return make_converter(forbid_extra_keys=True)


def _structured(saved: Any, cls: type, who: str) -> Any:
    """A device's own state, as its class again where it was plain values in between. Raises ConfigError."""
    if not isinstance(saved, dict):
        return saved
    from cattrs import transform_error

    try:
        return _converter().structure(saved, cls)
    except Exception as error:  # cattrs raises groups of whatever did not fit
        why = "; ".join(transform_error(error))
        raise ConfigError(f"{who}: the saved device's state does not fit: {why}") from error


def unchanged(io: Virtio, state: VirtioState) -> bool:
    """True where :meth:`Virtio.load` would change nothing: the device has nothing under way, and nothing to keep, or
    says that it keeps the same. It is paused."""
    says = io._calls.get("unchanged")
    if (says is None and "save" in io._calls) or io.driver_features != state.features:
        return False
    now = io.status, io.features, io.generation, io.queues
    if now != (state.status, state.features, state.generation, state.queues):
        return False
    for ring, kept in zip(io.rings, state.rings, strict=True):
        if ring is None or kept is None:
            if ring is not None or kept is not None:
                return False
        elif not ring.stands_at(kept):
            return False
    return says is None or says(state.device)

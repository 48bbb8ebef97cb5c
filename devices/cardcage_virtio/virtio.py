"""What all virtio devices share (virtio 1.2, chapters 2 and 3): status, features, queues, configuration space.

What a device's author writes is any object with

- ``device_id``: its number (virtio 1.2, chapter 5); ``queue_sizes``: the largest size of each queue;
- ``handle(request)``: serve one :class:`~cardcage_virtio.request.Request` and call ``request.done(written)``, now or
  later, on any thread. A :class:`~cardcage_virtio.request.RingError` raised here puts the device in NEEDS_RESET.

and, where it has more to say (each is looked for by name):

- ``features``: bits it offers; those of the ring and VERSION_1 are added here, unless it says itself which
  (``ring_features``). ``class_code``: for PCI;
- ``config() -> bytes``: configuration space as it is now. ``config_written(offset, data)``: the driver wrote there;
- ``plug(slot)``: the machine's slot. ``plug_virtio(io)``: the :class:`Virtio` of this device;
- ``start()``: the driver is ready (DRIVER_OK); ``io.features`` is what was agreed, ``io.rings`` are the queues;
- ``notified(index)``: takes requests from ``io.rings[index]`` itself; then ``handle`` is not called;
- ``segments = True``: requests of many parts may have them as :class:`~cardcage.segments.Segments`, not lists;
- ``drain()``: return when no request is in flight, and take no more before the next ``start`` or notification;
- ``pause()``, ``resume()``: the machine pauses; rings are left alone without these too;
- ``stop()``: reset, whether or not ``start`` came before. ``unplug()``, ``save()``, ``load(state)`` as for any device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from attrs import define, field
from cardcage.errors import CardError, ConfigError
from cardcage.memory import GuestMemoryError

from cardcage_virtio.packed import PackedRing
from cardcage_virtio.request import RingError
from cardcage_virtio.split import SplitRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot

    from cardcage_virtio.request import Ring

__all__ = ["Queue", "Transport", "Virtio", "VirtioDevice", "VirtioState"]

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_PACKED, F_RING_RESET = 1 << 28, 1 << 29, 1 << 32, 1 << 34, 1 << 40
COMMON = F_INDIRECT | F_EVENT_IDX | F_VERSION_1 | F_RING_RESET
BURST = 4096
"""Requests served in one notification before others get their turn."""


class VirtioDevice(Protocol):
    """The least a virtio device is; see the module for what it may have besides."""

    device_id: int
    queue_sizes: tuple[int, ...]

    def handle(self, request: Any, /) -> None: ...


class Transport(Protocol):
    """How the driver is told. Called on any thread."""

    def queue_interrupt(self, index: int, /) -> None: ...

    def config_interrupt(self) -> None: ...

    def connect(self, index: int, kick: int, call: int, /) -> None:
        """A back end outside this process takes the queue: eventfds for notifications and interrupts."""
        ...

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
    """What a snapshot keeps of any virtio device; ``device`` is the device's own state."""

    version: ClassVar[int] = 1
    status: int = 0
    features: int = 0
    generation: int = 0
    queues: list[Queue] = field(factory=list)
    rings: list[tuple[int, int, int, int] | None] = field(factory=list)
    device: Any = None


class Virtio:
    """One virtio device between its transport and its author's object.

    Attributes:
        features: agreed bits, 0 before FEATURES_OK. status: the status field. generation: of the configuration space.
        queues: as set up. rings: those that are live, ``None`` for the others.
        slot: the machine's slot; log: its logger.
    """

    def __init__(self, device: Any, transport: Transport) -> None:
        self.device, self.transport = device, transport
        self.offered: int = getattr(device, "ring_features", COMMON) | getattr(device, "features", 0)
        self.features = self.driver_features = self.status = self.generation = 0
        self.queues = [Queue(size, size) for size in device.queue_sizes]
        self.rings: list[Ring | None] = [None] * len(self.queues)
        self.slot: Slot
        self.paused = False
        self._warned = (0, 0)
        self._handle = getattr(device, "handle", None)
        self._notified = getattr(device, "notified", None)
        if self._handle is None and self._notified is None:
            raise CardError(f"{type(device).__name__}: a virtio device has a method handle(request) or notified(index)")
        self._config = getattr(device, "config", None)
        self._config_written = getattr(device, "config_written", None)

    def _tell(self, method: str, *arguments: Any) -> Any:
        found = getattr(self.device, method, None)
        return None if found is None else found(*arguments)

    def plug(self, slot: Slot) -> None:
        """Give the device its slot and this object."""
        self.slot, self.log = slot, slot.log
        self._tell("plug", slot)
        self._tell("plug_virtio", self)
        common = getattr(self.device, "ring_features", COMMON)
        self.offered = common | getattr(self.device, "features", 0)  # a back end may have decided some

    def has(self, bit: int) -> bool:
        """Whether feature *bit* was agreed."""
        return bool(self.features >> bit & 1)

    @property
    def live(self) -> bool:
        """The driver is ready, nothing is broken, and the machine is not paused."""
        return self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK and not self.paused

    # status

    def set_status(self, value: int) -> None:
        """The driver wrote the status field; 0 resets."""
        if value == 0:
            self.reset()
            return
        value &= 0xFF & ~NEEDS_RESET
        if value & FEATURES_OK and not self.status & FEATURES_OK:
            agreed = self.driver_features
            if agreed & ~self.offered or not agreed & F_VERSION_1 or self._tell("accept", agreed) is False:
                value &= ~FEATURES_OK
                self.warn("driver asked for features not on offer", features=hex(agreed))
            else:
                self.features = agreed
        started = value & DRIVER_OK and not self.status & DRIVER_OK
        self.status = value | self.status & NEEDS_RESET
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
            self.slot.call_soon(lambda: self.kick(ring.index))

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
            raise ConfigError(f"{self.slot.id}: the saved device has other queues or features than this one")
        self.reset()
        self.features = self.driver_features = state.features
        self.generation = state.generation
        self.queues = [Queue(q.maximum, q.size, q.table, q.driver, q.device, q.enabled, q.vector) for q in state.queues]
        if state.device is not None:
            self._tell("load", self._device_state(state.device))
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

    def _device_state(self, saved: Any) -> Any:
        """The device's own state, as its class again where it was plain values in between."""
        if not isinstance(saved, dict):
            return saved
        from cattrs import transform_error
        from cattrs.preconf.json import make_converter

        try:
            return make_converter(forbid_extra_keys=True).structure(saved, type(self._tell("save")))
        except Exception as error:  # cattrs raises groups of whatever did not fit
            why = "; ".join(transform_error(error))
            raise ConfigError(f"{self.slot.id}: the saved device's state does not fit: {why}") from error

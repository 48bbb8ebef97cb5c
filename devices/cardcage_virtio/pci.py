"""virtio over PCI, the modern interface (virtio 1.2, section 4.1).

BAR 4 holds the common configuration, ISR, device configuration and notification areas, one page each; BAR 1 the MSI-X
table. The fifth capability lets a driver without BAR access reach them through configuration space.
"""

from __future__ import annotations

import os
import struct
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import define
from cardcage.errors import AcceleratorError
from cardcage_pci.spec import Bar, Capability, FunctionSpec

from cardcage_virtio.calls import CallThread
from cardcage_virtio.virtio import Virtio, VirtioState

if TYPE_CHECKING:
    from cardcage.device import Slot
    from cardcage_pci.function import Function

__all__ = ["PciTransport", "VirtioPciState"]

ISR, DEVICE, NOTIFY, BAR_SIZE = 0x1000, 0x2000, 0x3000, 0x4000
NO_VECTOR = 0xFFFF
VECTORS_MAX = 2048
CLASSES = {1: 0x020000, 2: 0x010000, 3: 0x078000, 19: 0x028000, 26: 0x018000}


@define
class VirtioPciState:
    """What a snapshot keeps of the transport and all behind it; the function's own state is the bus's."""

    version: ClassVar[int] = 1
    virtio: VirtioState | None = None
    config_vector: int = NO_VECTOR
    isr: int = 0
    selects: tuple[int, int, int] = (0, 0, 0)


def _area(kind: int, offset: int, length: int, more: bytes = b"") -> Capability:
    return Capability(9, struct.pack("<BBB3xII", 16 + len(more), kind, 4, offset, length) + more)


class PciTransport:
    """A PCI function around a virtio device: what the machine plugs into its ``pci`` bus.

    Args:
        device: the author's object, see :mod:`cardcage_virtio.virtio`.
    """

    def __init__(self, device: Any) -> None:
        self.device, self.virtio = device, Virtio(device, self)
        queues = len(self.virtio.queues)
        window = _area(5, 0, 0, bytes(4))
        self.pci = FunctionSpec(
            vendor=0x1AF4,
            device=0x1040 + device.device_id,
            revision=1,
            class_code=getattr(device, "class_code", CLASSES.get(device.device_id, 0x00FF00)),
            subsystem_vendor=0x1AF4,
            subsystem=0x1100,
            pin=1,
            bars=(Bar(4, BAR_SIZE, "memory64", prefetch=True, name="virtio"),),
            capabilities=(
                _area(1, 0, 0x1000),
                _area(3, ISR, 0x1000),
                _area(4, DEVICE, 0x1000),
                _area(2, NOTIFY, 0x1000, struct.pack("<I", 4)),
                Capability(9, window.data, b"\0\0\xff\0\0\0" + b"\xff" * 12),
            ),
            msix=min(queues + 1, VECTORS_MAX),
        )
        self.function: Function
        self._slot: Slot
        self._isr, self._isr_lock = 0, Lock()
        self._config_vector = NO_VECTOR
        self._device_select = self._driver_select = self._queue_select = 0
        self._kicks: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._bells: list[tuple[int, int]] = []

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        self._direct = "irqfds" in getattr(slot.vm, "capabilities", ())
        self._thread = CallThread(self.queue_interrupt, f"{slot.id}-calls")
        self.virtio.plug(slot)

    def plug_pci(self, function: Function) -> None:
        self.function = function
        self._window = function.capabilities[4]

    def unplug(self) -> None:
        self.reset()
        if hasattr(self.device, "unplug"):
            self.device.unplug()

    # interrupts

    def queue_interrupt(self, index: int) -> None:
        """Used buffers in queue *index*. Any thread."""
        function = self.function
        if function.messages:
            function.notify(self.virtio.queues[index].vector)
        else:
            self._pin(1)

    def config_interrupt(self) -> None:
        """The configuration changed. Any thread."""
        if self.function.messages:
            self.function.notify(self._config_vector)
        else:
            self._pin(2)

    def _pin(self, bit: int) -> None:
        with self._isr_lock:
            self._isr |= bit
        self._slot.call_soon(self._drive)  # lines belong to the machine's lock, which this thread may not hold

    def _drive(self) -> None:
        self.function.intx(bool(self._isr))

    # eventfds of a back end outside this process

    def connect(self, index: int, kick: int, call: int) -> None:
        """Let eventfd *kick* carry the driver's notifications of queue *index*, and *call* the device's interrupts."""
        self._kicks[index], self._calls[index] = kick, call
        self._bind(index)
        self._ring_bells()

    def disconnect(self, index: int) -> None:
        """Undo :meth:`connect`."""
        if index in self._calls:
            self._unbind(index)
            del self._kicks[index], self._calls[index]
            self._ring_bells()

    def _bind(self, index: int) -> None:
        call, vector, msix = self._calls[index], self.virtio.queues[index].vector, self.function.msix
        if self._direct and msix is not None and msix.enabled and vector < msix.vectors:
            msix.bind(vector, call)
        else:
            self._thread.add(call, index)

    def _unbind(self, index: int) -> None:
        call, msix = self._calls[index], self.function.msix
        if msix is None or not msix.unbind(call):
            self._thread.remove(call)

    def bars_moved(self) -> None:
        """The doorbells move with the BAR."""
        self._ring_bells()

    def _ring_bells(self) -> None:
        vm = self._slot.vm
        if "doorbells" not in getattr(vm, "capabilities", ()):
            return
        for fd, address in self._bells:
            vm.remove_doorbell(fd, address, 2, pio=False, value=None)
        base = self.function.mappings[4].address
        self._bells = []
        if base is None:
            return
        for index, fd in self._kicks.items():
            address = base + NOTIFY + 4 * index
            try:
                vm.add_doorbell(fd, address, 2, pio=False, value=None)
            except AcceleratorError as error:  # it has only so many: the write comes here, and goes on to the eventfd
                self._slot.log.warning("notifications go by this process", queue=index, why=str(error))
                return
            self._bells.append((fd, address))

    # BAR 4

    def read(self, offset: int, size: int) -> int:
        if offset < ISR:
            return self._read_common(offset, size)
        if offset < DEVICE:
            if offset != ISR:
                return 0
            with self._isr_lock:
                value, self._isr = self._isr, 0
            self.function.intx(False)
            return value
        if offset < NOTIFY:
            return self.virtio.config_read(offset - DEVICE, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= NOTIFY:
            index = offset - NOTIFY >> 2
            kick = self._kicks.get(index)
            if kick is not None:
                os.eventfd_write(kick, 1)
            else:
                self.virtio.kick(index)
        elif offset < ISR:
            self._write_common(offset, size, value)
        elif offset >= DEVICE:
            self.virtio.config_write(offset - DEVICE, size, value)

    def _read_common(self, offset: int, size: int) -> int:
        virtio, select = self.virtio, self._queue_select
        queue = virtio.queues[select] if select < len(virtio.queues) else None
        fields = struct.pack(
            "<IIIIHHBBHHHHHQQQHH",
            self._device_select,
            virtio.offered >> 32 * self._device_select & 0xFFFFFFFF if self._device_select < 2 else 0,
            self._driver_select,
            virtio.driver_features >> 32 * self._driver_select & 0xFFFFFFFF if self._driver_select < 2 else 0,
            self._config_vector,
            len(virtio.queues),
            virtio.status,
            virtio.generation,
            select,
            queue.size if queue else 0,
            queue.vector if queue else NO_VECTOR,
            queue.enabled if queue else 0,
            select if queue else 0,
            queue.table if queue else 0,
            queue.driver if queue else 0,
            queue.device if queue else 0,
            0,
            0,
        )
        return int.from_bytes(fields[offset : offset + size], "little")

    def _write_common(self, offset: int, size: int, value: int) -> None:
        virtio = self.virtio
        if offset == 0x14:
            virtio.set_status(value & 0xFF)
            if value & 0xFF == 0:
                self._after_reset()
        elif offset == 0x00:
            self._device_select = value & 0xFFFFFFFF
        elif offset == 0x08:
            self._driver_select = value & 0xFFFFFFFF
        elif offset == 0x0C:
            if self._driver_select < 2 and not virtio.status & 8:
                shift = 32 * self._driver_select
                kept = virtio.driver_features & ~(0xFFFFFFFF << shift)
                virtio.driver_features = kept | (value & 0xFFFFFFFF) << shift
        elif offset == 0x10:
            self._config_vector = self._vector(value)
        elif offset == 0x16:
            self._queue_select = value & 0xFFFF
        elif self._queue_select < len(virtio.queues):
            self._write_queue(offset, size, value)

    def _vector(self, value: int) -> int:
        return value if value < self.pci.msix else NO_VECTOR

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        index = self._queue_select
        queue = self.virtio.queues[index]
        if offset == 0x1A:
            connected = index in self._calls
            if connected:
                self._unbind(index)
            queue.vector = self._vector(value & 0xFFFF)
            if connected:
                self._bind(index)
        elif offset == 0x3A and value & 1:
            self.virtio.reset_queue(index)
        elif queue.enabled:
            return  # 4.1.4.3.2: the rest is settled once the queue is enabled
        elif offset == 0x18:
            queue.size = value & 0xFFFF
        elif offset == 0x1C and value & 1:
            self.virtio.enable(index)
        elif 0x20 <= offset < 0x38:
            name = ("table", "driver", "device")[offset - 0x20 >> 3]
            shift = 8 * (offset & 7)
            mask = (1 << 8 * size) - 1 << shift
            setattr(queue, name, (getattr(queue, name) & ~mask | value << shift & mask) & (1 << 64) - 1)

    # configuration space

    def config_read(self, offset: int, size: int) -> int | None:
        """Reading the data field of the PCI access capability reads the BAR."""
        if offset == self._window + 16:
            bar, at, length = self._target()
            if bar == 4 and length in (1, 2, 4) and at % length == 0 and at + length <= BAR_SIZE:
                value = self.read(at, length)
                self.function.config[offset : offset + 4] = value.to_bytes(4, "little")
        return None

    def config_written(self, offset: int, size: int) -> None:
        """Writing it writes the BAR."""
        if offset == self._window + 16:
            bar, at, length = self._target()
            if bar == 4 and length in (1, 2, 4) and at % length == 0 and at + length <= BAR_SIZE:
                self.write(at, length, int.from_bytes(self.function.config[offset : offset + length], "little"))
        if (
            self._direct
            and self._calls
            and self.function.msix is not None
            and offset <= self.function.msix.offset + 3 < offset + size
        ):
            for index in self._calls:  # MSI-X went on or off: the call eventfds take another way
                self._rebind(index)

    def _rebind(self, index: int) -> None:
        self._unbind(index)
        self._bind(index)

    def _target(self) -> tuple[int, int, int]:
        found: tuple[int, int, int] = struct.unpack_from("<B3xII", self.function.config, self._window + 4)
        return found

    # life cycle

    def _after_reset(self) -> None:
        self._config_vector = NO_VECTOR
        self._device_select = self._driver_select = self._queue_select = 0
        with self._isr_lock:
            self._isr = 0
        self.function.intx(False)

    def pause(self) -> None:
        self.virtio.pause()

    def resume(self) -> None:
        self.virtio.resume()

    def reset(self) -> None:
        self.virtio.reset()
        self._after_reset()

    def save(self) -> VirtioPciState:
        selects = (self._device_select, self._driver_select, self._queue_select)
        return VirtioPciState(
            virtio=self.virtio.save(), config_vector=self._config_vector, isr=self._isr, selects=selects
        )

    def load(self, state: VirtioPciState, /) -> None:
        if state.virtio is not None:
            self.virtio.load(state.virtio)
        self._config_vector, self._isr = state.config_vector, state.isr
        self._device_select, self._driver_select, self._queue_select = state.selects

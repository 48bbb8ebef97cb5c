"""virtio over MMIO, version 2 (virtio 1.2, section 4.2): for machines without PCI."""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.device import Resource
from cardcage.values import define

from cardcage_virtio.parking import AsksVirtio
from cardcage_virtio.vhost.calls import CallThread
from cardcage_virtio.virtio import Virtio, VirtioState, needs_of

if TYPE_CHECKING:
    from cardcage.device import Slot
    from cardcage.interrupts import IrqLine
    from cardcage.security import Needs

__all__ = ["MmioTransport", "VirtioMmioState"]

CONFIG = 0x100
ADDRESSES = {0x80: "table", 0x90: "driver", 0xA0: "device"}


@define
class VirtioMmioState:
    """Saved state of the transport and all behind it."""

    version: ClassVar[int] = 1
    virtio: VirtioState | None = None
    isr: int = 0
    selects: tuple[int, int, int] = (0, 0, 0)


class MmioTransport(AsksVirtio):
    """A 512-byte register window around a virtio device, with one level-triggered interrupt.

    Args:
        device: the author's object, see :mod:`cardcage_virtio.virtio`.

    Linux finds it through ACPI (``LNRO0005``) or ``virtio_mmio.device=512@ADDRESS:IRQ``.
    """

    def __init__(self, device: Any) -> None:
        self.device, self.virtio = device, Virtio(device, self)
        self._slot: Slot
        self._line: IrqLine
        self._isr, self._isr_lock = 0, Lock()
        self._device_select = self._driver_select = self._queue_select = 0
        self._calls: dict[int, tuple[int, int]] = {}

    def plug(self, slot: Slot) -> None:
        self._slot, self._line = slot, slot.interrupts.line()
        self._thread = CallThread(self.queue_interrupt, f"{slot.id}-calls")
        self.virtio.plug(slot)
        number = slot.interrupts.number
        irqs = () if number is None else (number,)
        slot.ranges.announce(Resource(hid="LNRO0005", irqs=irqs, level=True))

    def needs(self) -> Needs:
        """The device's needs."""
        return needs_of(self.device)

    def unplug(self) -> None:
        self.reset()
        self.virtio.unplug()

    def queue_interrupt(self, index: int) -> None:
        """Used buffers in queue *index*. Any thread."""
        self._raise(1)

    def config_interrupt(self) -> None:
        """The configuration changed. Any thread."""
        self._raise(2)

    def _raise(self, bit: int) -> None:
        with self._isr_lock:
            self._isr |= bit
        self._slot.loop.call_soon(self._drive)  # lines belong to the machine's lock, which this thread may not hold

    def _drive(self) -> None:
        self._line.set(bool(self._isr))

    def connect(self, index: int, kick: int, call: int) -> None:
        """See :meth:`cardcage_virtio.transport.pci.PciTransport.connect`."""
        self._calls[index] = (kick, call)
        self._thread.add(call, index)

    def disconnect(self, index: int) -> None:
        """Undo :meth:`connect`."""
        kick, call = self._calls.pop(index, (-1, -1))
        if kick >= 0:
            self._thread.remove(call)

    def read(self, offset: int, size: int) -> int:
        virtio = self.virtio
        if offset >= CONFIG:
            return virtio.config_read(offset - CONFIG, size)
        if size != 4:
            return 0
        select = self._queue_select
        queue = virtio.queues[select] if select < len(virtio.queues) else None
        if offset == 0x60:
            return self._isr
        if offset == 0x44:
            return int(queue is not None and queue.enabled)
        if offset == 0x34:
            return queue.maximum if queue is not None else 0
        if offset == 0x10:
            return virtio.offered >> 32 * self._device_select & 0xFFFFFFFF if self._device_select < 2 else 0
        return {
            0x00: 0x74726976,
            0x04: 2,
            0x08: int(self.device.device_id),
            0x0C: 0x1AF4,
            0x70: virtio.status,
            0xFC: virtio.generation,
            0xB0: 0xFFFFFFFF,  # no shared memory region: length of all ones
            0xB4: 0xFFFFFFFF,
            0xB8: 0xFFFFFFFF,
            0xBC: 0xFFFFFFFF,
        }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        virtio = self.virtio
        if offset >= CONFIG:
            virtio.config_write(offset - CONFIG, size, value)
        elif size != 4:
            return
        elif offset == 0x50:
            index = value & 0xFFFF
            if index in self._calls:
                os.eventfd_write(self._calls[index][0], 1)
            else:
                virtio.kick(index)
        elif offset == 0x64:
            with self._isr_lock:
                self._isr &= ~value
            self._drive()
        elif offset == 0x70:
            virtio.set_status(value & 0xFF)
            if value & 0xFF == 0:
                self._after_reset()
        elif offset == 0x14:
            self._device_select = value
        elif offset == 0x24:
            self._driver_select = value
        elif offset == 0x20:
            if self._driver_select < 2 and not virtio.status & 8:
                shift = 32 * self._driver_select
                virtio.driver_features = virtio.driver_features & ~(0xFFFFFFFF << shift) | value << shift
        elif offset == 0x30:
            self._queue_select = value
        elif self._queue_select < len(virtio.queues):
            self._write_queue(offset, value)

    def _write_queue(self, offset: int, value: int) -> None:
        index = self._queue_select
        queue = self.virtio.queues[index]
        if (offset == 0xC0 and value & 1) or (offset == 0x44 and not value & 1 and queue.enabled):
            self.virtio.reset_queue(index)
        elif queue.enabled:
            return
        elif offset == 0x38:
            queue.size = value & 0xFFFF
        elif offset == 0x44 and value & 1:
            self.virtio.enable(index)
        elif offset & ~4 in ADDRESSES:
            name, shift = ADDRESSES[offset & ~4], 32 if offset & 4 else 0
            setattr(queue, name, getattr(queue, name) & ~(0xFFFFFFFF << shift) | value << shift)

    def _after_reset(self) -> None:
        self._device_select = self._driver_select = self._queue_select = 0
        with self._isr_lock:
            self._isr = 0
        self._drive()

    def pause(self) -> None:
        self.virtio.pause()

    def resume(self) -> None:
        self.virtio.resume()

    def reset(self) -> None:
        self.virtio.reset()
        self._after_reset()

    def save(self) -> VirtioMmioState:
        selects = (self._device_select, self._driver_select, self._queue_select)
        return VirtioMmioState(virtio=self.virtio.save(), isr=self._isr, selects=selects)

    def load(self, state: VirtioMmioState, /) -> None:
        if state.virtio is not None:
            self.virtio.load(state.virtio)
        self._isr = state.isr
        self._device_select, self._driver_select, self._queue_select = state.selects
        self._drive()

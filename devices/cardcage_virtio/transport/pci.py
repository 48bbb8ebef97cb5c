"""virtio over PCI, the modern interface (virtio 1.2, section 4.1).

BAR 4 holds the common configuration, ISR, device configuration and notification areas, one page each; BAR 1 the MSI-X
table. The fifth capability lets a driver without BAR access reach them through configuration space.
"""

from __future__ import annotations

import os
import struct
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.values import define
from cardcage_pci.spec import Bar, Capability, FunctionSpec

from cardcage_virtio.parking import AsksVirtio
from cardcage_virtio.transport.common import NO_VECTOR, CommonConfig
from cardcage_virtio.transport.events import NOTIFY, BackEndEvents
from cardcage_virtio.virtio import Virtio, VirtioState, needs_of, unchanged

if TYPE_CHECKING:
    from cardcage.device import Slot
    from cardcage.security import Needs
    from cardcage_pci.function import Function

__all__ = ["PciTransport", "VirtioPciState"]

STATUS, ISR, DEVICE, BAR_SIZE = 0x14, 0x1000, 0x2000, 0x4000
VECTORS_MAX = 2048
CLASSES = {1: 0x020000, 2: 0x010000, 3: 0x078000, 19: 0x028000, 26: 0x018000}


@define
class VirtioPciState:
    """Saved state of the transport and all behind it; the function's own state is the bus's."""

    version: ClassVar[int] = 1
    virtio: VirtioState | None = None
    config_vector: int = NO_VECTOR
    isr: int = 0
    selects: tuple[int, int, int] = (0, 0, 0)


def _area(kind: int, offset: int, length: int, more: bytes = b"") -> Capability:
    return Capability(9, struct.pack("<BBB3xII", 16 + len(more), kind, 4, offset, length) + more)


class PciTransport(AsksVirtio):
    """A PCI function around a virtio device: what the machine plugs into its ``pci`` bus.

    Args:
        device: the author's object, see :mod:`cardcage_virtio.device`.
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
        self._events = BackEndEvents(self.virtio)
        self._common = CommonConfig(self.virtio, self._events, self.pci.msix)

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        self._events.plug(slot, self.queue_interrupt)
        self.virtio.plug(slot)

    def plug_pci(self, function: Function) -> None:
        self.function = function
        self._events.plug_pci(function)
        self._window = function.capabilities[4]

    def needs(self) -> Needs:
        """The device's needs."""
        return needs_of(self.device)

    def unplug(self) -> None:
        self.reset()
        self.virtio.unplug()

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
            self.function.notify(self._common.config_vector)
        else:
            self._pin(2)

    def _pin(self, bit: int) -> None:
        with self._isr_lock:
            self._isr |= bit
        self._slot.loop.call_soon(self._drive)  # lines belong to the machine's lock, which this thread may not hold

    def _drive(self) -> None:
        self.function.intx(bool(self._isr))

    # eventfds of a back end outside this process

    def connect(self, index: int, kick: int, call: int) -> None:
        """Let eventfd *kick* carry the driver's notifications of queue *index*, and *call* the device's interrupts."""
        self._events.connect(index, kick, call)

    def disconnect(self, index: int) -> None:
        """Undo :meth:`connect`."""
        self._events.disconnect(index)

    def bars_moved(self) -> None:
        """The doorbells move with the BAR."""
        self._events.place()

    # BAR 4

    def read(self, offset: int, size: int) -> int:
        if offset < ISR:
            return self._common.read(offset, size)
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
            kick = self._events.kicks.get(index)
            if kick is not None:
                os.eventfd_write(kick, 1)
            else:
                self.virtio.kick(index)
        elif offset < ISR:
            self._common.write(offset, size, value)
            if offset == STATUS and value & 0xFF == 0:
                self._after_reset()
        elif offset >= DEVICE:
            self.virtio.config_write(offset - DEVICE, size, value)

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
        self._events.config_written(offset, size)

    def _target(self) -> tuple[int, int, int]:
        found: tuple[int, int, int] = struct.unpack_from("<B3xII", self.function.config, self._window + 4)
        return found

    # life cycle

    def _after_reset(self) -> None:
        self._common.reset()
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
        common = self._common
        selects = (common.device_select, common.driver_select, common.queue_select)
        return VirtioPciState(
            virtio=self.virtio.save(), config_vector=common.config_vector, isr=self._isr, selects=selects
        )

    def unchanged(self, state: VirtioPciState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        common = self._common
        now = common.config_vector, self._isr, common.device_select, common.driver_select, common.queue_select
        if now != (state.config_vector, state.isr, *state.selects):
            return False
        return state.virtio is not None and unchanged(self.virtio, state.virtio)

    def load(self, state: VirtioPciState, /) -> None:
        if state.virtio is not None:
            self.virtio.load(state.virtio)
        common = self._common
        common.config_vector, self._isr = state.config_vector, state.isr
        common.device_select, common.driver_select, common.queue_select = state.selects

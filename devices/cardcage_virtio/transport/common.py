"""The common configuration of virtio over PCI (virtio 1.2, section 4.1.4.3)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from cardcage_virtio.virtio import Virtio

if TYPE_CHECKING:
    from cardcage_virtio.transport.events import BackEndEvents

__all__ = ["NO_VECTOR", "CommonConfig"]

NO_VECTOR = 0xFFFF


class CommonConfig:
    """The registers of one function.

    Args:
        vectors: how many the MSI-X table has.
    """

    def __init__(self, virtio: Virtio, events: BackEndEvents, vectors: int) -> None:
        self._virtio, self._events, self._vectors = virtio, events, vectors
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        self.config_vector = NO_VECTOR
        self.device_select = self.driver_select = self.queue_select = 0

    def read(self, offset: int, size: int) -> int:
        """Bytes inside the block."""
        virtio, select = self._virtio, self.queue_select
        queue = virtio.queues[select] if select < len(virtio.queues) else None
        fields = struct.pack(
            "<IIIIHHBBHHHHHQQQHH",
            self.device_select,
            virtio.offered >> 32 * self.device_select & 0xFFFFFFFF if self.device_select < 2 else 0,
            self.driver_select,
            virtio.driver_features >> 32 * self.driver_select & 0xFFFFFFFF if self.driver_select < 2 else 0,
            self.config_vector,
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

    def write(self, offset: int, size: int, value: int) -> None:
        """Write inside the block."""
        virtio = self._virtio
        if offset == 0x14:
            virtio.set_status(value & 0xFF)
        elif offset == 0x00:
            self.device_select = value & 0xFFFFFFFF
        elif offset == 0x08:
            self.driver_select = value & 0xFFFFFFFF
        elif offset == 0x0C:
            if self.driver_select < 2 and not virtio.status & 8:
                shift = 32 * self.driver_select
                kept = virtio.driver_features & ~(0xFFFFFFFF << shift)
                virtio.driver_features = kept | (value & 0xFFFFFFFF) << shift
        elif offset == 0x10:
            self.config_vector = self._vector(value)
        elif offset == 0x16:
            self.queue_select = value & 0xFFFF
        elif self.queue_select < len(virtio.queues):
            self._write_queue(offset, size, value)

    def _vector(self, value: int) -> int:
        return value if value < self._vectors else NO_VECTOR

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        index = self.queue_select
        queue = self._virtio.queues[index]
        if offset == 0x1A:
            with self._events.elsewhere(index):
                queue.vector = self._vector(value & 0xFFFF)
        elif offset == 0x3A and value & 1:
            self._virtio.reset_queue(index)
        elif queue.enabled:
            return  # 4.1.4.3.2: the rest is settled once the queue is enabled
        elif offset == 0x18:
            queue.size = value & 0xFFFF
        elif offset == 0x1C and value & 1:
            self._virtio.enable(index)
        elif 0x20 <= offset < 0x38:
            name = ("table", "driver", "device")[offset - 0x20 >> 3]
            shift = 8 * (offset & 7)
            mask = (1 << 8 * size) - 1 << shift
            setattr(queue, name, (getattr(queue, name) & ~mask | value << shift & mask) & (1 << 64) - 1)

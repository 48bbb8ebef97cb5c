"""Message-signalled interrupts (PCI 3.0, 6.8): MSI in configuration space, MSI-X with its table in a BAR."""

from __future__ import annotations

import os
import struct
from threading import Lock
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError

from cardcage_pci.spec import Bar

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["Msi", "MsiX"]

ENTRY = struct.Struct("<QII")


class Msi:
    """MSI with 64-bit addresses and per-vector masks; its registers live in the function's *config*."""

    def __init__(self, vectors: int, slot: Slot, config: bytearray) -> None:
        self.vectors, self.offset = vectors, 0
        self._slot, self._config, self._lock = slot, config, Lock()

    def capability(self) -> tuple[bytes, bytes]:
        """Initial bytes and write mask after the id and next pointers."""
        control = 1 << 8 | 1 << 7 | (self.vectors.bit_length() - 1) << 1
        mask = struct.pack("<HQHHI", 0x71, 0xFFFFFFFFFFFFFFFC, 0xFFFF, 0, (1 << self.vectors) - 1)
        return struct.pack("<HQHHII", control, 0, 0, 0, 0, 0), mask

    def _get(self, at: int, size: int) -> int:
        return int.from_bytes(self._config[self.offset + at : self.offset + at + size], "little")

    @property
    def enabled(self) -> bool:
        return bool(self._config[self.offset + 2] & 1)

    def notify(self, vector: int) -> None:
        """Send, or mark pending when masked. Vectors past what the guest granted fold onto those it did."""
        granted = 1 << min(self._get(2, 2) >> 4 & 7, self.vectors.bit_length() - 1)
        vector %= granted
        with self._lock:
            pending = self._get(20, 4)
            if self._get(16, 4) >> vector & 1:
                self._config[self.offset + 20 : self.offset + 24] = (pending | 1 << vector).to_bytes(4, "little")
                return
        self._slot.interrupts.msi(self._get(4, 8), self._get(12, 2) & ~(granted - 1) | vector)

    def changed(self) -> None:
        """Registers were written: deliver what is pending and no longer masked."""
        if not self.enabled:
            return
        with self._lock:
            pending = self._get(20, 4)
            due = pending & ~self._get(16, 4)
            self._config[self.offset + 20 : self.offset + 24] = (pending & ~due).to_bytes(4, "little")
        for vector in range(self.vectors):
            if due >> vector & 1:
                self.notify(vector)


class MsiX:
    """MSI-X: table at the start of a BAR, pending bits in its second half.

    Eventfds can stand for a vector (:meth:`bind`): routed past this process where the accelerator has ``irqfds``, and
    read on the loop thread where it has none, or while the vector is masked.
    """

    def __init__(self, vectors: int, slot: Slot) -> None:
        self.vectors, self.offset, self.pending = vectors, 0, 0
        self.enabled = self.masked = False
        self._slot, self._lock = slot, Lock()
        self.table = bytearray(16 * vectors)
        self._half = 1 << max(11, (16 * vectors - 1).bit_length())
        self._ready: list[tuple[int, int] | None] = [None] * vectors
        self._fds: dict[int, tuple[int, int | None]] = {}  # vector, and route past this process
        self._direct = "irqfds" in getattr(slot.interrupts.vm, "capabilities", ())
        self.reset()

    def bar(self, index: int) -> Bar:
        """The BAR that holds table and pending bits."""
        return Bar(index, 2 * self._half, name="msix")

    def capability(self, bar: int) -> bytes:
        """Initial bytes after the id and next pointers."""
        return struct.pack("<HII", self.vectors - 1, bar, self._half | bar)

    def reset(self) -> None:
        for vector in range(self.vectors):
            ENTRY.pack_into(self.table, 16 * vector, 0, 0, 1)
        self.pending = 0
        self.control(0)

    def load(self, table: bytes, pending: int, control: int) -> None:
        """Take a saved table over."""
        self.table[:], self.pending = table, pending
        self.control(control)

    def control(self, value: int) -> None:
        """The guest wrote message control: bit 15 enable, bit 14 mask all."""
        self.enabled, self.masked = bool(value & 0x8000), bool(value & 0x4000)
        for vector in range(self.vectors):
            self._refresh(vector)

    def _refresh(self, vector: int) -> None:
        address, data, mask = ENTRY.unpack_from(self.table, 16 * vector)
        with self._lock:
            ready = None if mask & 1 or self.masked or not self.enabled else (address & ~3, data)
            changed, self._ready[vector] = ready != self._ready[vector], ready
            due = ready is not None and self.pending >> vector & 1
            if due:
                self.pending &= ~(1 << vector)
        if changed:
            for fd in [fd for fd, (bound, _) in self._fds.items() if bound == vector]:
                self.bind(vector, fd)
        if due and ready is not None:
            self._slot.interrupts.msi(*ready)

    def notify(self, vector: int) -> None:
        """Send message *vector*, or mark it pending while masked. Thread-safe; an unknown vector is ignored."""
        if not 0 <= vector < self.vectors or not self.enabled:
            return
        with self._lock:
            ready = self._ready[vector]
            if ready is None:
                self.pending |= 1 << vector
                return
        self._slot.interrupts.msi(*ready)

    # eventfds

    def bind(self, vector: int, fd: int) -> None:
        """Let eventfd *fd* raise *vector* until :meth:`unbind`, masked or not. Others may raise it, too."""
        self.unbind(fd)
        route, ready = None, self._ready[vector]
        if self._direct and ready is not None:
            try:
                route = self._slot.interrupts.vm.add_irqfd(fd, *ready)
            except AcceleratorError as error:  # it has only so many: the loop thread has room for all
                self._slot.log.warning("interrupt goes by the loop thread", vector=vector, why=str(error))
        self._fds[fd] = (vector, route)
        if route is None:
            self._slot.loop.add_reader(fd, lambda: self._signalled(vector, fd))

    def _signalled(self, vector: int, fd: int) -> None:
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        self.notify(vector)

    def unbind(self, fd: int) -> bool:
        """Stop what :meth:`bind` began; False when it did not."""
        if fd not in self._fds:
            return False
        _, route = self._fds.pop(fd)
        if route is None:
            self._slot.loop.remove_reader(fd)
        else:
            self._slot.interrupts.vm.remove_irqfd(fd, route)
        return True

    def close(self) -> None:
        """Undo each :meth:`bind`."""
        for fd in [*self._fds]:
            self.unbind(fd)

    # the BAR

    def read(self, offset: int, size: int) -> int:
        if offset < self._half:
            return int.from_bytes(self.table[offset : offset + size], "little")
        for fd, (vector, route) in self._fds.items():
            if route is None:  # what the loop thread has not come to yet is pending all the same
                self._signalled(vector, fd)
        return self.pending >> 8 * (offset - self._half) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset + size > len(self.table):
            return  # past the table, or the pending bits, which are read-only
        self.table[offset : offset + size] = value.to_bytes(size, "little")
        for vector in {offset >> 4, offset + size - 1 >> 4}:
            self._refresh(vector)

"""Doorbells, irqfds and the rings of other processes: the tables behind ``native/host/eventfds.c``."""

from __future__ import annotations

import os
import select
import threading
from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, StateError, UsageError
from cardcage.values import frozen

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area

if TYPE_CHECKING:
    from cardcage_tcg.vm import TcgVm

__all__ = ["EventFds"]

ROUTES, RINGS, NONE = 4096, 1024, 0xFFFFFFFF
END, IDLE = (1 << 64) - 1, (1 << 64) - 2


@frozen
class Bell:
    """A doorbell; ``source`` is the caller's descriptor, ``fd`` our own of the same eventfd."""

    pio: bool
    address: int
    size: int
    value: int | None
    source: int
    fd: int

    def collides(self, pio: bool, address: int, size: int, value: int | None) -> bool:
        """True if one store could be for both, as KVM sees it."""
        if (self.pio, self.address) != (pio, address) or (self.size and size and self.size != size):
            return False
        return self.value is None or value is None or self.value == value


class EventFds:
    """The eventfds of one VM. Each is kept by a descriptor of its own, so that the caller may close his."""

    def __init__(self, vm: TcgVm) -> None:
        self._vm, self._native = vm, vm.native
        self._lock = threading.Lock()
        self._bells: list[Bell] = []
        self._routes: dict[int, tuple[int, int]] = {}
        self._generation = 0
        self._rings: dict[int, tuple[int, int]] = {}
        self._heads: dict[int, Area] = {}
        self._published: dict[int, list[Area]] = {}
        self._route_area, self._ring_area = Area(ROUTES * L.SIZEOF_ROUTE), Area(RINGS * L.SIZEOF_RING)
        self._epoll: select.epoll | None = None
        self._end = self._idle = -1
        self._thread: threading.Thread | None = None
        vm.set_word(L.VM_ROUTES, self._route_area.address)
        vm.set_word(L.VM_RINGS, self._ring_area.address)
        vm.set_half(L.VM_IDLE_FD, NONE)

    def _publish(self, field: int, rows: list[bytes]) -> None:
        """Replace a table that native code reads without a lock; the one before stays for whoever is in it."""
        kept = self._published.setdefault(field, [])
        table = b"".join(rows)
        area = Area(8 + len(table))
        area.view[: 8 + len(table)] = pack("<Q", len(rows)) + table
        with self._vm.quiesce():
            self._vm.set_word(field, area.address if rows else 0)
        kept.append(area)
        while len(kept) > 2:
            kept.pop(0).close()

    @staticmethod
    def _keep(fd: int) -> int:
        """Our own descriptor of the caller's eventfd."""
        try:
            kept = os.dup(fd)
        except OSError as error:
            raise AcceleratorError(f"tcg: descriptor {fd}: {error.strerror}") from error
        if os.readlink(f"/proc/self/fd/{kept}") != "anon_inode:[eventfd]":
            os.close(kept)
            raise AcceleratorError(f"tcg: descriptor {fd} is no eventfd")
        return kept

    @property
    def joined(self) -> bool:
        """True with any doorbell, irqfd or ring of another process."""
        return bool(self._bells or self._routes or self._rings)

    def renew(self) -> None:
        """This is a forked process: with descriptors of its own. Nothing is joined, and the thread is not running."""
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._end)
            os.close(self._idle)
            self._open()

    # doorbells

    @property
    def has_bells(self) -> bool:
        """True if there is any doorbell."""
        return bool(self._bells)

    @property
    def has_rings(self) -> bool:
        """True if another process serves a ring."""
        return bool(self._rings)

    def add_bell(self, fd: int, address: int, size: int, pio: bool, value: int | None) -> None:
        """See :class:`cardcage.accelerator.Doorbells`."""
        if size not in (0, 1, 2, 4, 8):
            raise UsageError(f"doorbell at {address:#x}: {size} bytes; expected 0, 1, 2, 4 or 8")
        if value is not None and not size:
            raise UsageError(f"doorbell at {address:#x}: one for a value has a size")
        with self._lock:
            if any(bell.collides(pio, address, size, value) for bell in self._bells):
                raise AcceleratorError(f"tcg: doorbell at {address:#x}: there is one already")
            self._bells.append(Bell(pio, address, size, value, fd, self._keep(fd)))
            self._publish_bells()

    def remove_bell(self, fd: int, address: int, size: int, pio: bool, value: int | None) -> None:
        """See :class:`cardcage.accelerator.Doorbells`."""
        with self._lock:
            for bell in self._bells:
                if (bell.pio, bell.address, bell.size, bell.value, bell.source) == (pio, address, size, value, fd):
                    self._bells.remove(bell)
                    self._publish_bells()
                    os.close(bell.fd)  # nobody writes it any more: the world was stopped
                    return
        raise AcceleratorError(f"tcg: no such doorbell at {address:#x}")

    def _publish_bells(self) -> None:
        self._bells.sort(key=lambda one: (one.pio, one.address))
        rows = [
            pack(
                "<QQiIII", one.address, (one.value or 0) & (1 << 8 * (one.size or 8)) - 1, one.fd, one.size, one.pio,
                one.value is not None,
            )
            for one in self._bells
        ]  # fmt: skip
        self._publish(L.VM_BELLS, rows)

    # irqfds

    def add_route(self, fd: int, address: int, data: int) -> int:
        """See :class:`cardcage.accelerator.IrqFds`."""
        if not self._vm.lapic:
            raise StateError("irqchip none: there is no local APIC to deliver an irqfd to")
        with self._lock:
            if any(source == fd for source, _ in self._routes.values()):
                raise AcceleratorError(f"tcg: eventfd {fd} has a route already")
            number = next((one for one in range(ROUTES) if one not in self._routes), None)
            if number is None:
                raise AcceleratorError(f"tcg: more than {ROUTES} irqfds")
            kept = self._keep(fd)
            epoll = self._start()
            self._generation = self._generation + 1 & 0xFFFFFFFF
            row = (address & END, data & 0xFFFFFFFF, kept, 1, self._generation)
            self._native.set_route(self._vm.pointer, number, pack("<QIiII", *row))
            self._routes[number] = fd, kept
            # the thread's events hold number and generation; select.epoll would put the descriptor there
            self._native.watch_eventfd(epoll.fileno(), kept, self._generation << 32 | number)
            return number

    def remove_route(self, fd: int, number: int) -> None:
        """See :class:`cardcage.accelerator.IrqFds`."""
        with self._lock:
            if self._routes.get(number, (-1, -1))[0] != fd:
                raise UsageError(f"tcg: no interrupt route {number} of eventfd {fd}")
            _, kept = self._routes.pop(number)
            self._native.set_route(self._vm.pointer, number, bytes(L.SIZEOF_ROUTE))
            if self._epoll is not None:
                self._epoll.unregister(kept)
            os.close(kept)

    def _start(self) -> select.epoll:
        """The epoll of the thread, which is started with the first route."""
        if self._epoll is not None:
            return self._epoll
        epoll = self._open()
        self.unpark()
        return epoll

    def _open(self) -> select.epoll:
        """Make the thread's epoll, its end, and what wakes a halted vCPU there, which waits for irqfds too."""
        epoll, self._end = select.epoll(), os.eventfd(0, os.EFD_CLOEXEC)
        self._native.watch_eventfd(epoll.fileno(), self._end, END)
        self._vm.set_half(L.VM_IRQ_EPOLL, epoll.fileno())
        self._idle = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._native.watch_eventfd(epoll.fileno(), self._idle, IDLE)
        self._vm.set_half(L.VM_IDLE_FD, self._idle)
        self._epoll = epoll
        return epoll

    def park(self) -> None:
        """End the thread, if there is one."""
        if self._thread is not None:
            os.eventfd_write(self._end, 1)
            self._thread.join()
            os.eventfd_read(self._end)
            self._thread = None

    def unpark(self) -> None:
        """Start it, where there are routes."""
        if self._epoll is not None:
            self._thread = threading.Thread(
                target=self._native.irqfds, args=(self._vm.pointer,), name="tcg-irqfds", daemon=True
            )
            self._thread.start()

    # rings of other processes

    def add_ring(self, size: int, table: int, avail: int, used: int) -> int:
        """See :class:`cardcage.accelerator.ForeignRings`."""
        if not 0 < size <= 32768 or size & (size - 1):
            raise UsageError(f"ring of {size} entries: expected a power of two up to 32768")
        with self._lock:
            index = self._vm.memory.peek(used + 2, 2)
            number = next((one for one in range(RINGS) if one not in self._rings), None)
            if index is None or number is None:
                raise AcceleratorError(f"tcg: ring at {used:#x}: not RAM, or more than {RINGS} rings")
            self._rings[number] = used & ~0xFFF, used + 5 + 8 * size & ~0xFFF
            heads = self._heads[number] = Area(size)
            row = L.SIZEOF_RING * number
            # seen first as it is now: the other process has not begun
            seen = int.from_bytes(index, "little")
            place = self._ring_area.view, row
            pack_into("<QQQQIIII", *place, table, used, avail, heads.address, size, seen, seen, 0)
            self._vm.set_half(L.VM_NRINGS, max(self._rings) + 1)
            self._publish_rings()
            return number

    def remove_ring(self, number: int) -> None:
        """See :class:`cardcage.accelerator.ForeignRings`."""
        with self._lock:
            if self._rings.pop(number, None) is None:
                raise UsageError(f"tcg: no ring {number}")
            with self._vm.quiesce():
                self._native.look(self._vm.pointer, number)
                pack_into(f"{L.SIZEOF_RING}s", self._ring_area.view, L.SIZEOF_RING * number, b"")
            self._heads.pop(number).close()
            self._publish_rings()

    def ring_heads(self, number: int) -> tuple[int, list[int]]:
        """See :class:`cardcage.accelerator.ForeignRings`."""
        with self._lock:
            if number not in self._rings:
                raise UsageError(f"tcg: no ring {number}")
            self._native.look(self._vm.pointer, number)
            row = L.SIZEOF_RING * number
            size, made = (unpack_from("<I", self._ring_area.view, row + at)[0] for at in (L.RING_SIZE, L.RING_MADE))
            return made, [head for head, count in enumerate(self._heads[number].view[:size]) if count == 1]

    def _publish_rings(self) -> None:
        pages = sorted({page for low, high in self._rings.values() for page in range(low, high + 1, 4096)})
        self._publish(L.VM_WATCHED, [pack("<Q", page) for page in pages])
        with self._vm.quiesce():
            self._vm.flush_translations()

    def close(self) -> None:
        """End the thread and give everything back."""
        self.park()
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._end)
            os.close(self._idle)
        for fd in (*(bell.fd for bell in self._bells), *(kept for _, kept in self._routes.values())):
            os.close(fd)
        tables = (one for kept in self._published.values() for one in kept)
        for area in (*tables, *self._heads.values(), self._route_area, self._ring_area):
            area.close()

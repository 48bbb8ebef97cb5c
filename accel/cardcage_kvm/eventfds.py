"""Doorbells and irqfds of a KVM VM: eventfds that KVM signals and hears."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, StateError, UsageError

from cardcage_kvm import abi

if TYPE_CHECKING:
    from cardcage_kvm.vm import KvmVm

__all__ = ["EventFds"]


class EventFds:
    """Those of one VM. An irqfd is kept by a descriptor of its own, so that the caller may close his."""

    def __init__(self, vm: KvmVm) -> None:
        self._vm = vm
        self._bells: set[tuple[int, int, int, bool, int | None]] = set()
        self._irqfds: dict[int, tuple[int, int]] = {}

    @property
    def joined(self) -> bool:
        """True with any doorbell or irqfd."""
        return bool(self._bells or self._irqfds)

    def add_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Signal eventfd *fd* when the guest writes *size* bytes (0: any) at *address*, equal to *value* if given."""
        self._ring(fd, address, size, pio, value, 0)
        self._bells.add((fd, address, size, pio, value))

    def remove_doorbell(self, fd: int, address: int, size: int, *, pio: bool, value: int | None) -> None:
        """Take a doorbell away; arguments as given to :meth:`add_doorbell`."""
        self._ring(fd, address, size, pio, value, abi.IOEVENTFD_DEASSIGN)
        self._bells.discard((fd, address, size, pio, value))

    def _ring(self, fd: int, address: int, size: int, pio: bool, value: int | None, flags: int) -> None:
        if size not in (0, 1, 2, 4, 8):
            raise UsageError(f"doorbell at {address:#x}: {size} bytes; expected 0, 1, 2, 4 or 8")
        flags |= (abi.IOEVENTFD_PIO if pio else 0) | (abi.IOEVENTFD_DATAMATCH if value is not None else 0)
        bell = abi.IoEventFd(datamatch=value or 0, addr=address, len=size, fd=fd, flags=flags)
        abi.ioctl(self._vm.fd, abi.IOEVENTFD, bell)

    def add_irqfd(self, fd: int, address: int, data: int, /) -> int:
        """Route eventfd *fd* to an MSI message; returns a route number."""
        if self._vm.irqchip == "none":
            raise StateError("irqchip none: KVM has nothing to deliver an irqfd to")
        try:
            kept = os.dup(fd)
        except OSError as error:
            raise AcceleratorError(f"kvm: descriptor {fd}: {error.strerror}") from error
        try:
            route = self._vm.routes.add(address, data)
            try:
                self._join(kept, route)
            except AcceleratorError:
                self._vm.routes.remove(route)
                raise
        except AcceleratorError:
            os.close(kept)
            raise
        self._irqfds[route] = fd, kept
        return route

    def remove_irqfd(self, fd: int, route: int, /) -> None:
        """Take the route of :meth:`add_irqfd` away."""
        if self._irqfds.get(route, (-1, -1))[0] != fd:
            raise UsageError(f"kvm: no interrupt route {route} of eventfd {fd}")
        _, kept = self._irqfds.pop(route)
        self._join(kept, route, abi.IRQFD_DEASSIGN)
        os.close(kept)
        self._vm.routes.remove(route)

    def _join(self, fd: int, route: int, flags: int = 0) -> None:
        abi.ioctl(self._vm.fd, abi.IRQFD, abi.IrqFd(fd=fd, gsi=route, flags=flags))

    def park(self) -> None:
        """Deliver nothing from now on: eventfds count what comes meanwhile."""
        for route, (_, kept) in self._irqfds.items():
            self._join(kept, route, abi.IRQFD_DEASSIGN)

    def unpark(self) -> None:
        """Deliver what came, and what comes."""
        for route, (_, kept) in self._irqfds.items():
            self._join(kept, route)

    def close(self) -> None:
        """Give the descriptors back; KVM's half ends with the VM."""
        while self._irqfds:
            os.close(self._irqfds.popitem()[1][1])
        self._bells.clear()

"""GSI routes of a KVM VM: irqfds, pins of the in-kernel PIC and IOAPIC, level-triggered messages of a split irqchip.

KVM reports the EOI of a vector to user space (KVM_EXIT_IOAPIC_EOI) only when a level-triggered MSI route with that
vector stands among the GSIs reserved for the IOAPIC. A message sent with KVM_SIGNAL_MSI alone would never be
acknowledged, so each level-triggered message is given one of those routes before it is first sent.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError, UsageError

from cardcage_kvm import abi

if TYPE_CHECKING:
    from collections.abc import Iterator

IOAPIC_PINS = 24
MAX_ROUTES = 4096
MSI_LEVEL = 1 << 15


def high_part(address: int) -> int:
    """The upper half of an MSI address as KVM takes it: bits 31 to 8 extend the destination, the rest must be 0."""
    return address >> 32 & 0xFFFFFF00


class Routes:
    """The VM's whole routing table; KVM takes it only whole.

    Args:
        irqchip: ``none``, ``split`` or ``full``.
    """

    def __init__(self, irqchip: str) -> None:
        self._fd, self._irqchip = -1, irqchip
        self._messages: dict[int, tuple[int, int]] = {}
        self._level: dict[tuple[int, int], int] = {}
        self._next_pin = 0
        self._lock = threading.Lock()

    def open(self, fd: int) -> None:
        """The table is the VM's whose descriptor this is; so are the routes that it has already."""
        self._fd = fd
        if self._irqchip == "full" or self._messages:
            self._set()

    def add(self, address: int, data: int) -> int:
        """A new GSI, past the IOAPIC's, that delivers a message."""
        with self._lock:
            gsi = next((one for one in range(IOAPIC_PINS, MAX_ROUTES) if one not in self._messages), None)
            if gsi is None:
                raise AcceleratorError(f"KVM has no more than {MAX_ROUTES} interrupt routes")
            self._messages[gsi] = (address, data)
            try:
                self._set()
            except AcceleratorError:
                del self._messages[gsi]
                raise
            return gsi

    def remove(self, gsi: int) -> None:
        """Take a route of :meth:`add` away."""
        with self._lock:
            if self._messages.pop(gsi, None) is None:
                raise UsageError(f"no interrupt route {gsi}")
            self._set()

    def announce_level(self, address: int, data: int) -> None:
        """Make sure that the EOI of this level-triggered message is reported (irqchip ``split``)."""
        message = (address, data)
        if message in self._level or self._irqchip != "split":
            return
        with self._lock:
            pin = self._next_pin
            self._next_pin = (pin + 1) % IOAPIC_PINS
            for old, at in list(self._level.items()):
                if at == pin:
                    del self._level[old]
            self._messages[pin] = message
            self._set()
            self._level[message] = pin

    def _set(self) -> None:
        entries = list(self._entries())
        both, slots = abi.flexible(abi.Routing, "nr", abi.RoutingEntry, len(entries))
        for slot, entry in zip(slots, entries, strict=True):
            slot.gsi, slot.type, slot.u = entry.gsi, entry.type, entry.u
        abi.ioctl(self._fd, abi.SET_GSI_ROUTING, both)

    def _entries(self) -> Iterator[abi.RoutingEntry]:
        if self._irqchip == "full":
            for gsi in range(IOAPIC_PINS):
                if gsi < 16 and gsi != 2:  # 2 is the cascade
                    chip = abi.IRQCHIP_PIC_MASTER if gsi < 8 else abi.IRQCHIP_PIC_SLAVE
                    yield self._pin(gsi, chip, gsi % 8)
                if gsi != 2:  # the 8254's IRQ 0 arrives at the IOAPIC's pin 2
                    yield self._pin(gsi, abi.IRQCHIP_IOAPIC, 2 if gsi == 0 else gsi)
        for gsi, (address, data) in self._messages.items():
            entry = abi.RoutingEntry(gsi=gsi, type=abi.ROUTING_MSI)
            entry.u.msi = abi.RoutingMsi(
                address_lo=address & 0xFFFFFFFF, address_hi=high_part(address), data=data & 0xFFFFFFFF
            )
            yield entry

    @staticmethod
    def _pin(gsi: int, chip: int, pin: int) -> abi.RoutingEntry:
        entry = abi.RoutingEntry(gsi=gsi, type=abi.ROUTING_IRQCHIP)
        entry.u.irqchip = abi.RoutingIrqchip(irqchip=chip, pin=pin)
        return entry

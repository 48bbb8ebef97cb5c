"""The network hears where a machine is now: switches learn its address anew."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.abilities import has
from cardcage.backends import NetBackend

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["Announces", "announce", "rarp"]

TIMES = (50, 200, 450)
"""Milliseconds after the switch: one frame may be lost while a bridge's port comes up."""
RARP = 0x8035


class Announces(Protocol):
    """A network card that can ask its driver to tell the network where it is (virtio 1.2, 5.1.6.5.4)."""

    mac: bytes
    """Its address, 6 bytes."""

    def announce(self) -> None:
        """Under the machine's lock."""


def announce(machine: Machine) -> None:
    """Ask the drivers to tell it, and tell it in their place: a switch learns by any frame."""
    for plugged in machine.devices.values():
        device: Any = plugged.device
        if not has(device, Announces):
            continue
        machine.loop.call_soon(device.announce)
        for backend in plugged.slot.host.opened:
            if has(backend, NetBackend):
                for after in (0, *TIMES):
                    timer = machine.clock.timer(partial(_send, backend, device))
                    timer.arm(machine.clock.now() + after * 1_000_000)


def _send(backend: NetBackend, device: Announces) -> None:
    backend.send(0, [bytes(backend.features.vnet_header) + rarp(bytes(device.mac))])


def rarp(mac: bytes) -> bytes:
    """The frame: a request of reverse ARP (RFC 903) for the card's own address, to all, of the least size."""
    head = b"\xff" * 6 + mac + RARP.to_bytes(2, "big")
    return (head + bytes.fromhex("0001080006040003") + (mac + bytes(4)) * 2).ljust(60, b"\0")

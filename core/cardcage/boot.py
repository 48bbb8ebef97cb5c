"""The boot seam: boot protocols, what they find of a machine, and what contributes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cardcage.values import frozen

if TYPE_CHECKING:
    from cardcage.memory import GuestMemory
    from cardcage.x86 import VCpuState

__all__ = ["BootContext", "BootContributor", "BootImage", "BootLoader", "E820Entry", "Firmware"]


@frozen
class E820Entry:
    """A range of the BIOS memory map: type 1 RAM, 2 reserved, 3 ACPI reclaimable, 4 ACPI NVS."""

    address: int
    size: int
    type: int = 1


class BootContext(Protocol):
    """Knowledge and results of a boot protocol and its contributors, anew at each boot or reset."""

    memory: GuestMemory
    ram_below_4g: int
    """Bytes of RAM that start at address 0."""
    ram_above_4g: int
    """Bytes of RAM that start at 4 GiB."""
    cpus: int
    e820: list[E820Entry]
    """The memory map so far; contributors add reserved ranges with :meth:`reserve`."""
    rsdp: int | None
    """Guest-physical address of the ACPI RSDP, set by the platform."""
    firmware: bool
    """The boot image is :class:`Firmware`. Without one, contributors leave devices and memory as firmware would."""
    msrs: dict[int, int]
    """MSR values that firmware leaves in all processors, set by contributors; a processor takes those that it has."""

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        """Carve a range out of the memory map as *type*."""


class BootContributor(Protocol):
    """A device that writes guest memory before the boot image does (ACPI tables, option ROMs)."""

    def contribute(self, context: BootContext, /) -> None: ...


class BootImage(Protocol):
    """Files read and checked once; loading is repeatable."""

    def load(self, context: BootContext, /) -> VCpuState:
        """Write guest memory and return the boot processor's first state. Raises ConfigError when it does not fit."""


class Firmware(Protocol):
    """A boot image that may be firmware, which sets devices and memory up by itself."""

    firmware: bool


class BootLoader(Protocol):
    """A boot protocol card's factory product: opens files and checks them, touches no machine."""

    def open(self) -> BootImage: ...

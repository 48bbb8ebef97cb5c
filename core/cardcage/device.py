"""The device seam: what a device may be asked, what it may ask, and the regions it claims.

A device is any object with ``read(offset, size) -> int`` and ``write(offset, size, value)``: no base class. More is
opt-in: each protocol below is looked for once, when the device is plugged in, by name *and* signature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen
from attrs.validators import ge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.clock import Clock
    from cardcage.interrupts import IrqLine
    from cardcage.memory import GuestMemory, PhysicalMemory
    from cardcage.policy import MemoryBalloon
    from cardcage.x86 import VCpuState

__all__ = [
    "BootContext",
    "BootContributor",
    "BootImage",
    "BootLoader",
    "Control",
    "Device",
    "DeviceBus",
    "E820Entry",
    "HasState",
    "Mapping",
    "Mmio",
    "Pausable",
    "Pio",
    "Pluggable",
    "Region",
    "Resettable",
    "Resource",
    "Slot",
    "Unpluggable",
]


@frozen
class Region:
    """A range that a device answers at.

    Attributes:
        size: bytes.
        base: default address, ``None`` when the configuration must give one (keys ``port``/``address``) or the
            device's bus does (a PCI BAR).
        name: what it is, for listings.
        read, write: names of the device's methods that serve it.
    """

    size: int = field(validator=ge(1))
    base: int | None = None
    name: str = ""
    read: str = "read"
    write: str = "write"


@frozen
class Pio(Region):
    """A range of I/O ports."""


@frozen
class Mmio(Region):
    """A range of guest-physical memory addresses."""


@frozen
class Resource:
    """A claim as data, from which the platform renders ACPI and e820.

    Attributes:
        hid: ACPI hardware id, such as ``"PNP0501"``; empty when the device is not to be announced.
        name: four-character ACPI name.
        irqs: GSI numbers. level: level-triggered (else edge).
        io, memory: ``(base, size)`` pairs that the device's regions do not already state.
        extra: further AML objects inside the device as raw bytes.
    """

    hid: str = ""
    name: str = ""
    irqs: tuple[int, ...] = ()
    level: bool = False
    io: tuple[tuple[int, int], ...] = ()
    memory: tuple[tuple[int, int], ...] = ()
    extra: bytes = b""


class Device(Protocol):
    """The least a device is. Offsets are inside its region; sizes 1, 2, 4 or 8; values unsigned."""

    def read(self, offset: int, size: int, /) -> int: ...

    def write(self, offset: int, size: int, value: int, /) -> None: ...


class Pluggable(Protocol):
    """Wants its slot: interrupts, memory, clock, log, back ends."""

    def plug(self, slot: Slot, /) -> None: ...


class Unpluggable(Protocol):
    """Holds something to give back when the machine closes or the device is removed. Called once."""

    def unplug(self) -> None: ...


class Resettable(Protocol):
    """Has state that a machine reset puts back."""

    def reset(self) -> None: ...


class Pausable(Protocol):
    """Does things of its own accord (worker threads, frames that arrive) that change guest memory or interrupt it."""

    def pause(self) -> None:
        """The machine pauses: once this returned, leave guest memory alone until :meth:`resume`."""
        ...

    def resume(self) -> None: ...


class HasState(Protocol):
    """Takes part in snapshots and migration. ``save`` returns an attrs instance of a versioned class."""

    def save(self) -> Any: ...

    def load(self, state: Any, /) -> None: ...


class DeviceBus(Protocol):
    """A device that carries others (``bus = "pci"``). ``bus_type`` is the word that other cards' registrations name.

    One whose devices can be taken off it again also has ``detach(device)``: called when a device that was attached, or
    refused by ``attach``, could not be plugged in.
    """

    bus_type: str

    def attach(self, device: Any, slot: Slot, address: str | None, /) -> None:
        """Give *device* its place; *address* is the configuration's ``address`` key (``"03.0"``), or None to choose."""
        ...


class Mapping(Protocol):
    """A region once plugged in; it can move (BARs, PAM)."""

    address: int | None

    def move(self, address: int | None, /) -> None:
        """Answer at *address*, or nowhere. Raises ConfigError on overlap (then nothing changed)."""
        ...


class Control(Protocol):
    """Requests that a device may make of its machine; each is carried out after the access that asked for it."""

    def request_reset(self, why: str = "", /) -> None: ...

    def request_poweroff(self) -> None: ...

    def request_panic(self, message: str, /) -> None:
        """The guest said that it panicked (pvpanic)."""
        ...

    def request_debug_exit(self, code: int, /) -> None:
        """The guest ended with *code*, 0 to 255 (ISA debug exit); the process's status is ``code << 1 | 1``."""
        ...


class Slot(Protocol):
    """What a plugged-in device holds of its machine. Valid until ``unplug``."""

    @property
    def id(self) -> str:
        """The device's id in its machine."""
        ...

    @property
    def mappings(self) -> Sequence[Mapping]:
        """The regions of the registration in their order, then those that the device mapped itself."""
        ...

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""
        ...

    @property
    def clock(self) -> Clock:
        """Guest time."""
        ...

    @property
    def control(self) -> Control:
        """Requests to the machine."""
        ...

    @property
    def log(self) -> Any:
        """A logger with bound values: ``slot.log.warning("what happened", key=value)``."""
        ...

    @property
    def irqchip(self) -> str:
        """``none``, ``split`` or ``full``: what the accelerator holds itself."""
        ...

    @property
    def vm(self) -> Any:
        """The VM's ``capabilities``, with their calls: :class:`~cardcage.accelerator.Doorbells`, ``IrqFds``,
        ``ForeignRings``."""
        ...

    @property
    def irq_number(self) -> int | None:
        """The configuration's ``irq`` key, ``None`` when it is not given."""
        ...

    @property
    def machine(self) -> Any:
        """The :class:`~cardcage.machine.Machine`, for platform cards: ``machine.devices``, ``.vcpus``, ``.lines``.

        Asks for ``management reach``. Raises Denied.
        """
        ...

    @property
    def machine_name(self) -> str: ...

    @property
    def label(self) -> str:
        """The device's security label."""
        ...

    def ask(
        self,
        tclass: str,
        name: str,
        permissions: tuple[str, ...],
        /,
        revoke: Callable[[], None] | None = None,
        restore: Callable[[], None] | None = None,
        **facts: object,
    ) -> Callable[[], None]:
        """Ask whether this device may have the object *name* of class *tclass*, before it opens it. Raises Denied.

        ``slot.ask("image", path, ("open", "read"))``; classes and permissions are in :mod:`cardcage.security`. With
        *revoke* it is asked again when policy changes: *revoke* and *restore* are then called, under the machine's
        lock, until what this returns is called, or the device is gone. What a back end asks for while it is opened
        needs neither: the slot shuts it.
        """
        ...

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        """What devices of several machines of this host use together, made by the first who asks. Thread-safe.

        *key* begins with the name of the card, such as ``net:switch:lan``; asks for ``backend open`` first.
        """
        ...

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> PhysicalMemory:
        """The RAM's blocks, whose file descriptors another process may be given: asks for ``memory share``."""
        ...

    def irq(self, gsi: int | None = None, /) -> IrqLine:
        """A source of line *gsi*; by default the configuration's ``irq`` key."""
        ...

    def msi(self, address: int, data: int, /) -> None:
        """Send a message-signalled interrupt."""
        ...

    def open(self, kind: str, spec: Any, /) -> Any:
        """Open a back end: *kind* is ``char``, ``block`` or ``net``; closed with the machine. Raises ConfigError."""
        ...

    def balloon(self, balloon: MemoryBalloon, /) -> None:
        """The device is the machine's memory balloon, for its policies. Raises ConfigError when there is one."""
        ...

    def announce(self, resource: Resource, /) -> None:
        """State what the device claims, for ACPI and e820."""
        ...

    def map_pio(self, region: Region, base: int | None, device: Any, /) -> Mapping:
        """Claim one more range of ports, served by ``getattr(device, region.read)`` and ``.write``."""
        ...

    def map_mmio(self, region: Region, base: int | None, device: Any, /) -> Mapping: ...

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        """Call *callback* on the loop thread, under the machine's lock, whenever *fd* is readable."""
        ...

    def remove_reader(self, fd: int, /) -> None: ...

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Run *callback* on the loop thread under the machine's lock. Thread-safe."""
        ...


@frozen
class E820Entry:
    """A range of the BIOS memory map: type 1 RAM, 2 reserved, 3 ACPI reclaimable, 4 ACPI NVS."""

    address: int
    size: int
    type: int = 1


class BootContext(Protocol):
    """What a boot protocol and its contributors know and leave, anew at each boot or reset."""

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
    """The boot image is firmware (it has a true attribute ``firmware``). Without one, contributors leave devices and
    memory as firmware would."""
    msrs: dict[int, int]
    """MSR values that firmware leaves in all processors, set by contributors; a processor takes those that it has."""

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        """Carve a range out of the memory map as *type*."""
        ...


class BootContributor(Protocol):
    """A device that writes guest memory before the boot image does (ACPI tables, option ROMs)."""

    def contribute(self, context: BootContext, /) -> None: ...


class BootImage(Protocol):
    """What was read and checked once; loading is repeatable."""

    def load(self, context: BootContext, /) -> VCpuState:
        """Write guest memory and return the boot processor's first state. Raises ConfigError when it does not fit."""
        ...


class BootLoader(Protocol):
    """A boot protocol card's factory product: opens files and checks them, touches no machine."""

    def open(self) -> BootImage: ...

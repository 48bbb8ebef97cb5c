"""The device seam: what a device may be asked, what it may ask, and the regions it claims.

A device is any object with ``read(offset, size) -> int`` and ``write(offset, size, value)``: no base class. More is
opt-in: each protocol below is looked for once, when the device is plugged in, by name *and* signature
(:mod:`cardcage.abilities`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from attrs import field
from attrs.validators import ge

from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cardcage.clock import Clock
    from cardcage.config import Config
    from cardcage.interrupts import IrqLine, Line
    from cardcage.memory import GuestMemory, PhysicalMemory, RamRange, SharedRange

__all__ = [
    "Board",
    "Controllers",
    "DetachingBus",
    "Device",
    "DeviceBus",
    "Forkable",
    "HasState",
    "HostSide",
    "HotplugBus",
    "Interrupts",
    "Loop",
    "Mmio",
    "Pausable",
    "Pio",
    "Platform",
    "Pluggable",
    "Plugged",
    "Power",
    "PowerButton",
    "RamSpan",
    "Ranges",
    "Region",
    "RegionMapping",
    "Resettable",
    "Resource",
    "Slot",
    "TextOutput",
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

    def resume(self) -> None: ...


class HasState(Protocol):
    """Takes part in snapshots and migration. ``save`` returns an attrs instance of a versioned class."""

    def save(self) -> Any: ...

    def load(self, state: Any, /) -> None: ...


class Forkable(Protocol):
    """Holds something of the host (so do back ends), and can go on in two processes."""

    def may_fork(self) -> str:
        """In one line why it cannot now; empty when it can."""

    def forked(self) -> None:
        """This is the new process, and the machine is parked in it: make anew what the two must not share."""


class PowerButton(Protocol):
    """Can tell the guest that its power button was pressed (ACPI); in vain where its ``button_enabled`` is false."""

    def power_button(self) -> None: ...


class TextOutput(Protocol):
    """Carries a guest's text out (a serial port), and lets others read along."""

    def add_output_listener(self, listener: Callable[[bytes], None], /) -> None:
        """``listener(data)`` is called with all that the guest writes, on any thread, under the machine's lock."""


class DeviceBus(Protocol):
    """A device that carries others (``bus = "pci"``). ``bus_type`` is the word that other cards' registrations name."""

    bus_type: str

    def attach(self, device: Any, slot: Slot, address: str | None, /) -> None:
        """Give *device* its place; *address* is the configuration's ``address`` key (``"03.0"``), or None to choose."""


class DetachingBus(DeviceBus, Protocol):
    """A bus whose devices can be taken off it again."""

    def detach(self, device: Any, /) -> None:
        """*device*, which was attached or refused by ``attach``, could not be plugged in, or was unplugged."""


class HotplugBus(DetachingBus, Protocol):
    """A bus whose devices come and go while the guest runs. Under the machine's lock."""

    def check_arrival(self, address: str | None, /) -> None:
        """Before ``attach`` while the guest runs. Raises ConfigError or StateError where none can come at *address*."""

    def arrived(self, device: Any, /) -> None:
        """*device* is plugged in: tell the guest."""

    def request_removal(self, device: Any, /) -> None:
        """Ask the guest to let go of *device*: then ``Board.unplug``. Raises StateError where it cannot be asked."""

    def place_of(self, device: Any, /) -> str | None:
        """The ``address`` at which *device* is attached."""


class RegionMapping(Protocol):
    """A region once plugged in; it can move (BARs, PAM)."""

    address: int | None

    def move(self, address: int | None, /) -> None:
        """Answer at *address*, or nowhere. Raises ConfigError on overlap (then nothing changed)."""


class Power(Protocol):
    """Requests that a device makes of its machine; each is carried out after the access that asked for it."""

    def reset(self, why: str = "", /) -> None:
        """Reset the machine, or end it, as ``[machine] on_reset`` says."""

    def off(self) -> None:
        """Power off: the outcome is PoweredOff."""

    def panic(self, message: str, /, *, soon: bool = False) -> None:
        """The guest said that it panicked (pvpanic): Panicked, unless ``[machine] on_panic`` is ``"ignore"``.

        With *soon* it goes on, to print a trace: the end or reset that it comes to next has the outcome Panicked.
        """

    def exit(self, code: int, /) -> None:
        """The guest ended with *code*, 0 to 255 (ISA debug exit); the process's status is ``code << 1 | 1``."""

    def stop(self, why: str, /) -> None:
        """The host's side of the device asks for the end (an escape key, a reader that went away): Stopped."""

    def pause(self, why: str, /) -> None:
        """Pause the machine until :meth:`resume`, or until its operator resumes it: the host cannot do now what the
        guest asked for. Any thread; the device is paused with the others, soon. Observers hear ``waiting``."""

    def resume(self) -> None:
        """End the pause that the device asked for; others', and the operator's own, go on. Any thread."""


class Interrupts(Protocol):
    """A device's interrupts."""

    @property
    def number(self) -> int | None:
        """The configuration's ``irq`` key, ``None`` when it is not given."""

    @property
    def irqchip(self) -> str:
        """``none``, ``split`` or ``full``: what the accelerator holds itself."""

    @property
    def vm(self) -> Any:
        """The VM's ``capabilities``, with their calls: :class:`~cardcage.accelerator.Doorbells`, ``IrqFds``,
        ``ForeignRings``."""

    def line(self, gsi: int | None = None, /) -> IrqLine:
        """A source of line *gsi*, 0 to 23; by default the configuration's ``irq`` key. Raises ConfigError."""

    def msi(self, address: int, data: int, /) -> None:
        """Send a message-signalled interrupt."""


class Ranges(Protocol):
    """Where a device answers."""

    @property
    def mappings(self) -> Sequence[RegionMapping]:
        """The regions of the registration in their order, then those that the device mapped itself."""

    def pio(self, region: Region, base: int | None, device: Any, /) -> RegionMapping:
        """Claim one more range of ports, served by ``getattr(device, region.read)`` and ``.write``."""

    def mmio(self, region: Region, base: int | None, device: Any, /) -> RegionMapping:
        """Claim one more range of guest-physical addresses."""

    def announce(self, resource: Resource, /) -> None:
        """State what the device claims, for ACPI and e820."""


class Loop(Protocol):
    """The machine's loop thread; callbacks run on it under the machine's lock."""

    @property
    def ending(self) -> bool:
        """True once the machine has its end: who waits for the host gives up."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None:
        """Call *callback* whenever *fd* is readable."""

    def remove_reader(self, fd: int, /) -> None:
        """No more calls for *fd*, which may be closed at once."""

    def call_soon(self, callback: Callable[[], None], /) -> None:
        """Run *callback* soon. Thread-safe."""


class HostSide(Protocol):
    """A device's side of the host: back ends, and permissions."""

    def open(self, kind: str, spec: Any, /, *, instead: Any = None, fits: Callable[[Any], object] | None = None) -> Any:
        """Open a back end: *kind* is ``char``, ``block`` or ``net``; closed with the machine. Raises ConfigError.

        Args:
            instead: one that was opened before, which this one stands for from then on: it is closed.
            fits: looks at the new one first; what it raises is raised here, and the earlier one stays.
        """

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
        """Ask for the object *name* of class *tclass*, before it is opened. Raises Denied.

        ``slot.host.ask("image", path, ("open", "read"))``; classes and permissions are in :mod:`cardcage.security`.
        With *revoke* it is asked again when policy changes: *revoke* and *restore* are then called, under the machine's
        lock, until what this returns is called, or the device is gone. What a back end asks for while it is opened
        needs neither: the slot shuts it.
        """

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        """Return what devices of several machines of this host use together, made by the first that asks. Thread-safe.

        *key* begins with the name of the card, such as ``net:switch:lan``; asks for ``backend open`` first. With
        security checkers a device gets something that stands before it, and that refuses its methods while this is
        revoked; a back end that is being opened gets the thing itself.
        """

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> list[SharedRange]:
        """The RAM as it shows now, whose file descriptors another process may be given: asks for ``memory share``."""

    def provide(self, name: str, service: Any, /) -> None:
        """Let other cards find *service* as ``machine.services[name]`` until the device is unplugged.

        ``balloon`` is a :class:`~cardcage.memory.MemoryBalloon`. Raises ConfigError when the machine has one.
        """


class Plugged(Protocol):
    """A device of the machine as a platform card sees it; ``slot`` has its ``ranges`` and ``interrupts``."""

    @property
    def id(self) -> str: ...

    @property
    def type(self) -> str: ...

    @property
    def device(self) -> Any: ...

    @property
    def slot(self) -> Any: ...


class Controllers(Protocol):
    """Where interrupt controllers join the lines, unless the irqchip is ``full``. Under the machine's lock."""

    def add_controller(self, set_irq: Callable[[int, bool], None], /) -> None:
        """``set_irq(gsi, level)`` is called at each change of a line."""

    def set_extint_source(self, acknowledge: Callable[[], int | None], /) -> None:
        """``acknowledge()`` is the INTA cycle; it returns the vector, or None when there is none."""

    def set_extint(self, level: bool, /) -> None:
        """Drive the INTR input of the boot processor (an 8259's output)."""

    def add_eoi_listener(self, listener: Callable[[int], None], /) -> None:
        """``listener(vector)`` is called at each EOI broadcast of a local APIC (irqchip ``split``)."""


class Board(Protocol):
    """The machine's board, for platform cards."""

    @property
    def devices(self) -> Mapping[str, Plugged]:
        """The devices that are plugged in so far, by id."""

    @property
    def lines(self) -> Sequence[Line]:
        """The interrupt lines, by global system interrupt."""

    @property
    def controllers(self) -> Controllers:
        """Where interrupt controllers join."""

    @property
    def memory(self) -> PhysicalMemory:
        """The physical address space."""

    def change_memory(self, add: tuple[RamRange, ...] = (), remove: tuple[RamRange, ...] = ()) -> None:
        """Change which RAM shows where (PAM, ROM) before the next instruction. Raises Denied."""

    def unplug(self, id: str, /) -> None:
        """Take device *id* out, and what it carries: the guest let go of it. Under the lock. Raises Denied."""


class Slot(Protocol):
    """A plugged-in device's hold on its machine. Valid until ``unplug``.

    A device with one line needs ``slot.interrupts.line()``; one with DMA ``slot.memory``; the other parts when it has
    use for them.
    """

    @property
    def id(self) -> str:
        """The device's id in its machine."""

    @property
    def label(self) -> str:
        """The device's security label."""

    @property
    def machine(self) -> str:
        """The machine's name."""

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""

    @property
    def clock(self) -> Clock:
        """Guest time."""

    @property
    def log(self) -> Any:
        """A logger with bound values: ``slot.log.warning("ring index out of range", queue=1)``."""

    @property
    def interrupts(self) -> Interrupts: ...

    @property
    def ranges(self) -> Ranges: ...

    @property
    def loop(self) -> Loop: ...

    @property
    def power(self) -> Power: ...

    @property
    def host(self) -> HostSide: ...

    @property
    def board(self) -> Board:
        """The board, for platform cards: asks for ``management reach``. Raises Denied."""


@frozen
class RamSpan:
    """Where a part of the machine's RAM shows.

    Attributes:
        address: guest-physical. size: bytes. offset: of the part in RAM. All whole pages of 4 KiB.
    """

    address: int
    size: int
    offset: int


class Platform(Protocol):
    """A platform card's factory product: what a machine of this kind has when the configuration does not say."""

    reserved: Sequence[tuple[int, int]]
    """``(address, size)`` of ranges that a boot's memory map never shows as free RAM."""

    def devices(self, config: Config, /) -> list[dict[str, Any]]:
        """Device tables, as a configuration's ``[[device]]``."""

    def ram(self, size: int, /) -> Sequence[RamSpan]:
        """Where *size* bytes of RAM show."""

"""The description of a PCI function: the protocol between ``pci-host`` and the devices on it.

A device with ``bus="pci"`` is any object with an attribute ``pci``: a mapping with the keys of :class:`FunctionSpec`
(so that a card need not import this package), or a :class:`FunctionSpec`. ``bars`` and ``capabilities`` are sequences
of mappings with the keys of :class:`Bar` and :class:`Capability`::

    class Timer:
        pci = {"vendor": 0x1AF4, "device": 0x10F0, "class_code": 0x080300, "pin": 1,
               "bars": [{"index": 0, "size": 4096}], "msix": 2}

        def plug_pci(self, function): self.function = function
        def read(self, offset, size): ...
        def write(self, offset, size, value): ...   # self.function.notify(0)

What else the device may have is told by the protocols below: each is looked for by name and signature when the device
is attached.

The configuration key ``address`` is ``"SLOT"`` or ``"SLOT.FUNCTION"``, hexadecimal as ``lspci`` prints it
(``"1f.3"``); without it the first free slot from 2 is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, fields
from attrs.validators import ge, in_, le
from cardcage.errors import CardError
from cardcage.values import frozen

if TYPE_CHECKING:
    from cardcage_pci.function import Function

__all__ = [
    "OPTIONAL",
    "Bar",
    "BarWatcher",
    "Capability",
    "ConfigReader",
    "ConfigWatcher",
    "FunctionSpec",
    "HotplugController",
    "PciPluggable",
    "structure",
]


class PciPluggable(Protocol):
    """Wants its function."""

    def plug_pci(self, function: Function, /) -> None:
        """*function* has ``notify(vector)`` (MSI-X, MSI), ``intx(level)``, ``config`` (a bytearray, the configuration
        space) and ``mappings`` (BAR index to mapping)."""


class ConfigReader(Protocol):
    """Answers reads of configuration space."""

    def config_read(self, offset: int, size: int, /) -> int | None:
        """``None`` leaves it to the stored bytes."""


class ConfigWatcher(Protocol):
    """Acts on what is in configuration space: PAM registers, SMRAM."""

    def config_written(self, offset: int, size: int, /) -> None:
        """The guest wrote these bytes, already stored through the write masks."""


class BarWatcher(Protocol):
    """Acts on where its BARs answer."""

    def bars_moved(self) -> None:
        """BARs were decoded, moved or switched off: ``function.mappings[index].address`` says where they are now."""


class HotplugController(Protocol):
    """On the bus, but no function of it: tells the guest of devices that come and go (ACPI, or another way)."""

    slots: Iterable[int]
    """The slots whose devices may come and go."""

    def plug_bus(self, bus: Any, /) -> None:
        """*bus* has ``occupants(slot)``, the ids of the devices in a slot, and ``removable(slot)``. When the guest has
        let go of a slot, or ejects it of its own accord, the controller gives each of them to ``Board.unplug``."""

    def arrived(self, slot: int, /) -> None:
        """A device was plugged into *slot* while the guest runs."""

    def leaving(self, slot: int, /) -> None:
        """The guest is to let go of the device in *slot*."""

    def emptied(self, slot: int, /) -> None:
        """*slot* is empty now."""


OPTIONAL: tuple[Any, ...] = (PciPluggable, ConfigReader, ConfigWatcher, BarWatcher)
"""Protocols that are looked for in a device on the bus."""


def _power(instance: Any, attribute: Any, value: int) -> None:
    if value < 4 or value & (value - 1):
        raise ValueError(f"{attribute.name} {value} is not a power of two from 4 up")


@frozen
class Bar:
    """A base address register (PCI 3.0, 6.2.5).

    Attributes:
        index: 0 to 5; a ``memory64`` BAR takes the next index too.
        size: bytes, a power of two; memory at least 16, I/O 4 to 256.
        kind: ``"memory"``, ``"memory64"`` or ``"io"``.
        prefetch: reads have no side effects.
        name: for listings. read, write: names of the device's methods that serve it (offsets are inside the BAR).
    """

    index: int = field(validator=[ge(0), le(5)])
    size: int = field(validator=_power)
    kind: str = field(default="memory", validator=in_(("memory", "memory64", "io")))
    prefetch: bool = False
    name: str = ""
    read: str = "read"
    write: str = "write"


@frozen
class Capability:
    """An entry of the capability list (PCI 3.0, 6.7).

    Attributes:
        id: capability id, 8 bits.
        data: bytes after the id and next pointers.
        mask: which bits of *data* the guest may write; shorter than *data* means zeros after it.
    """

    id: int = field(validator=[ge(1), le(255)])
    data: bytes = b""
    mask: bytes = b""


@frozen
class FunctionSpec:
    """A function with a type 0 header (PCI 3.0, 6.1).

    Attributes:
        vendor, device, subsystem_vendor, subsystem: 16-bit ids. revision: 8 bits.
        class_code: base class, subclass and programming interface, 24 bits.
        pin: 1 to 4 for INTA to INTD, 0 for none.
        bars: base address registers. capabilities: in list order.
        msi: vectors, 0 or a power of two up to 32. msix: vectors, 0 to 2048.
        msix_bar: BAR that is made for the MSI-X table when *msix* is not 0.
        multifunction: header type bit 7.
        config: offset to initial bytes, for what has no field here.
        writable: offset to write mask.
    """

    vendor: int = field(validator=[ge(0), le(0xFFFE)])
    device: int = field(validator=[ge(0), le(0xFFFF)])
    class_code: int = field(default=0xFF0000, validator=[ge(0), le(0xFFFFFF)])
    revision: int = field(default=0, validator=[ge(0), le(255)])
    subsystem_vendor: int = field(default=0, validator=[ge(0), le(0xFFFF)])
    subsystem: int = field(default=0, validator=[ge(0), le(0xFFFF)])
    pin: int = field(default=0, validator=[ge(0), le(4)])
    bars: tuple[Bar, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    msi: int = field(default=0, validator=in_((0, 1, 2, 4, 8, 16, 32)))
    msix: int = field(default=0, validator=[ge(0), le(2048)])
    msix_bar: int = field(default=1, validator=[ge(0), le(5)])
    multifunction: bool = False
    config: Mapping[int, bytes] = field(factory=dict)
    writable: Mapping[int, bytes] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        taken: set[int] = set()
        bars = [(bar.index, bar.kind, bar.size) for bar in self.bars] + [(self.msix_bar, "memory", 4096)] * bool(
            self.msix
        )
        for index, kind, size in bars:
            used = {index, index + 1} if kind == "memory64" else {index}
            if used & taken or max(used) > 5:
                raise ValueError(f"BAR {index} does not fit or is taken")
            if (kind == "io" and size > 256) or (kind != "io" and size < 16):
                raise ValueError(f"BAR {index}: {size} bytes is not a valid size for {kind}")
            if kind == "memory" and size > 1 << 31:
                raise ValueError(f"BAR {index}: {size} bytes need memory64")
            taken |= used


def _make(cls: Any, value: Any, who: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise CardError(f"{who}: pci: expected a mapping or {cls.__name__}, got {type(value).__name__}")
    known = {one.name for one in fields(cls)}
    if unknown := set(value) - known:
        raise CardError(
            f"{who}: pci: no key {sorted(unknown)[0]!r} in {cls.__name__} (known: {', '.join(sorted(known))})"
        )
    try:
        return cls(**value)
    except (TypeError, ValueError) as error:
        raise CardError(f"{who}: pci: {cls.__name__}: {error}") from error


def structure(value: Any, who: str) -> FunctionSpec:
    """Turn a device's ``pci`` attribute into a spec. Raises CardError that names *who* and the key at fault."""
    if isinstance(value, Mapping):
        value = dict(value)
        value["bars"] = tuple(_make(Bar, one, who) for one in value.get("bars", ()))
        value["capabilities"] = tuple(_make(Capability, one, who) for one in value.get("capabilities", ()))
    spec: FunctionSpec = _make(FunctionSpec, value, who)
    return spec

"""The PCI host bridge: configuration mechanism #1, ECAM, and the bus that carries functions.

For the platform's ACPI the bridge states, as plain data:

- ``ecam``: ``(base, size)`` of the enhanced configuration region, bus 0 only, or ``None`` (MCFG);
- ``windows``: ``(kind, base, size)`` with kind ``"io"``, ``"memory"`` or ``"memory64"`` (_CRS of PNP0A03/PNP0A08);
- ``routing``: ``(slot, pin, gsi)`` with pin 0 to 3 for INTA to INTD (_PRT), level-triggered.

It has no identity of its own: function 00.0 is a device as any other (``address = "00.0"``), given by the platform.
Port 0xCF9 (reset control) lies inside the address register's doubleword and is served here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field
from attrs.validators import deep_iterable, ge, instance_of, le, max_len, min_len
from cardcage.abilities import has, tell_near_misses
from cardcage.device import Mmio
from cardcage.errors import CardError, ConfigError
from cardcage.values import define, frozen

from cardcage_pci.coming import ComingAndGoing
from cardcage_pci.function import Function, FunctionState
from cardcage_pci.spec import OPTIONAL, HotplugController, PciPluggable, structure

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["PciHost", "PciHostOptions", "PciHostState"]

WINDOWS = (
    ("io", 0, 0xCF8),
    ("io", 0xD00, 0xF300),
    ("memory", 0xE0100000, 0xFEC00000 - 0xE0100000),
    ("memory64", 0x4000000000, 0x1000000000),
)
ECAM_SIZE = 1 << 20
FIRST = {"io": 0xC000, "memory": 0xE1000000, "memory64": WINDOWS[3][1]}
"""Where BARs are put from, by area."""


@frozen
class PciHostOptions:
    """Options of ``pci-host``.

    Attributes:
        ecam: base of the enhanced configuration region (1 MiB), 0 for none.
        pirqs: global system interrupts of the four interrupt links. The default is what PC firmware expects, and works
            with the 8259 as well as with the IOAPIC.
    """

    ecam: int = 0xE0000000
    pirqs: tuple[int, ...] = field(
        default=(10, 10, 11, 11),
        validator=[min_len(4), max_len(4), deep_iterable([instance_of(int), ge(0), le(23)])],
    )


@define
class PciHostState:
    """Saved state: the address register, each function by address, and port 0xCF9."""

    version: ClassVar[int] = 1
    address: int = 0
    functions: dict[int, FunctionState] = field(factory=dict)
    reset_control: int = 0


class PciHost(ComingAndGoing):
    """The bridge as a device of the machine, and the ``pci`` device bus."""

    bus_type = "pci"

    def __init__(self, options: PciHostOptions | None = None) -> None:
        self.options = options or PciHostOptions()
        if self.options.ecam % ECAM_SIZE:
            raise ConfigError(f"ecam {self.options.ecam:#x}: expected a multiple of 1 MiB")
        self.functions: dict[int, Function] = {}
        self.windows = WINDOWS
        self.ecam = (self.options.ecam, ECAM_SIZE) if self.options.ecam else None
        self.routing = tuple((slot, pin, self.gsi(slot, pin)) for slot in range(32) for pin in range(4))
        self._address, self._reset_control = 0, 0
        self._presets: dict[int, list[tuple[str, int, int]]] = {}
        self._controller = None
        self._homeless: set[int] = set()
        self._slot: Slot | None = None

    def gsi(self, slot: int, pin: int) -> int:
        """The line of INT*pin* (0 to 3) of *slot*: the swizzle that SeaBIOS and Linux assume for the PIIX3."""
        return self.options.pirqs[(slot + pin - 1) & 3]

    def plug(self, slot: Slot) -> None:
        self._slot = slot
        if self.ecam is not None:
            region = Mmio(self.ecam[1], None, "pci-ecam", "read_ecam", "write_ecam")
            slot.ranges.mmio(region, self.ecam[0], self)

    # the bus

    def attach(self, device: Any, slot: Slot, address: str | None, /) -> None:
        """Give *device* its function. Raises CardError for a bad statement, ConfigError for a bad or taken address."""
        if has(device, HotplugController, slot.id):
            if self._controller is not None:
                raise ConfigError(f"{slot.id}: the PCI bus has a hot-plug controller already")
            self._controller = device
            device.plug_bus(self)
            return
        stated = getattr(device, "pci", None)
        if stated is None:
            raise CardError(f"{slot.id}: a device on the pci bus must have an attribute `pci`, see cardcage_pci.spec")
        spec = structure(stated, slot.id)
        where = self._choose(address)
        gsi = self.gsi(where >> 3, spec.pin - 1) if spec.pin else 0
        function = Function(spec, device, slot, where, slot.interrupts.line(gsi) if spec.pin else None, gsi)
        presets = self._presets[where] = []
        for index, bar in sorted(function.bars.items(), key=lambda one: -one[1].size):
            presets.append(self._allocate(bar.kind, max(bar.size, 4096 if bar.kind != "io" else 4)))
            function.preset_bar(index, presets[-1][1])
        self.functions[where] = function
        if where & 7:  # PCI 3.0, 6.2.1: software looks at other functions only when function 0 says so
            for other in range(where & ~7, where & ~7 | 8):
                if other in self.functions:
                    self.functions[other].set_multifunction()
        tell_near_misses(device, OPTIONAL, f'device "{slot.id}"', slot.log)
        if has(device, PciPluggable, slot.id):
            device.plug_pci(function)

    def _choose(self, address: str | None) -> int:
        if address is None:
            for slot in range(2, 32):
                if not any(slot << 3 | function in self.functions for function in range(8)):
                    return slot << 3
            raise ConfigError("all 32 slots of the PCI bus are taken")
        slot_text, _, function_text = address.rpartition(":")[2].partition(".")
        try:
            slot, function = int(slot_text, 16), int(function_text or "0", 16)
        except ValueError:
            slot = -1
        if not (0 <= slot < 32 and 0 <= function < 8):
            raise ConfigError(f'address "{address}": expected SLOT.FUNCTION in hexadecimal, as "1f.0"', key="address")
        there = self.functions.get(slot << 3 | function)
        if there is not None:
            raise ConfigError(f'address "{address}" is taken by {there.slot.id}', key="address")
        return slot << 3 | function

    def _allocate(self, kind: str, size: int) -> tuple[str, int, int]:
        """The lowest free place for a BAR: its area, base and size. What a guest moved there is not in its way."""
        # a 64-bit BAR that is small stays below 4 GiB, where a 32-bit guest reaches it
        area = "memory" if kind == "memory64" and size < 1 << 24 else kind
        taken = [(at, length) for one in self._presets.values() for where, at, length in one if where == area]
        for function in self.functions.values():
            moved = ((one, function.mappings[index].address) for index, one in function.bars.items())
            taken += [(at, one.size) for one, at in moved if at is not None and (one.kind == "io") == (area == "io")]
        base = FIRST[area] + size - 1 & -size
        while blocks := [at + length for at, length in taken if at < base + size and base < at + length]:
            base = max(blocks) + size - 1 & -size
        if not any(one[0] == area and one[1] <= base and base + size <= one[1] + one[2] for one in WINDOWS):
            raise ConfigError(f"no room for a BAR of {size:#x} bytes in the {area} window of the PCI bus")
        return area, base, size

    def detach(self, device: Any, /) -> None:
        """Take *device* off the bus, if it is there."""
        if device is self._controller:
            self._controller = None
        for where, function in list(self.functions.items()):
            if function.device is device:
                function.close()
                del self.functions[where]
                self._homeless.discard(where)
                self._house()
                if self._controller is not None and not self.occupants(where >> 3):
                    self._controller.emptied(where >> 3)
        self._presets = {where: one for where, one in self._presets.items() if where in self.functions}

    # configuration space

    def config_read(self, where: int, offset: int, size: int) -> int:
        """Read configuration space of function *where* (slot * 8 + function), by bytes across doublewords."""
        function = self.functions.get(where)
        if function is None or offset + size > 256:
            return (1 << 8 * size) - 1
        if (offset & 3) + size > 4:
            return sum(function.read(offset + at, 1) << 8 * at for at in range(size))
        return function.read(offset, size)

    def config_write(self, where: int, offset: int, size: int, value: int) -> None:
        """Write configuration space; absent functions swallow it."""
        function = self.functions.get(where)
        if function is None or offset + size > 256:
            return
        if (offset & 3) + size > 4:
            for at in range(size):
                self.config_write(where, offset + at, 1, value >> 8 * at & 0xFF)
        elif function.write(offset, size, value):
            self._place(function)

    def _place(self, function: Function) -> None:
        if not function.place():
            self._homeless.add(function.address)
            return
        self._homeless.discard(function.address)
        self._house()

    def _house(self) -> None:
        """Room may have been made for a BAR that found none before."""
        self._homeless = {where for where in self._homeless if not self.functions[where].place()}

    def read_address(self, offset: int, size: int) -> int:
        if size == 4:
            return self._address
        if offset == 1 and size == 1:
            return self._reset_control
        return (1 << 8 * size) - 1

    def write_address(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self._address = value & 0x80FFFFFC
        elif offset == 1 and size == 1:
            rising = value & ~self._reset_control & 4
            self._reset_control = value & 0x0E
            if rising and self._slot is not None:
                self._slot.power.reset("port 0xCF9")

    def read_data(self, offset: int, size: int) -> int:
        if not self._address >> 31 or self._address >> 16 & 0xFF:
            return (1 << 8 * size) - 1
        return self.config_read(self._address >> 8 & 0xFF, (self._address & 0xFC) + offset, size)

    def write_data(self, offset: int, size: int, value: int) -> None:
        if self._address >> 31 and not self._address >> 16 & 0xFF:
            self.config_write(self._address >> 8 & 0xFF, (self._address & 0xFC) + offset, size, value)

    def read_ecam(self, offset: int, size: int) -> int:
        return self.config_read(offset >> 12 & 0xFF, offset & 0xFFF, size)

    def write_ecam(self, offset: int, size: int, value: int) -> None:
        self.config_write(offset >> 12 & 0xFF, offset & 0xFFF, size, value)

    # life cycle

    def reset(self) -> None:
        self._address, self._reset_control = 0, 0
        for function in self.functions.values():
            function.reset()
        self._homeless.clear()

    def save(self) -> PciHostState:
        return PciHostState(
            address=self._address,
            functions={where: one.save() for where, one in self.functions.items()},
            reset_control=self._reset_control,
        )

    def unchanged(self, state: PciHostState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        kept = state.functions
        if (self._address, self._reset_control) != (state.address, state.reset_control) or self._homeless:
            return False
        return kept.keys() == self.functions.keys() and all(
            one.unchanged(kept[where]) for where, one in self.functions.items()
        )

    def load(self, state: PciHostState, /) -> None:
        if set(state.functions) != set(self.functions):
            raise ConfigError("the saved PCI bus has different devices from this machine")
        self._address, self._reset_control = state.address, state.reset_control & 0x0E
        for where, one in state.functions.items():
            self.functions[where].load(one)
        # One may have found its place taken by another, which has its own only now; one saved without room waits.
        self._homeless = {where for where, one in self.functions.items() if not one.place()}

"""A PCI function on the bus: configuration space with write masks, BARs, INTx, MSI and MSI-X."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.abilities import calls
from cardcage.device import Mmio, Pio
from cardcage.errors import CardError, ConfigError, Denied
from cardcage.values import define

from cardcage_pci.msi import Msi, MsiX
from cardcage_pci.spec import OPTIONAL

if TYPE_CHECKING:
    from cardcage.device import RegionMapping, Slot
    from cardcage.interrupts import IrqLine

    from cardcage_pci.spec import Bar, FunctionSpec

__all__ = ["Function", "FunctionState"]

COMMAND, STATUS, BARS, CAPABILITIES, LINE, PIN = 0x04, 0x06, 0x10, 0x34, 0x3C, 0x3D
IO_DECODE, MEMORY_DECODE, INTX_DISABLE = 1, 2, 1 << 10
STATUS_INTX, STATUS_LIST = 1 << 3, 1 << 4
BAR_BITS = {"memory": 0, "memory64": 4, "io": 1}


@define
class FunctionState:
    """Saved state of a function: configuration space and the MSI-X table with its pending bits."""

    version: ClassVar[int] = 1
    config: bytes = b""
    table: bytes = b""
    pending: int = 0
    intx: bool = False


class Function:
    """A function as the guest sees it.

    Args:
        spec: what the device states. device: serves BARs and the opt-in methods of :mod:`cardcage_pci.spec`.
        slot: the device's slot. address: slot number times 8 plus function number.
        line: the interrupt line that its pin is wired to, ``None`` without a pin. gsi: that line's number.
    """

    def __init__(
        self, spec: FunctionSpec, device: Any, slot: Slot, address: int, line: IrqLine | None, gsi: int = 0
    ) -> None:
        self.spec, self.device, self.slot, self.address = spec, device, slot, address
        self.name = f"{slot.id} at {address >> 3:02x}.{address & 7}"
        self.config, self.mask, self.clear = bytearray(256), bytearray(256), bytearray(256)
        self._line, self._gsi, self._level, self._told = line, gsi, False, False
        found = calls(device, OPTIONAL, slot.id)
        self._read, self._written, self._moved = map(found.get, ("config_read", "config_written", "bars_moved"))
        self.mappings: dict[int, RegionMapping] = {}
        self._bars: dict[int, Bar] = {}
        self.capabilities: list[int] = []
        """Offsets of the spec's capabilities, in their order."""
        self.msi: Msi | None = None
        self.msix: MsiX | None = None
        self._free = 0x40
        self._header()
        for bar in spec.bars:
            self._add_bar(bar, device)
        for capability in spec.capabilities:
            self.capabilities.append(self.add_capability(capability.id, capability.data, capability.mask))
        if spec.msix:
            self.msix = MsiX(spec.msix, slot)
            self._add_bar(self.msix.bar(spec.msix_bar), self.msix)
            self.msix.offset = self.add_capability(0x11, self.msix.capability(spec.msix_bar), b"\0\xc0")
        if spec.msi:
            self.msi = Msi(spec.msi, slot, self.config)
            self.msi.offset = self.add_capability(0x05, *self.msi.capability())
        for at, data in spec.config.items():
            self._place(self.config, at, data)
        for at, data in spec.writable.items():
            self._place(self.mask, at, data)
        self._initial = bytes(self.config)

    def _place(self, into: bytearray, at: int, data: bytes) -> None:
        if at < 0 or at + len(data) > len(into):
            raise CardError(f"{self.name}: pci: {len(data)} bytes at {at:#x} leave the configuration space")
        into[at : at + len(data)] = data

    def _header(self) -> None:
        spec, config = self.spec, self.config
        struct.pack_into("<HHHHI", config, 0, spec.vendor, spec.device, 0, 0, spec.class_code << 8 | spec.revision)
        config[0x0E] = 0x80 if spec.multifunction else 0
        struct.pack_into("<HH", config, 0x2C, spec.subsystem_vendor, spec.subsystem)
        config[PIN], config[LINE] = spec.pin, self._gsi if spec.pin else 0
        self.mask[0x0C], self.mask[LINE] = 0xFF, 0xFF
        struct.pack_into("<H", self.mask, COMMAND, 0x0547)  # I/O, memory, master, parity, SERR#, INTx disable
        struct.pack_into("<H", self.clear, STATUS, 0xF900)

    def _add_bar(self, bar: Bar, device: Any) -> None:
        at, bits = BARS + 4 * bar.index, BAR_BITS[bar.kind] | (8 if bar.prefetch else 0)
        struct.pack_into("<I", self.config, at, bits)
        struct.pack_into("<I", self.mask, at, -bar.size & 0xFFFFFFFF & ~(3 if bar.kind == "io" else 15))
        if bar.kind == "memory64":
            struct.pack_into("<I", self.mask, at + 4, (-bar.size >> 32) & 0xFFFFFFFF)
        self._bars[bar.index] = bar
        name = f"{self.slot.id} BAR {bar.index}"
        ranges, names = self.slot.ranges, (name, bar.read, bar.write)
        if bar.kind == "io":
            self.mappings[bar.index] = ranges.pio(Pio(bar.size, None, *names), None, device)
        else:
            self.mappings[bar.index] = ranges.mmio(Mmio(bar.size, None, *names), None, device)

    def add_capability(self, id: int, data: bytes, mask: bytes = b"") -> int:
        """Append to the capability list; returns its offset. Raises CardError when the 256 bytes are full."""
        at = self._free
        self._place(self.config, at, bytes((id, 0)) + data)
        self.mask[at + 2 : at + 2 + len(mask)] = mask
        link = CAPABILITIES
        while self.config[link]:
            link = self.config[link] + 1
        self.config[link] = at
        self.config[STATUS] |= STATUS_LIST
        self._free = (at + 2 + len(data) + 3) & ~3
        return at

    def set_multifunction(self) -> None:
        """Say in the header that the slot holds more than one function."""
        self.config[0x0E] |= 0x80
        self._initial = self._initial[:0x0E] + bytes((self._initial[0x0E] | 0x80,)) + self._initial[0x0F:]

    # BARs

    @property
    def bars(self) -> dict[int, Bar]:
        """BARs by index, including MSI-X's."""
        return self._bars

    def bar_address(self, index: int) -> int:
        """The address in the BAR's register, decoded or not."""
        bar, at = self._bars[index], BARS + 4 * index
        if bar.kind == "io":
            return int.from_bytes(self.config[at : at + 4], "little") & 0xFFFC
        return int.from_bytes(self.config[at : at + (8 if bar.kind == "memory64" else 4)], "little") & ~15

    def preset_bar(self, index: int, address: int) -> None:
        """Give the BAR the address it has after reset, as firmware would; it is not decoded yet."""
        bar, at = self._bars[index], BARS + 4 * index
        size = 8 if bar.kind == "memory64" else 4
        value = int.from_bytes(self.config[at : at + size], "little") | address
        self.config[at : at + size] = value.to_bytes(size, "little")
        self._initial = bytes(self.config)

    def place(self) -> bool:
        """Let the BARs answer where the registers say; returns whether each found room.

        A BAR of 0 (or of all ones, while the guest asks for its size) answers nowhere.
        """
        command, ok, moved = self.config[COMMAND], True, False
        for index, bar in self._bars.items():
            address = self.bar_address(index)
            enabled = command & (IO_DECODE if bar.kind == "io" else MEMORY_DECODE)
            limit = {"io": 1 << 16, "memory": 1 << 32, "memory64": 1 << 52}[bar.kind]
            inside = address > 0 and address + bar.size < limit
            target, mapping = address if enabled and inside else None, self.mappings[index]
            if mapping.address == target:
                continue
            moved = True
            try:
                mapping.move(None)
                mapping.move(target)
            except (ConfigError, Denied) as error:
                ok = False
                self.slot.log.warning("BAR has no room", bar=index, address=hex(address), problem=str(error))
        if moved and self._moved is not None:
            self._moved()
        return ok

    # configuration space

    def read(self, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes inside one doubleword."""
        if self._read is not None:
            answer: int | None = self._read(offset, size)
            if answer is not None:
                return answer if not answer >> 8 * size else self._misread(answer, offset, size)
        return int.from_bytes(self.config[offset : offset + size], "little")

    def _misread(self, answer: int, offset: int, size: int) -> int:
        """The lowest bytes of what does not fit, which would else be read as its neighbours; said once."""
        most = (1 << 8 * size) - 1
        if not self._told:
            self._told = True
            code = getattr(self._read, "__code__", None)
            at = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else type(self.device).__qualname__
            why = f"config_read({offset:#x}, {size}) gave more or less than 0 to {most:#x}"
            self.slot.log.warning("card's read gave what does not fit", at=at, why=why)
        return answer & most

    def write(self, offset: int, size: int, value: int) -> bool:
        """Write 1, 2 or 4 bytes inside one doubleword; returns whether BARs may have moved."""
        config = self.config
        for at in range(offset, offset + size):
            byte = value & 0xFF
            value >>= 8
            config[at] = ((config[at] & ~self.mask[at]) | (byte & self.mask[at])) & ~(byte & self.clear[at])
        end = offset + size
        moved = (offset < COMMAND + 2 and end > COMMAND) or (offset < 0x28 and end > BARS)
        if self.msix is not None:
            at = self.msix.offset
            if offset < at + 4 and end > at:
                self.msix.control(int.from_bytes(config[at + 2 : at + 4], "little"))
                self._drive()
        if self.msi is not None and offset < self.msi.offset + 24 and end > self.msi.offset:
            self.msi.changed()
            self._drive()
        if moved:
            self._drive()
        if self._written is not None:
            self._written(offset, size)
        return moved

    # interrupts

    @property
    def messages(self) -> bool:
        """True if the guest switched MSI-X or MSI on: then INTx is silent."""
        return (self.msix is not None and self.msix.enabled) or (self.msi is not None and self.msi.enabled)

    def notify(self, vector: int) -> None:
        """Send message *vector* of MSI-X, else of MSI; lost when neither is on. Thread-safe."""
        if self.msix is not None and self.msix.enabled:
            self.msix.notify(vector)
        elif self.msi is not None and self.msi.enabled:
            self.msi.notify(vector)

    def intx(self, level: bool) -> None:
        """Drive the interrupt pin (under the machine's lock)."""
        self._level = level
        self._drive()

    def _drive(self) -> None:
        self.config[STATUS] = self.config[STATUS] & ~STATUS_INTX | (STATUS_INTX if self._level else 0)
        if self._line is not None:
            off = self.config[COMMAND + 1] << 8 & INTX_DISABLE or self.messages
            self._line.set(self._level and not off)

    # life cycle

    def reset(self) -> None:
        """The state after RST#: BARs undecoded at their preset addresses, messages off, pin low."""
        self.config[:] = self._initial
        self._level = False
        if self.msix is not None:
            self.msix.reset()
        self.place()
        self._drive()

    def close(self) -> None:
        """Off the bus: nothing answers, no line is driven and no eventfd raises a vector any more."""
        for mapping in self.mappings.values():
            mapping.move(None)
        self.intx(False)
        if self.msix is not None:
            self.msix.close()

    def save(self) -> FunctionState:
        table, pending = (bytes(self.msix.table), self.msix.pending) if self.msix else (b"", 0)
        return FunctionState(config=bytes(self.config), table=table, pending=pending, intx=self._level)

    def unchanged(self, state: FunctionState) -> bool:
        """True where :meth:`load` would change nothing."""
        msix = self.msix
        if self.config != state.config or self._level != state.intx:
            return False
        return msix is None or (msix.pending == state.pending and msix.table == state.table)

    def load(self, state: FunctionState) -> None:
        if len(state.config) != len(self.config) or (self.msix and len(state.table) != len(self.msix.table)):
            raise ConfigError(f"{self.name}: the saved state belongs to another kind of device")
        self.config[:] = state.config
        self._level = state.intx
        if self.msix is not None:
            at = self.msix.offset
            self.msix.load(state.table, state.pending, int.from_bytes(self.config[at + 2 : at + 4], "little"))
        self.place()
        self._drive()

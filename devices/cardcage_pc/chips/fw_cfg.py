"""fw_cfg: named files and numbered items that firmware and guests read (QEMU ``docs/specs/fw_cfg.rst``).

Selector at port 0x510, data at 0x511, DMA at 0x514 (big-endian). Items are read-only for the guest.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, ClassVar

from attrs import field
from attrs.validators import deep_mapping, ge, instance_of, le, max_len, optional
from cardcage.config import HostPath
from cardcage.device import Resource
from cardcage.errors import ConfigError
from cardcage.files import read_file
from cardcage.memory import GuestMemoryError
from cardcage.values import define, frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.boot import BootContext
    from cardcage.device import Slot

__all__ = ["FwCfg", "FwCfgOptions", "FwCfgState"]

SIGNATURE, ID, RAM_SIZE, CPUS, BOOT_MENU, MAX_CPUS, DIRECTORY, FIRST_FILE = 0, 1, 3, 5, 14, 15, 0x19, 0x20
DMA, DMA_SIGNATURE = 4, b"QEMU CFG"
MOST = 256 << 20
"""Bytes of a file that the guest is given."""
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16


@frozen
class FwCfgOptions:
    """Options of ``fw_cfg``.

    Attributes:
        boot_menu: firmware offers its boot menu.
        boot_menu_wait: milliseconds that it waits for the key, 0 to 65535; None leaves it to the firmware.
        serial_console: port of the UART that firmware uses as its screen and keyboard, 0 for none.
        files: further files by name, as text. ``opt/ORG/NAME`` are the user's to choose.
        paths: further files by name, read from these files of the host.
    """

    boot_menu: bool = True
    boot_menu_wait: int | None = field(default=None, validator=optional([ge(0), le(0xFFFF)]))
    serial_console: int = field(default=0x3F8, validator=[ge(0), le(0xFFFF)])
    files: dict[str, str] = field(factory=dict, validator=deep_mapping(max_len(55), instance_of(str)))
    paths: dict[str, HostPath] = field(factory=dict, validator=deep_mapping(max_len(55), instance_of(str)))


@define
class FwCfgState:
    """The selected file, how far it has been read, and the DMA address's upper half."""

    version: ClassVar[int] = 1
    selected: int = 0
    offset: int = 0
    dma_high: int = 0


class FwCfg:
    """Items by key, files by name (keys from 0x20 in order of name)."""

    def __init__(self, options: FwCfgOptions) -> None:
        self.options, self.state = options, FwCfgState()
        self.items = {SIGNATURE: b"QEMU", ID: struct.pack("<I", 3)}
        self.files: dict[str, bytes] = {}
        self._again: dict[str, Callable[[], bytes] | None] = {}
        self._map: list[tuple[int, int, int]] = []
        self._reserved: tuple[tuple[int, int], ...] = ()
        if options.serial_console:
            self.files["etc/sercon-port"] = struct.pack("<Q", options.serial_console)
        self.items[BOOT_MENU] = struct.pack("<H", options.boot_menu)
        if options.boot_menu_wait is not None:
            self.files["etc/boot-menu-wait"] = struct.pack("<H", options.boot_menu_wait)
        for name, text in options.files.items():
            self.files[name] = text.encode()
        self._list()

    def plug(self, slot: Slot, /) -> None:
        for name, path in self.options.paths.items():
            slot.host.ask("image", path, ("open", "read"), readonly=True)
            try:
                self.set_file(name, read_file(path, MOST))
            except ConfigError as error:
                raise ConfigError(str(error), key=f"paths.{name}") from error
        self._memory, self._log = slot.memory, slot.log
        slot.ranges.announce(Resource(hid="QEMU0002", name="FWCF"))

    def reset(self) -> None:
        self.state = FwCfgState()

    def save(self) -> FwCfgState:
        return FwCfgState(self.state.selected, self.state.offset, self.state.dma_high)

    def unchanged(self, state: FwCfgState, /) -> bool:
        """True where :meth:`load` would change nothing."""
        return self.state == state

    def load(self, state: FwCfgState, /) -> None:
        self.state = FwCfgState(state.selected, state.offset, state.dma_high)

    def set_file(self, name: str, data: bytes, again: Callable[[], bytes] | None = None) -> None:
        """Add or replace a file; *name* is at most 55 ASCII characters.

        *again* gives as many bytes, which take its place each time that the guest begins to read it.
        """
        self.files[name] = data
        self._again[name] = again
        self._list()

    def _list(self) -> None:
        names = sorted(self.files)
        entries = [
            struct.pack(">IHH56s", len(self.files[name]), FIRST_FILE + at, 0, name.encode("ascii", "replace"))
            for at, name in enumerate(names)
        ]
        self.items[DIRECTORY] = struct.pack(">I", len(names)) + b"".join(entries)
        for at, name in enumerate(names):
            self.items[FIRST_FILE + at] = self.files[name]

    def contribute(self, context: BootContext, /) -> None:
        """Tell firmware the machine's memory and processors."""
        low, high = context.ram_below_4g, context.ram_above_4g
        self.items[RAM_SIZE] = struct.pack("<Q", low + high)
        self.items[CPUS] = self.items[MAX_CPUS] = struct.pack("<H", context.cpus)
        self._map = [(0, low, 1)] + ([(1 << 32, high, 1)] if high else [])
        self.reserve(*self._reserved)

    def reserve(self, *ranges: tuple[int, int]) -> None:
        """Mark *ranges*, (address, size), in the memory map that firmware gets, besides the RAM."""
        self._reserved = ranges
        entries = [*self._map, *((address, size, 2) for address, size in ranges)]
        self.set_file("etc/e820", b"".join(struct.pack("<QQI", *one) for one in entries))

    # ports

    def read(self, offset: int, size: int, /) -> int:
        """Data port: bytes one after another, zeros past the end. The selector cannot be read back."""
        if offset >= DMA:
            return int.from_bytes(DMA_SIGNATURE[offset - DMA : offset - DMA + size], "little")
        return int.from_bytes(self._take(size), "little") if offset == 1 else 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        if offset == 0 and size <= 2:
            self.state.selected, self.state.offset = value & 0xFFFF, 0
            name = dict(enumerate(sorted(self.files), FIRST_FILE)).get(self.state.selected, "")
            if (again := self._again.get(name)) is not None:
                self.items[self.state.selected] = self.files[name] = again()
        elif offset >= DMA:
            self._write_dma(offset - DMA, size, value)

    def _take(self, size: int) -> bytes:
        state, item = self.state, self.items.get(self.state.selected, b"")
        taken = item[state.offset : state.offset + size]
        state.offset = min(state.offset + size, len(item))
        return taken

    def _write_dma(self, offset: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")
        if size == 8 and offset == 0:
            self._transfer(int.from_bytes(data, "big"))
        elif size == 4 and offset == 0:
            self.state.dma_high = int.from_bytes(data, "big")
        elif size == 4 and offset == 4:
            address = self.state.dma_high << 32 | int.from_bytes(data, "big")
            self.state.dma_high = 0
            self._transfer(address)

    def _transfer(self, where: int) -> None:
        """Carry out the command at guest address *where*: control, length, address, all big-endian."""
        try:
            control, length, address = struct.unpack(">IIQ", self._memory.read(where, 16))
        except GuestMemoryError as error:
            self._log.warning("fw_cfg: no DMA command there", problem=str(error))
            return
        if control & SELECT:
            self.write(0, 2, control >> 16)
        failed = False
        if control & READ:
            failed = not self._copy(address, length)
        elif control & WRITE:
            failed = True
        elif control & SKIP:
            self.state.offset = min(self.state.offset + length, len(self.items.get(self.state.selected, b"")))
        self._memory.write(where, struct.pack(">I", ERROR if failed else 0))

    def _copy(self, address: int, length: int) -> bool:
        """Copy *length* bytes of the item to the guest, zeros past its end; False for what is not RAM."""
        try:
            data = self._take(length)
            self._memory.write(address, data)
            address, left = address + len(data), length - len(data)
            while left:  # in pieces: a guest may ask for 4 GiB of zeros
                piece = min(left, 1 << 16)
                self._memory.write(address, bytes(piece))
                address, left = address + piece, left - piece
        except GuestMemoryError as error:
            self._log.warning("fw_cfg: DMA outside RAM", problem=str(error))
            return False
        return True

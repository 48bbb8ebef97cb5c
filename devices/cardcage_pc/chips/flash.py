"""Parallel flash as QEMU's ``pflash_cfi01`` (Intel command set, JEDEC CFI, eight bits wide): UEFI firmware keeps its
variables in it.

In its reading mode the flash shows as read-only memory, so that guests read it at full speed; their writes arrive here
as commands. In any other mode reads arrive, too. What is programmed or erased is in the file at once.

A byte that is programmed replaces what was there, as in QEMU: it does not need to be erased first.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, ClassVar

from attrs import field
from cardcage.config import HostPath
from cardcage.device import Mmio
from cardcage.errors import ConfigError
from cardcage.memory import PAGE, RamBlock, RamRange
from cardcage.values import define, frozen

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["Flash", "FlashOptions", "FlashState"]

TOP, LARGEST, SECTOR, BUFFER, PRIORITY = 1 << 32, 16 << 20, 4096, 2048, 10
READY, ERASE_ERROR, PROGRAM_ERROR = 0x80, 0x20, 0x10
ARRAY, PROGRAM, ERASE, CLEAR, LOCK, STATUS, IDENTITY, QUERY, BUFFERED = (
    0xFF,
    0x10,
    0x20,
    0x50,
    0x60,
    0x70,
    0x90,
    0x98,
    0xE8,
)
CONFIRM = 0xD0
MAKER, MODEL = 0x89, 0x18


@frozen
class FlashOptions:
    """Options of ``pflash``.

    Attributes:
        file: what it holds: whole pages of 4 KiB, at most 16 MiB.
        below: a firmware ROM that ends at 4 GiB; the flash ends where that begins. Without one it ends at 4 GiB itself.
        readonly: programming and erasing fail, and the file is left alone.
    """

    file: HostPath
    below: HostPath | None = None
    readonly: bool = False


@define
class FlashState:
    """An act that was begun: the command, writes that it still takes, and the status. The contents are in the file."""

    version: ClassVar[int] = 1
    command: int = ARRAY
    left: int = 0
    status: int = READY
    pending: dict[int, int] = field(factory=dict)
    """Bytes of a buffered write that is not confirmed yet, by offset."""


class Flash:
    """One chip. Sectors of 4 KiB; the first write of a command says which, as on an Intel chip."""

    def __init__(self, options: FlashOptions) -> None:
        self.options, self.state = options, FlashState()
        self._shown = False

    def plug(self, slot: Slot, /) -> None:
        """Open the file, and show it. Raises ConfigError that names it."""
        self._log = slot.log
        self._file = self._open(slot)
        try:
            size = os.fstat(self._file).st_size
            if size % PAGE or not PAGE <= size <= LARGEST:
                raise ConfigError(
                    f"{self.options.file}: {size} bytes: expected flash of 4 KiB to 16 MiB in whole pages"
                )
            self._base = self._end(slot) - size
            self._block = RamBlock(size, "flash")
        except BaseException:
            os.close(self._file)
            raise
        os.preadv(self._file, [self._block.view], 0)
        self._range = RamRange(self._base, size, self._block, 0, True, PRIORITY)
        slot.ranges.mmio(Mmio(size, None, "array"), self._base, self)
        self._board = slot.board
        self._show(True)

    def _open(self, slot: Slot) -> int:
        path, writes = self.options.file, not self.options.readonly
        slot.host.ask("image", path, ("open", "read", *["write"] * writes), readonly=not writes)
        try:
            fd = os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{path}: flash cannot be opened: {why}", key="file") from error
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if writes else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"{path}: flash is in use by another machine", key="file") from error
        return fd

    def _end(self, slot: Slot) -> int:
        """The address behind the flash."""
        if (below := self.options.below) is None:
            return TOP
        slot.host.ask("image", below, ("open", "read"), readonly=True)
        try:
            return TOP - os.stat(below).st_size
        except OSError as error:
            raise ConfigError(f"{below}: firmware ROM cannot be read: {error.strerror}", key="below") from error

    def unplug(self) -> None:
        self._show(False)
        os.close(self._file)

    def reset(self) -> None:
        self.load(FlashState())

    def save(self) -> FlashState:
        state = self.state
        return FlashState(state.command, state.left, state.status, dict(state.pending))

    def load(self, state: FlashState, /) -> None:
        size = len(self._block.view)
        pending = {
            at: value & 0xFF for at, value in state.pending.items() if -1 <= at < size
        }  # a file may say anything
        self.state = FlashState(state.command, max(0, min(state.left, BUFFER + 1)), state.status & 0xFF, pending)
        self._show(state.command == ARRAY)

    def _show(self, on: bool) -> None:
        """Show the array as memory, or have reads arrive here."""
        if on != self._shown:
            self._board.change_memory((self._range,) if on else (), () if on else (self._range,))
            self._shown = on

    # the guest's side

    def read(self, offset: int, size: int, /) -> int:
        return int.from_bytes(bytes(self._read(offset + at) for at in range(size)), "little")

    def _read(self, offset: int) -> int:
        match self.state.command:
            case 0xFF:
                return int(self._block.view[offset])
            case 0x90:
                return (MAKER, MODEL)[offset & 0xFF] if offset & 0xFF < 2 else 0
            case 0x98:
                return self._cfi().get(offset & 0xFF, 0)
        return self.state.status

    def write(self, offset: int, size: int, value: int, /) -> None:
        for at in range(size):
            self._write(offset + at, value >> 8 * at & 0xFF)

    def _write(self, offset: int, value: int) -> None:
        state = self.state
        if state.left:
            self._further(offset, value)
        elif value in (PROGRAM, 0x40, ERASE, LOCK, BUFFERED):
            state.command, state.left, state.pending = PROGRAM if value == 0x40 else value, 1, {}
            if value == BUFFERED:
                state.status |= READY
            self._show(False)
        elif value in (STATUS, IDENTITY, QUERY):
            state.command = value
            self._show(False)
        else:  # read the array; clear status; anything else
            if value == CLEAR:
                state.status = 0
            elif value not in (ARRAY, 0, CONFIRM):
                self._log.warning("flash: unknown command", command=hex(value))
            state.command = ARRAY
            self._show(True)

    def _further(self, offset: int, value: int) -> None:
        """A write that belongs to the command before it."""
        state = self.state
        state.left -= 1
        match state.command:
            case 0x10:
                self._program({offset: value})
            case 0x20 if value == CONFIRM:
                self._erase(offset)
            case 0x60 if value in (1, CONFIRM):
                state.status |= READY
            case 0xE8 if not state.pending and value < BUFFER and state.left == 0:
                state.left, state.pending = value + 2, {-1: 0}  # so many bytes and one, then the confirmation
            case 0xE8 if state.left:
                state.pending[offset] = value
            case 0xE8 if value == CONFIRM:
                state.pending.pop(-1, None)
                self._program(state.pending)
                state.pending = {}
            case _:
                state.left, state.command = 0, ARRAY
                self._show(True)

    def _program(self, changes: dict[int, int]) -> None:
        self.state.status |= READY
        if self.options.readonly:
            self.state.status |= PROGRAM_ERROR
            return
        for offset, value in changes.items():
            self._block.view[offset] = value
            self._keep(offset, 1)

    def _erase(self, offset: int) -> None:
        self.state.status |= READY
        if self.options.readonly:
            self.state.status |= ERASE_ERROR
            return
        start = offset & -SECTOR
        self._block.view[start : start + SECTOR] = b"\xff" * SECTOR
        self._keep(start, SECTOR)

    def _keep(self, offset: int, size: int) -> None:
        try:
            os.pwrite(self._file, self._block.view[offset : offset + size], offset)
        except OSError as error:
            self.state.status |= PROGRAM_ERROR
            self._log.error("flash: not written to its file", why=error.strerror)

    def _cfi(self) -> dict[int, int]:
        """The query structure (JEDEC JEP137): what a driver sizes the chip by."""
        sectors, log2 = len(self._block.view) // SECTOR, (len(self._block.view) - 1).bit_length()
        text = {0x10: b"QRY\x01\x00\x31\x00", 0x31: b"PRI10"}
        single = {0x1B: 0x45, 0x1C: 0x55, 0x1F: 7, 0x20: 7, 0x21: 10, 0x23: 4, 0x24: 4, 0x25: 4, 0x27: log2, 0x28: 2}
        single |= {0x2A: BUFFER.bit_length() - 1, 0x2C: 1, 0x2D: sectors - 1 & 0xFF, 0x2E: sectors - 1 >> 8}
        single |= {0x2F: SECTOR >> 8 & 0xFF, 0x30: SECTOR >> 16}
        return single | {at + n: byte for at, data in text.items() for n, byte in enumerate(data)}

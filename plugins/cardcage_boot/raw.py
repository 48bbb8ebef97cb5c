"""Flat binaries at a given address, entered in a given mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import ConfigError
from cardcage.memory import GuestMemoryError
from cardcage.values import define
from cardcage.x86 import Segment, reset_state

from cardcage_boot.files import BootFile, open_file
from cardcage_boot.layout import GDT, TABLES_END, flat32, long64, write_long_mode_tables

if TYPE_CHECKING:
    from cardcage.boot import BootContext, BootImage
    from cardcage.x86 import VCpuState

    from cardcage_boot.options import RawOptions

__all__ = ["RawImage", "RawLoader"]


@define
class RawImage:
    """A flat binary; :meth:`load` may be called any number of times.

    Mode 16: CS holds bits 16 to 19 of the entry point, the other segments 0, and SP is 0x7C00. Mode 32: flat segments,
    no paging. Mode 64: long mode over tables at 0x1000 to 0x7FFF. ESP and RSP are 0: a program brings its stack.
    """

    file: BootFile
    address: int
    entry: int
    mode: int

    def load(self, context: BootContext, /) -> VCpuState:
        """Write the image. Raises ConfigError when it does not fit in RAM."""
        try:
            context.memory.write(self.address, self.file.data)
        except GuestMemoryError as error:
            end = self.address + len(self.file.data)
            problem = f"the image at {self.address:#x}-{end - 1:#x} is not inside the guest's RAM"
            raise self.file.error(problem) from error
        if self.mode == 32:
            return flat32(self.entry)
        if self.mode == 64:
            write_long_mode_tables(context)
            return long64(self.entry)
        state = reset_state()
        state.system.cs = Segment(selector=(self.entry & 0xF0000) >> 4, base=self.entry & 0xF0000, type=11)
        state.registers.rip, state.registers.rsp, state.registers.rdx = self.entry & 0xFFFF, 0x7C00, 0x80
        return state


@define
class RawLoader:
    """Boot protocol ``raw``."""

    options: RawOptions

    def open(self) -> BootImage:
        """Read the file and check the addresses. Raises ConfigError naming the file or the option."""
        options = self.options
        file = open_file(options.image, "raw image")
        entry = options.address if options.entry is None else options.entry
        limit = {16: 1 << 20, 32: 1 << 32, 64: 1 << 32}[options.mode]
        if not 0 <= entry < limit:
            raise ConfigError(f"entry {entry:#x}: expected below {limit:#x} in mode {options.mode}", key="boot.entry")
        end = options.address + len(file.data)
        if options.mode == 64 and options.address < TABLES_END and end > GDT:
            raise file.error(f"the image at {options.address:#x}-{end - 1:#x} covers the tables at 0x1000-0x7fff")
        return RawImage(file, options.address, entry, options.mode)

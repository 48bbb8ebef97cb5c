"""Firmware images: a ROM that ends just below 4 GiB, with its last 128 KiB shown below 1 MiB as well."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

from attrs import define
from cardcage.errors import UsageError
from cardcage.memory import PAGE, PhysicalMemory, RamBlock, RamRange
from cardcage.x86 import reset_state

from cardcage_boot.files import BootFile, open_file

if TYPE_CHECKING:
    from cardcage.boot import BootContext, BootImage
    from cardcage.x86 import VCpuState

    from cardcage_boot.options import FirmwareOptions

__all__ = ["ROM_PRIORITY", "FirmwareImage", "FirmwareLoader", "find_bios", "open_firmware"]

ROM_PRIORITY = 10
"""Above RAM (0); a host bridge's PAM ranges that show RAM in place of the ROM go above this."""
LARGEST = 16 << 20
MIRROR = 128 << 10
BIOS = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/share/seabios/bios.bin")
"""Where distributions have SeaBIOS."""


def find_bios() -> str:
    """The path of this host's SeaBIOS; empty where none is installed."""
    return next((one for one in BIOS if os.path.exists(one)), "")


@define
class FirmwareImage:
    """A checked ROM image; :meth:`load` may be called any number of times, always with the same machine's memory.

    The ROM is mapped read-only: guest writes to it go to the memory-mapped bus, where nothing answers.
    """

    file: BootFile
    firmware: ClassVar[bool] = True
    _ranges: tuple[RamRange, ...] = ()

    def load(self, context: BootContext, /) -> VCpuState:
        """Put the ROM into the address space (the first time); the state is that after reset, at FFFF:FFF0's ROM."""
        memory = context.memory
        if not isinstance(memory, PhysicalMemory):
            raise UsageError("firmware needs the machine's own physical memory, to map a ROM into it")
        if not any(one in memory.ranges for one in self._ranges):
            data = self.file.data
            block = RamBlock(len(data), "rom")
            block.view[: len(data)] = data
            mirror = min(MIRROR, len(data))
            self._ranges = (
                RamRange((1 << 32) - len(data), len(data), block, 0, True, ROM_PRIORITY),
                RamRange((1 << 20) - mirror, mirror, block, len(data) - mirror, True, ROM_PRIORITY),
            )
            memory.add(*self._ranges)
        return reset_state()


def open_firmware(file: BootFile) -> FirmwareImage:
    """Check a ROM image: whole pages, at most 16 MiB, at least 64 KiB, and not empty at the reset vector."""
    size = len(file.data)
    if size % PAGE or not 64 << 10 <= size <= LARGEST:
        raise file.error(f"{size} bytes: expected a firmware ROM of 64 KiB to 16 MiB in whole 4 KiB pages")
    if file.data[-16:-11] in (bytes(5), b"\xff" * 5):
        raise file.error("a firmware ROM without code at its reset vector (16 bytes before its end)")
    return FirmwareImage(file)


@define
class FirmwareLoader:
    """Boot protocol ``firmware``."""

    options: FirmwareOptions

    def open(self) -> BootImage:
        """Read and check the image. Raises ConfigError naming the file and what was expected."""
        return open_firmware(open_file(self.options.firmware, "firmware ROM"))

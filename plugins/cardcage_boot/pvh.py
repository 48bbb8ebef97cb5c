"""ELF kernels by PVH (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h; ELF note 18)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from attrs import define, field

from cardcage_boot.elf import Elf, is_elf, read_elf
from cardcage_boot.files import BootFile, joined, open_file
from cardcage_boot.layout import Room, flat32, load_elf
from cardcage_boot.linux import linux_release

if TYPE_CHECKING:
    from cardcage.boot import BootContext, BootImage
    from cardcage.x86 import VCpuState

    from cardcage_boot.options import PvhOptions

__all__ = ["PvhImage", "PvhLoader", "open_pvh", "pvh_entry"]

START_INFO = 0x1000
MAGIC = 0x336EC578
XEN_ELFNOTE_PHYS32_ENTRY = 18
MEMMAP_AT, MODULES_AT, COMMAND_LINE_AT = 0x100, 0x80, 0x2000
LOW_SIZE = 0x8000


def pvh_entry(elf: Elf) -> int | None:
    """The 32-bit physical entry point from the note, ``None`` if the note is missing or damaged."""
    for name, kind, data in elf.notes:
        if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(data) in (4, 8):
            entry = int.from_bytes(data, "little")
            return entry if entry < 1 << 32 else None
    return None


@define
class PvhImage:
    """A checked ELF kernel with a PVH entry; :meth:`load` may be called any number of times."""

    file: BootFile
    elf: Elf
    entry: int
    initrds: list[BootFile] = field(repr=False)
    command_line: bytes

    def load(self, context: BootContext, /) -> VCpuState:
        """Write the segments, initrds and start info; the state enters with its address in EBX."""
        room = Room(context.e820)
        low = room.need(LOW_SIZE, "the PVH start info", file=self.file.path, high=0xA0000)
        load_elf(context, room, self.elf, self.file)
        modules = b""
        for initrd in self.initrds:
            at = room.need(len(initrd.data), "the initrd", file=initrd.path, low=1 << 20, high=1 << 32, top=True)
            context.memory.write(at, initrd.data)
            modules += struct.pack("<4Q", at, len(initrd.data), 0, 0)
        entries = [one for one in context.e820 if one.size > 0]
        memmap = b"".join(struct.pack("<QQII", one.address, one.size, one.type, 0) for one in entries)
        if MEMMAP_AT + len(memmap) > COMMAND_LINE_AT or MODULES_AT + len(modules) > MEMMAP_AT:
            raise self.file.error(f"{len(entries)} memory map entries and {len(self.initrds)} initrds are too many")
        info = struct.pack(
            "<4I4QII",
            *(MAGIC, 1, 0, len(self.initrds)),
            *(low + MODULES_AT if modules else 0, low + COMMAND_LINE_AT, context.rsdp or 0, low + MEMMAP_AT),
            *(len(entries), 0),
        )
        page = info.ljust(MODULES_AT, b"\0") + modules.ljust(MEMMAP_AT - MODULES_AT, b"\0")
        page += memmap.ljust(COMMAND_LINE_AT - MEMMAP_AT, b"\0") + self.command_line + b"\0"
        context.memory.write(low, page)
        state = flat32(self.entry)
        state.registers.rbx = low
        return state


def open_pvh(file: BootFile, initrds: list[str], append: str) -> PvhImage:
    """Check an ELF file and its note, and read the initrds; Linux takes only one, and gets them joined."""
    if not is_elf(file.data):
        raise file.error("not an ELF file: expected a kernel with a PVH entry note (a vmlinux)")
    elf = read_elf(file)
    entry = pvh_entry(elf)
    if entry is None:
        raise file.error("an ELF file without a PVH entry point: expected the note Xen/18 (CONFIG_PVH in Linux)")
    if not elf.segments:
        raise file.error("an ELF file with nothing to load: expected PT_LOAD segments")
    line = append.encode("utf-8", "surrogateescape")
    if len(line) >= LOW_SIZE - COMMAND_LINE_AT or b"\0" in line:
        raise file.error(f"command line of {len(line)} bytes: at most {LOW_SIZE - COMMAND_LINE_AT - 1}, without NUL")
    read = [open_file(path, "initrd") for path in initrds]
    if len(read) > 1 and linux_release(file):
        read = [BootFile(", ".join(initrds), joined(read), "initrd")]
    return PvhImage(file, elf, entry, read, line)


@define
class PvhLoader:
    """Boot protocol ``pvh``."""

    options: PvhOptions

    def open(self) -> BootImage:
        """Read and check the files. Raises ConfigError naming the file and what was expected."""
        options = self.options
        return open_pvh(open_file(options.kernel, "ELF kernel"), options.initrds(), options.append)

"""Multiboot 1 kernels, ELF and flat (GNU, Multiboot Specification version 0.6.96, chapter 3)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from attrs import define, field, frozen
from cardcage.config import beside
from cardcage.x86 import DescriptorTable

from cardcage_boot.elf import Elf, Segment, is_elf, read_elf
from cardcage_boot.files import BootFile, open_file, unpacked
from cardcage_boot.layout import PAGE, Room, flat32, load_elf

if TYPE_CHECKING:
    from cardcage.boot import BootContext, BootImage
    from cardcage.x86 import VCpuState

    from cardcage_boot.options import MultibootOptions

__all__ = ["Header", "MultibootImage", "MultibootLoader", "find_header", "open_multiboot"]

HEADER_MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH = 8192
PAGE_ALIGN, MEMORY_INFO, VIDEO, ADDRESSES = 1, 2, 4, 1 << 16
INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES, INFO_MMAP, INFO_LOADER = 1, 4, 8, 0x40, 0x200
INFO_SIZE = 88
LOADER_NAME = b"cardcage\0"


@frozen
class Header:
    """A Multiboot header: its file offset, its flags, and with flag 16 the five addresses of a flat image."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int] | None


def find_header(file: BootFile) -> Header | None:
    """The header in the first 8 KiB, or ``None``. Raises ConfigError for a header that cannot be honoured."""
    data = file.data[:SEARCH]
    for offset in range(0, len(data) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", data, offset)
        if magic != HEADER_MAGIC or magic + flags + checksum & 0xFFFFFFFF:
            continue
        if flags & 0xFFFF & ~(PAGE_ALIGN | MEMORY_INFO | VIDEO):
            raise file.error(f"Multiboot flags {flags:#x} ask for what Multiboot 1 does not define (bits 3 to 15)")
        if not flags & ADDRESSES:
            return Header(offset, flags, None)
        at, load, load_end, bss_end, entry = file.unpack("5I", offset + 12, "the Multiboot header's addresses")
        return Header(offset, flags, (at, load, load_end, bss_end, entry))
    return None


def _flat(file: BootFile, header: Header) -> Elf:
    """The "a.out kludge": one segment by the header's addresses (specification 3.1.3)."""
    assert header.addresses is not None
    at, load, load_end, bss_end, entry = header.addresses
    start = header.offset - (at - load)
    end = len(file.data) if not load_end else start + load_end - load
    if load > at or start < 0:
        raise file.error(f"Multiboot load_addr {load:#x} and header_addr {at:#x} do not fit the file")
    if end < start or (load_end and load_end < load):
        raise file.error(f"Multiboot load_end_addr {load_end:#x} is below load_addr {load:#x}")
    data = file.bytes(start, end - start, "the image that the Multiboot header describes")
    size = max(len(data), bss_end - load if bss_end else 0)
    return Elf(32, entry, (Segment(load, data, size, load),), ())


@define
class MultibootImage:
    """A checked kernel, its modules and command line; :meth:`load` may be called any number of times."""

    file: BootFile
    header: Header
    elf: Elf
    modules: list[tuple[BootFile, bytes]] = field(repr=False)
    command_line: bytes

    def load(self, context: BootContext, /) -> VCpuState:
        """Write kernel, modules and info structure; the state enters with its address in EBX."""
        room = Room(context.e820)
        entries = [one for one in context.e820 if one.size > 0]
        mmap = b"".join(struct.pack("<IQQI", 20, one.address, one.size, one.type) for one in entries)
        texts = [self.command_line + b"\0", LOADER_NAME, *(text + b"\0" for _, text in self.modules)]
        size = INFO_SIZE + len(mmap) + 16 * len(self.modules) + sum(map(len, texts))
        kernel_end = load_elf(context, room, self.elf, self.file)
        # High in low memory, where the field's kernels expect what a boot loader leaves.
        info = room.need(size, "the Multiboot information", file=self.file.path, high=0xA0000, top=True)
        mmap_at, list_at = info + INFO_SIZE, info + INFO_SIZE + len(mmap)
        text_at = list_at + 16 * len(self.modules)
        command_line_at, loader_at = text_at, text_at + len(texts[0])
        text_at = loader_at + len(LOADER_NAME)
        listing = b""
        for module, text in self.modules:
            low = max(kernel_end, 1 << 20)
            at = room.need(len(module.data), "a Multiboot module", file=module.path, low=low, high=1 << 32, align=PAGE)
            context.memory.write(at, module.data)
            listing += struct.pack("<4I", at, at + len(module.data), text_at, 0)
            text_at += len(text) + 1
        lower, upper = _extent(context, 0), _extent(context, 1 << 20)
        head = struct.pack(
            "<22I",
            INFO_MEMORY | INFO_COMMAND_LINE | (INFO_MODULES if self.modules else 0) | INFO_MMAP | INFO_LOADER,
            *(min(lower, 640 << 10) >> 10, upper >> 10, 0, command_line_at),
            *(len(self.modules), list_at if self.modules else 0, 0, 0, 0, 0),
            *(len(mmap), mmap_at, 0, 0, 0, loader_at, 0, 0, 0, 0, 0),
        )
        context.memory.write(info, head + mmap + listing + b"".join(texts))
        state = flat32(self.elf.physical_entry())
        state.system.idt = DescriptorTable(0, 0x3FF)  # the BIOS's: a kernel that goes back to real mode has vectors
        state.registers.rax, state.registers.rbx = LOADER_MAGIC, info
        return state


def _extent(context: BootContext, address: int) -> int:
    """Bytes of RAM from *address* to the first hole below 4 GiB."""
    ends = [one.address + one.size for one in context.e820 if one.type == 1 and one.address <= address]
    return max(min(max(ends, default=0), 1 << 32) - address, 0)


def open_multiboot(file: BootFile, modules: list[str], append: str) -> MultibootImage:
    """Check a kernel and read its modules, each given as a path and, after a space, its own command line."""
    header = find_header(file)
    if header is None:
        raise file.error("not a Multiboot kernel: expected the magic 0x1badb002 in its first 8192 bytes")
    if header.addresses is not None:
        elf = _flat(file, header)
    elif is_elf(file.data):
        elf = read_elf(file)
    else:
        raise file.error("a Multiboot kernel that is neither ELF nor gives its load addresses (flag 16)")
    if not elf.segments or elf.physical_entry() >= 1 << 32:
        raise file.error("a Multiboot kernel with nothing to load, or an entry point above 4 GiB")
    read = []
    for one in modules:
        path = beside(one).removesuffix(one[len(one.partition(" ")[0]) :])  # the guest is told what was written
        read.append((open_file(path, "Multiboot module"), one.encode("utf-8", "surrogateescape")))
    name = file.name or file.path
    line = (f"{name} {append}" if append else name).encode("utf-8", "surrogateescape")
    if len(line) > 1 << 16 or b"\0" in line + b"".join(text for _, text in read):
        raise file.error("command line: expected at most 64 KiB, without NUL")
    return MultibootImage(file, header, elf, read, line)


@define
class MultibootLoader:
    """Boot protocol ``multiboot``."""

    options: MultibootOptions

    def open(self) -> BootImage:
        """Read and check the files. Raises ConfigError naming the file and what was expected."""
        options = self.options
        file = unpacked(open_file(options.kernel, "Multiboot kernel"))
        return open_multiboot(file, options.modules, options.append)

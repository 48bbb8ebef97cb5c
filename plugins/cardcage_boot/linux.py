"""Linux by its 64-bit boot protocol, old kernels by the 32-bit one (Linux, Documentation/x86/{boot,zero-page}.rst)."""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING

from attrs import field
from cardcage.values import define, frozen

from cardcage_boot.elf import Elf, is_elf, read_elf
from cardcage_boot.files import BootFile, open_file
from cardcage_boot.layout import PAGE, Room, linux32, long64, take_elf, write_elf, write_long_mode_tables

if TYPE_CHECKING:
    from cardcage.boot import BootContext, BootImage, E820Entry
    from cardcage.x86 import VCpuState

    from cardcage_boot.options import LinuxOptions

__all__ = [
    "Header",
    "LinuxImage",
    "LinuxLoader",
    "elf_header",
    "is_bzimage",
    "linux_release",
    "open_linux",
    "read_header",
]

ZERO_PAGE = 0x8000
SETUP_DATA = 0x9000
COMMAND_LINE = 0xA000
LOW_END = 0x20000
ENTRY_64 = 0x200
XLF_KERNEL_64, XLF_ABOVE_4G = 1, 2
SETUP_RNG_SEED = 9
UNPACKS = 4
"""Of a kernel that does not say how much memory it needs: its unpacked size, in times of the file's."""
LOADED_HIGH, KEEP_SEGMENTS = 1, 0x40
HEADER_ENDS = {0x206: 0x23C, 0x207: 0x248, 0x208: 0x250, 0x209: 0x258}
"""First address past the setup header by protocol version; later ones end at 0x264 or after."""


def is_bzimage(data: bytes) -> bool:
    """True if the setup header's magic numbers are there."""
    return data[0x1FE:0x200] == b"\x55\xaa" and data[0x202:0x206] == b"HdrS"


@frozen
class Header:
    """The relevant fields of a bzImage's setup header; addresses and sizes in bytes.

    Attributes:
        raw: the header from file offset 0x1F1 on, to be copied to the zero page.
        version: boot protocol, 0x0206 or later. release: the kernel's ``uname -r`` text, may be empty.
        payload: file offset of the protected-mode part.
        relocatable, alignment, preferred, init_size: where it may be loaded, and how much memory it needs there.
        long: it has the 64-bit entry point; else it is entered at its first byte, in 32-bit mode.
        initrd_max: highest address an initrd may reach. above_4g: the initrd may lie above 4 GiB.
        command_line_size: longest command line, without the final NUL.
        elf: an ELF kernel's segments and entry; it unpacks nothing, and lies where it is linked to.
    """

    raw: bytes = field(repr=False)
    version: int
    release: str
    payload: int
    relocatable: bool
    alignment: int
    preferred: int
    init_size: int
    long: bool
    initrd_max: int
    above_4g: bool
    command_line_size: int
    elf: Elf | None = field(default=None, repr=False)


def read_header(file: BootFile) -> Header:
    """Parse and check the setup header. Raises ConfigError if it is no bzImage, known to be 32-bit, or truncated.

    Protocols before 2.12 do not tell whether it is a 64-bit kernel, those before 2.10 not how much memory it needs.
    """
    if not is_bzimage(file.data):
        short = len(file.data) < 0x206
        raise file.error(
            f"truncated bzImage: {len(file.data)} bytes, expected a setup header at 0x1f1"
            if short
            else "not a Linux kernel: expected a bzImage (magic 0xaa55 at 0x1fe and HdrS at 0x202) or a vmlinux"
        )
    version = file.u16(0x206, "protocol version")
    if version < 0x206:
        raise file.error(f"boot protocol {version >> 8}.{version & 255:02}: expected 2.06 or later (Linux 2.6.22)")
    long = version >= 0x20C
    xloadflags = file.u16(0x236, "xloadflags") if long else 0
    if long and not xloadflags & XLF_KERNEL_64:
        raise file.error("a 32-bit kernel: expected one with the 64-bit entry point (xloadflags bit 0)")
    end, least = 0x202 + file.data[0x201], HEADER_ENDS.get(version, 0x264)
    if not least <= end <= 0x290:
        raise file.error(f"setup header ends at {end:#x}: expected {least:#x} to 0x290")
    payload = ((file.data[0x1F1] or 4) + 1) * 512
    size = file.u32(0x1F4, "syssize") * 16
    # syssize is rounded up to 16; a signature may follow the payload.
    file.check(payload, max(size - 15, 1), "the protected-mode kernel")
    alignment, relocatable = file.u32(0x230, "kernel_alignment"), file.data[0x234]
    preferred, init_size = 1 << 20, UNPACKS * size
    if version >= 0x20A:
        preferred, init_size = file.unpack("QI", 0x258, "pref_address and init_size")
    if relocatable and (alignment & (alignment - 1) or not PAGE <= alignment <= 1 << 30):
        raise file.error(f"kernel_alignment {alignment:#x}: expected a power of two from 4 KiB to 1 GiB")
    if preferred >= 1 << 32 or preferred % PAGE:
        raise file.error(f"pref_address {preferred:#x}: expected a page-aligned address below 4 GiB")
    text = file.u16(0x20E, "kernel_version")
    release = file.data[text + 0x200 : text + 0x300].split(b"\0")[0].decode("ascii", "replace") if text else ""
    return Header(
        raw=file.bytes(0x1F1, end - 0x1F1, "the setup header"),
        version=version,
        release=release.split(" ")[0],
        payload=payload,
        relocatable=bool(relocatable),
        alignment=alignment,
        preferred=preferred,
        init_size=max(init_size, len(file.data) - payload),
        long=long,
        initrd_max=file.u32(0x22C, "initrd_addr_max") or 0x37FFFFFF,
        above_4g=bool(xloadflags & XLF_ABOVE_4G),
        command_line_size=file.u32(0x238, "cmdline_size") or 255,
    )


def elf_header(file: BootFile) -> Header:
    """The setup header that an ELF kernel's bzImage would have. Raises ConfigError for another ELF file."""
    elf, release = read_elf(file), linux_release(file)
    if elf.bits != 64 or not release or not elf.segments:
        raise file.error("an ELF file: expected a 64-bit Linux kernel (a vmlinux)")
    raw = bytearray(0x264 - 0x1F1)
    for form, offset, value in (("H", 0x1FE, 0xAA55), ("4s", 0x202, b"HdrS"), ("H", 0x206, 0x20F), ("I", 0x238, 2047)):
        struct.pack_into("<" + form, raw, offset - 0x1F1, value)
    return Header(
        raw=bytes(raw),
        version=0x20F,
        release=release,
        payload=0,
        relocatable=False,
        alignment=PAGE,
        preferred=min(one.address for one in elf.segments),
        init_size=0,
        long=True,
        initrd_max=0x7FFFFFFF,
        above_4g=False,
        command_line_size=2047,
        elf=elf,
    )


def linux_release(file: BootFile) -> str:
    """The ``uname -r`` text of a Linux kernel, a bzImage or an ELF file; empty for other kernels.

    An ELF kernel has it in its banner. Raises ConfigError for a damaged bzImage.
    """
    if is_bzimage(file.data):
        return read_header(file).release
    banner = re.search(rb"Linux version (\d[\w.+~-]{0,64}) \(", file.data) if is_elf(file.data) else None
    return banner[1].decode() if banner else ""


@define
class LinuxImage:
    """A checked kernel, its initrds and command line; :meth:`load` may be called any number of times."""

    file: BootFile
    header: Header
    initrds: list[BootFile] = field(repr=False)
    command_line: bytes

    @property
    def initrd_size(self) -> int:
        """Bytes of all initrds one after another, each padded to 4 bytes: Linux reads them as one."""
        return sum(len(part.data) + 3 & ~3 for part in self.initrds)

    def load(self, context: BootContext, /) -> VCpuState:
        """Write tables, zero page, command line, kernel and initrd; the state enters at the 64-bit entry point."""
        room = Room(context.e820)
        room.take(PAGE, LOW_END - PAGE, "the Linux boot protocol", self.file.path)
        kernel = self._place_kernel(room)
        initrd = self._place_initrd(room)
        memory, elf = context.memory, self.header.elf
        if elf is None:
            memory.write(kernel, memoryview(self.file.data)[self.header.payload :])
        else:
            write_elf(context, elf)
        at = initrd
        for part in self.initrds:
            memory.write(at, part.data)
            memory.write(at + len(part.data), bytes(-len(part.data) % 4))
            at += len(part.data) + 3 & ~3
        memory.write(COMMAND_LINE, self.command_line + b"\0")
        seed = os.urandom(32)
        memory.write(SETUP_DATA, struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed)
        memory.write(ZERO_PAGE, self._zero_page(context, kernel, initrd))
        if self.header.long:
            write_long_mode_tables(context)
            state = long64(kernel + ENTRY_64 if elf is None else elf.physical_entry())
        else:
            state = linux32(context, kernel)
        state.registers.rsi, state.registers.rsp = ZERO_PAGE, LOW_END
        return state

    def _place_kernel(self, room: Room) -> int:
        header = self.header
        if header.elf is not None:
            take_elf(room, header.elf, self.file)
            return header.preferred
        what = "the kernel (with the room it unpacks itself into)"
        if room.holds(header.preferred, header.init_size) or not header.relocatable:
            room.take(header.preferred, header.init_size, what, self.file.path)
            return header.preferred
        # Below its preferred address it would unpack itself to that all the same, over whatever is there.
        return room.need(
            header.init_size, what, file=self.file.path, low=header.preferred, high=1 << 32, align=header.alignment
        )

    def _place_initrd(self, room: Room) -> int:
        size = self.initrd_size
        if not size:
            return 0
        # As high as allowed: the kernel, and where KASLR may move it, keep the lower addresses.
        at = room.find(size, low=1 << 20, high=self.header.initrd_max + 1, top=True)
        if at is None and self.header.above_4g:
            at = room.find(size, low=self.header.initrd_max + 1, top=True)
        if at is None:
            return room.need(
                size,
                "the initrd",
                file=", ".join(part.path for part in self.initrds),
                low=1 << 20,
                high=self.header.initrd_max + 1,
            )
        return at

    def _zero_page(self, context: BootContext, kernel: int, initrd: int) -> bytes:
        page = bytearray(PAGE)
        page[0x1F1 : 0x1F1 + len(self.header.raw)] = self.header.raw

        def put(form: str, offset: int, *values: int) -> None:
            struct.pack_into("<" + form, page, offset, *values)

        put("Q", 0x070, context.rsdp or 0)
        put("I", 0x0C0, initrd >> 32)
        put("I", 0x0C4, self.initrd_size >> 32)
        put("B", 0x210, 0xFF)  # type_of_loader: unknown to the kernel's list
        put("B", 0x211, (page[0x211] | LOADED_HIGH) & ~KEEP_SEGMENTS)
        put("I", 0x214, kernel)
        put("II", 0x218, initrd & 0xFFFFFFFF, self.initrd_size & 0xFFFFFFFF)
        put("I", 0x228, COMMAND_LINE)
        if self.header.version >= 0x209:
            put("Q", 0x250, SETUP_DATA)
        entries = [one for one in context.e820 if one.size > 0]
        if len(entries) > 128:
            raise self.file.error(f"the memory map has {len(entries)} entries: the zero page holds 128")
        put("B", 0x1E8, len(entries))
        for at, one in enumerate(sorted(entries, key=_address)):
            put("QQI", 0x2D0 + 20 * at, one.address, one.size, one.type)
        return bytes(page)


def _address(entry: E820Entry) -> int:
    return entry.address


def open_linux(file: BootFile, initrds: list[str], append: str) -> LinuxImage:
    """Check a kernel file, read its initrds and check the command line."""
    header = elf_header(file) if is_elf(file.data) else read_header(file)
    read = [open_file(path, "initrd") for path in initrds]
    line = append.encode("utf-8", "surrogateescape")
    limit = min(header.command_line_size, LOW_END - PAGE - COMMAND_LINE)
    if len(line) > limit or b"\0" in line:
        raise file.error(f"command line of {len(line)} bytes: this kernel takes at most {limit}, without NUL")
    return LinuxImage(file, header, read, line)


@define
class LinuxLoader:
    """Boot protocol ``linux``."""

    options: LinuxOptions

    def open(self) -> BootImage:
        """Read and check the files. Raises ConfigError naming the file and what was expected."""
        options = self.options
        return open_linux(open_file(options.kernel, "Linux kernel"), options.initrds(), options.append)

"""Hand-made kernels, the small guests in them, and a machine as far as booting sees it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from attrs import define, field
from cardcage._machine.booting import carve
from cardcage.boot import E820Entry
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.x86 import VCpuState
from cardcage_pc.platform import split_ram

MIB = 1 << 20


@define
class Context:
    """A machine's memory map, as far as booting sees it."""

    size: int
    memory: Any = field(factory=PhysicalMemory)
    cpus: int = 1
    rsdp: int | None = 0xE1234
    e820: list[E820Entry] = field(factory=list)
    ram_below_4g: int = 0
    ram_above_4g: int = 0
    firmware: bool = False
    msrs: dict[int, int] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.ram_below_4g, self.ram_above_4g = split_ram(self.size)
        self.e820 = [E820Entry(0, self.ram_below_4g)]
        block = RamBlock(self.size)
        self.memory.add(RamRange(0, self.ram_below_4g, block))
        if self.ram_above_4g:
            self.memory.add(RamRange(1 << 32, self.ram_above_4g, block, self.ram_below_4g))
            self.e820.append(E820Entry(1 << 32, self.ram_above_4g))
        self.reserve(0xA0000, 0x60000)

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        self.e820 = carve(self.e820, address, size, type)


@define
class DebugConsole:
    """Ops of a machine with a debug console at port 0xE9 and nothing else."""

    output: bytearray = field(factory=bytearray)

    def pio_read(self, port: int, size: int, /) -> int:
        return (1 << 8 * size) - 1

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        if port == 0xE9:
            self.output += value.to_bytes(size, "little")

    def mmio_read(self, address: int, size: int, /) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        pass

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None:
        pass


def elf32(code: bytes, address: int, *, bss: int = 0, notes: bytes = b"", machine: int = 3, entry: int = 0) -> bytes:
    """An ELF32 executable with one segment at *address* whose first byte is the entry point."""
    headers = 2 if notes else 1
    start = 52 + 32 * headers
    body = notes + code
    out = b"\x7fELF\x01\x01\x01" + bytes(9)
    out += struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, entry or address, 52, 0, 0, 52, 32, headers, 40, 0, 0)
    out += struct.pack("<8I", 1, start + len(notes), address, address, len(code), len(code) + bss, 7, 4)
    if notes:
        out += struct.pack("<8I", 4, start, 0, 0, len(notes), len(notes), 4, 4)
    return out + body


def elf64(code: bytes, address: int, notes: bytes) -> bytes:
    """The same as ELF64, as Linux's vmlinux is."""
    start = 64 + 2 * 56
    out = b"\x7fELF\x02\x01\x01" + bytes(9)
    out += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, address, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    out += struct.pack("<IIQQQQQQ", 1, 7, start + len(notes), address, address, len(code), len(code), 8)
    out += struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(notes), len(notes), 4)
    return out + notes + code


def pvh_note(entry: int) -> bytes:
    return struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)


def multiboot_header(flags: int, *addresses: int) -> bytes:
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


# Prints the command line with its NUL, each module's string and contents, and mem_upper; '!' without the magic.
MULTIBOOT_CODE = bytes.fromhex(
    "66bae9003d02b0ad2b753bbc009000008b7310e8270000008b4b148b6b18e31a8b7508e817000000518b75008b4d0429f1f36e5983c51049ebe48b43"
    "08eff4acee84c075fac3b021eef4"
)


# Prints the command line with its NUL, the first module, the low half of rsdp_paddr, and the number of map entries.
PVH_CODE = bytes.fromhex("66bae900813b78c56e33751d8b7318acee84c075fa8b6b108b75008b4d08f36e8b4320ef8b4330eef4b021eef4")


# 64-bit; prints the command line, the initrd, the low half of acpi_rsdp_addr, the setup_data type and e820_entries.
LINUX_CODE = bytes.fromhex(
    "66bae9004889f38bb328020000acee84c075fa8bb3180200008b83c000000048c1e0204809c68b8b1c020000f36e8b4370ef488bb3500200008b4608"
    "ee8a83e8010000eef4"
)


# 32-bit; loads the data segments anew, prints the command line, the initrd and e820_entries.
LINUX_32_CODE = bytes.fromhex(
    "66bae900b8180000008ed88ec08ed089f38bb328020000acee84c075fa8bb3180200008b8b1c020000f36e8a83e8010000eef4"
)


RAW_CODE = {
    16: bytes.fromhex("8cc8bae900ef5258ee0f20c0eef4"),  # prints CS, the low byte of 0xE9 through the stack, CR0
    32: bytes.fromhex("b83031323366bae900ef0f20c0eff4"),  # prints "0123" and CR0
    64: bytes.fromhex("48b8303132333435363766bae900ef48c1e820ef0f20c0eff4"),  # prints "01234567" and CR0
}


def bzimage(
    code: bytes = LINUX_CODE,
    *,
    start: bytes = b"",
    preferred: int = MIB,
    relocatable: int = 1,
    init_size: int = 0x10000,
    initrd_max: int = 0x7FFFFFFF,
    xloadflags: int = 3,
    version: int = 0x20F,
    line_max: int = 255,
) -> bytes:
    """A bzImage of one setup sector whose 64-bit entry point is *code*, and its 32-bit one *start*."""
    head = bytearray(1024)
    payload = start.ljust(0x200, b"\0") + code
    payload += bytes(-len(payload) % 16)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, len(payload) // 16)
    head[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<H", head, 0x20E, 0x100)
    head[0x300:0x30C] = b"6.1.0-t (x)\0"
    struct.pack_into("<IIBBHI", head, 0x22C, initrd_max, 0x1000, relocatable, 12, xloadflags, line_max)
    struct.pack_into("<QI", head, 0x258, preferred, init_size)
    return bytes(head) + payload


BootMachine = Callable[..., Context]


Write = Callable[[str, bytes], str]


RunGuest = Callable[[Context, VCpuState], bytes]

"""The boot protocols but Linux: what they write, and how small hand-made guests find it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from boot_kit import (
    MIB,
    MULTIBOOT_CODE,
    PVH_CODE,
    RAW_CODE,
    BootMachine,
    RunGuest,
    Write,
    elf32,
    elf64,
    multiboot_header,
    pvh_note,
)
from cardcage.errors import ConfigError
from cardcage_boot.files import BootFile
from cardcage_boot.firmware import FirmwareLoader, open_firmware
from cardcage_boot.multiboot import MultibootLoader, open_multiboot
from cardcage_boot.options import (
    FirmwareOptions,
    MultibootOptions,
    PvhOptions,
    RawOptions,
)
from cardcage_boot.pvh import PvhLoader
from cardcage_boot.raw import RawLoader


@pytest.mark.parametrize("build", [elf32, elf64])
def test_pvh_guest_finds_what_the_protocol_promises(
    boot_machine: BootMachine, write: Write, run_guest: RunGuest, build: Callable[..., bytes]
) -> None:
    """An ELF kernel is entered at its note's address and finds command line, initrd, RSDP and memory map."""
    kernel = build(PVH_CODE, 2 * MIB, notes=pvh_note(2 * MIB))
    context = boot_machine()
    image = PvhLoader(PvhOptions(write("k", kernel), write("i", b"module"), "a=b")).open()
    expected = b"a=b\0module" + struct.pack("<IB", 0xE1234, len(context.e820))
    for _ in range(2):
        assert run_guest(context, image.load(context)) == expected


@pytest.mark.parametrize("flat", [False, True])
def test_multiboot_guest_finds_what_the_protocol_promises(
    boot_machine: BootMachine, write: Write, run_guest: RunGuest, flat: bool
) -> None:
    """A Multiboot kernel, ELF or flat, finds magic, command line, modules with their strings, and upper memory."""
    if flat:
        header = multiboot_header(0x10003, 2 * MIB, 2 * MIB, 0, 0, 2 * MIB + 32)
        kernel = header + MULTIBOOT_CODE
    else:
        kernel = elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB, bss=100, entry=2 * MIB + 12)
    path = write("k", kernel)
    modules = [f"{write('m', b'first')} x=1", write("n", b"second")]
    context = boot_machine()
    image = MultibootLoader(MultibootOptions(path, modules, "arg")).open()
    expected = f"{path} arg\0{modules[0]}\0first{modules[1]}\0second".encode() + struct.pack("<I", 15 << 10)
    for _ in range(2):
        assert run_guest(context, image.load(context)) == expected


def test_multiboot_entry_of_a_kernel_that_is_linked_high_is_translated(
    boot_machine: BootMachine, write: Write, run_guest: RunGuest
) -> None:
    """A kernel linked at 3 GiB and loaded at 2 MiB is entered where its entry point lies in memory."""
    kernel = bytearray(elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB, entry=0xC0000000 + 2 * MIB + 12))
    struct.pack_into("<I", kernel, 52 + 8, 0xC0000000 + 2 * MIB)  # p_vaddr
    context = boot_machine()
    image = MultibootLoader(MultibootOptions(path := write("k", bytes(kernel)), [], "arg")).open()
    assert run_guest(context, image.load(context)).startswith(path.encode() + b" arg\0")


def test_multiboot_takes_elf64(boot_machine: BootMachine, write: Write, run_guest: RunGuest) -> None:
    """A Multiboot header in an ELF64 file is honoured as in ELF32: entered in 32-bit mode at its entry point."""
    code = MULTIBOOT_CODE.ljust(4096, b"\0")  # the header lies behind, aligned
    kernel = elf64(code + multiboot_header(3), 2 * MIB, b"")
    context = boot_machine()
    image = MultibootLoader(MultibootOptions(path := write("k", kernel), [], "arg")).open()
    assert run_guest(context, image.load(context)).startswith(path.encode() + b" arg\0")


def test_multiboot_zeroes_bss_and_loads_modules_behind_it(boot_machine: BootMachine, write: Write) -> None:
    """Memory past the file's bytes is zero after each load, and modules are page aligned behind the kernel."""
    context = boot_machine()
    kernel = elf32(multiboot_header(1) + b"code", 2 * MIB, bss=9000)
    image = MultibootLoader(MultibootOptions(write("k", kernel), [write("m", b"mod")])).open()
    context.memory.write(2 * MIB, b"\xff" * 20000)
    state = image.load(context)
    assert context.memory.read(2 * MIB + 16, 9000) == bytes(9000)
    info = struct.unpack("<22I", context.memory.read(state.registers.rbx, 88))
    start, end, _, _ = struct.unpack("<4I", context.memory.read(info[6], 16))
    assert (start, end) == (2 * MIB + 3 * 4096, 2 * MIB + 3 * 4096 + 3)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (b"x" * 9000, "not a Multiboot kernel"),
        (multiboot_header(8), "bits 3 to 15"),
        (multiboot_header(3), "neither ELF"),
        (multiboot_header(0x10000, 0), "truncated"),
        (multiboot_header(0x10000, MIB, 2 * MIB, 0, 0, MIB), "do not fit the file"),
        (multiboot_header(0x10000, MIB, MIB, MIB + 999, 0, MIB), "truncated"),
    ],
)
def test_multiboot_wrong_kernel_is_one_clear_error(kernel: bytes, expected: str) -> None:
    """A kernel without a header, or with one that cannot be honoured, is named with what was expected."""
    with pytest.raises(ConfigError, match=r"^k: ") as caught:
        open_multiboot(BootFile("k", kernel), [], "")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "entry", "expected"),
    [
        (16, 0x7C00, b"\0\0\xe9\x10"),
        (16, 0x27C00, b"\0\x20\xe9\x10"),
        (32, 0x200000, b"0123" + struct.pack("<I", 0x11)),
        (64, 0x200000, b"01234567" + struct.pack("<I", 0x80000011)),
    ],
)
def test_raw_image_runs_in_its_mode(
    boot_machine: BootMachine, write: Write, run_guest: RunGuest, mode: int, entry: int, expected: bytes
) -> None:
    """A flat binary runs at its address in 16-, 32- or 64-bit mode."""
    image = RawLoader(RawOptions(write("r", RAW_CODE[mode]), entry, mode=mode)).open()
    context = boot_machine()
    for _ in range(2):
        assert run_guest(context, image.load(context)) == expected


def test_raw_image_outside_ram_or_over_the_tables(boot_machine: BootMachine, write: Write) -> None:
    """An image that lies outside RAM, or over the tables of 64-bit mode, or an entry out of reach, is refused."""
    path = write("r", b"\xf4" * 10)
    with pytest.raises(ConfigError, match="not inside the guest's RAM"):
        RawLoader(RawOptions(path, 16 * MIB - 5, mode=32)).open().load(boot_machine())
    with pytest.raises(ConfigError, match="tables"):
        RawLoader(RawOptions(path, 0x2000, mode=64)).open()
    with pytest.raises(ConfigError, match=r"boot\.entry"):
        RawLoader(RawOptions(path, 0x7C00, MIB, 16)).open()


def test_firmware_is_read_only_and_mirrored(boot_machine: BootMachine, write: Write) -> None:
    """A ROM ends at 4 GiB, its last 128 KiB show at 0xE0000, it is mapped once, and entered at the reset vector."""
    rom = b"".join(struct.pack("<I", at) for at in range(0, 256 << 10, 4))[:-16] + b"\xea" * 16
    image = FirmwareLoader(FirmwareOptions(write("f", rom))).open()
    context = boot_machine()
    for _ in range(2):
        state = image.load(context)
    assert context.memory.read((1 << 32) - len(rom), len(rom)) == rom
    assert context.memory.read(0xE0000, 128 << 10) == rom[128 << 10 :]
    roms = [(slot.address, slot.size) for slot in context.memory.slots if slot.readonly]
    assert roms == [(0xE0000, 128 << 10), ((1 << 32) - len(rom), len(rom))]
    assert (state.system.cs.base, state.registers.rip) == (0xFFFF0000, 0xFFF0)


def test_firmware_runs_from_its_reset_vector(boot_machine: BootMachine, write: Write, run_guest: RunGuest) -> None:
    """The processor starts in the ROM below 4 GiB, and the mirror below 1 MiB holds the same code."""
    code = bytes.fromhex("ba e9 00 b0 52 ee ea 20 ff 00 f0".replace(" ", ""))  # 'R', then jmp f000:ff20 (the mirror)
    rom = bytearray(b"\xf4" * (64 << 10))
    rom[-16 : -16 + len(code)] = code
    rom[0xFF20 : 0xFF20 + 4] = bytes.fromhex("b04deef4")  # 'M', hlt
    image = FirmwareLoader(FirmwareOptions(write("f", bytes(rom)))).open()
    context = boot_machine()
    assert run_guest(context, image.load(context)) == b"RM"


@pytest.mark.parametrize("rom", [bytes(4096), bytes(100), b"\xff" * (64 << 10), bytes(64 << 10)])
def test_wrong_firmware_is_one_clear_error(rom: bytes) -> None:
    """A ROM of a wrong size, or without code at its reset vector, is refused."""
    with pytest.raises(ConfigError, match=r"^f: .*firmware ROM"):
        open_firmware(BootFile("f", rom))

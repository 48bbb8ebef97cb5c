"""The Linux boot protocol: what it writes, where it puts things, and which kernels it refuses."""

from __future__ import annotations

import struct

import pytest
from boot_kit import (
    MIB,
    BootMachine,
    Context,
    RunGuest,
    Write,
    bzimage,
)
from cardcage.errors import ConfigError
from cardcage.x86 import VCpuState
from cardcage_boot.files import BootFile
from cardcage_boot.linux import LinuxLoader, open_linux, read_header
from cardcage_boot.options import (
    LinuxOptions,
)


def test_linux_guest_finds_what_the_protocol_promises(
    boot_machine: BootMachine, write: Write, run_guest: RunGuest
) -> None:
    """A bzImage is entered in 64-bit mode and finds command line, initrd, RSDP, seed and memory map; twice."""
    context = boot_machine()
    options = LinuxOptions(write("k", bzimage()), write("i", b"initrd-1"), "console=ttyS0")
    image = LinuxLoader(options).open()
    entries = len(context.e820)
    expected = b"console=ttyS0\0initrd-1" + struct.pack("<IBB", 0xE1234, 9, entries)
    for _ in range(2):
        assert run_guest(context, image.load(context)) == expected


def test_linux_joins_initrds_on_word_bounds(write: Write) -> None:
    """Several initrds follow each other, each padded to 4 bytes, as the kernel expects of joined archives."""
    image = LinuxLoader(LinuxOptions(write("k", bzimage()), [write("a", b"abcde"), write("b", b"fg")])).open()
    assert image.initrd == b"abcde\0\0\0fg\0\0"  # type: ignore[attr-defined]  # a Linux image has it


def load_linux(context: Context, kernel: bytes, initrd: bytes = b"") -> tuple[VCpuState, bytes]:
    image = open_linux(BootFile("k", kernel), [], "")
    image.initrd, image.initrd_path = initrd, "i"
    state = image.load(context)
    return state, context.memory.read(state.registers.rsi, 4096)


def test_linux_prefers_its_address_and_moves_when_it_must(boot_machine: BootMachine) -> None:
    """The kernel lies at pref_address where that is free, else, if relocatable, at the first aligned free address."""
    context = boot_machine()
    assert load_linux(context, bzimage(preferred=2 * MIB))[0].registers.rip == 2 * MIB + 0x200
    context.reserve(2 * MIB, 4096)
    assert load_linux(context, bzimage(preferred=2 * MIB))[0].registers.rip == MIB + 0x200
    with pytest.raises(ConfigError, match="0x200000"):
        load_linux(context, bzimage(preferred=2 * MIB, relocatable=0))


def test_linux_initrd_obeys_its_limit(boot_machine: BootMachine) -> None:
    """The initrd lies as high as initrd_addr_max and the memory map allow."""
    context = boot_machine()
    _, page = load_linux(context, bzimage(), bytes(5000))
    assert struct.unpack_from("<II", page, 0x218) == (16 * MIB - 8192, 5000)
    _, page = load_linux(context, bzimage(initrd_max=8 * MIB - 1), bytes(5000))
    assert struct.unpack_from("<I", page, 0x218)[0] == 8 * MIB - 8192
    context.reserve(14 * MIB, 2 * MIB, 3)
    _, page = load_linux(context, bzimage(), bytes(5000))
    assert struct.unpack_from("<I", page, 0x218)[0] == 14 * MIB - 8192


def test_linux_initrd_above_4g_where_the_kernel_allows_it(boot_machine: BootMachine) -> None:
    """An initrd that fits nowhere below its limit goes above 4 GiB with the extended fields, or is refused."""
    context = boot_machine(3 * 1024 * MIB + 1024 * MIB)
    context.reserve(3 * MIB, context.ram_below_4g - 3 * MIB)
    _, page = load_linux(context, bzimage(), bytes(4 * MIB))
    low, size = struct.unpack_from("<II", page, 0x218)
    high, size_high = struct.unpack_from("<II", page, 0x0C0)
    assert (high << 32 | low, size_high << 32 | size) == ((5 << 30) - 4 * MIB, 4 * MIB)
    with pytest.raises(ConfigError, match=r"i: the initrd of 4\.0 MiB does not fit"):
        load_linux(context, bzimage(xloadflags=1), bytes(4 * MIB))


def test_linux_zero_page_is_the_memory_map(boot_machine: BootMachine) -> None:
    """The e820 table of the zero page is the context's, sorted, with the reserved ranges."""
    context = boot_machine()
    context.reserve(15 * MIB, 0x1000, 4)
    _, page = load_linux(context, bzimage())
    found = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * at) for at in range(page[0x1E8])]
    assert found == sorted((one.address, one.size, one.type) for one in context.e820)
    assert (15 * MIB, 0x1000, 4) in found


def test_linux_header_names_the_release() -> None:
    """The kernel's release is read from the setup header."""
    assert read_header(BootFile("k", bzimage())).release == "6.1.0-t"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (b"x" * 100, "truncated bzImage"),
        (b"x" * 4096, "not a Linux kernel"),
        (bzimage()[:1200], "truncated file: expected the protected-mode kernel"),
        (bzimage(version=0x20B), "boot protocol 2.11"),
        (bzimage(xloadflags=2), "32-bit kernel"),
    ],
)
def test_linux_wrong_kernel_is_one_clear_error(kernel: bytes, expected: str) -> None:
    """A truncated, foreign, old or 32-bit kernel is named with what was expected."""
    with pytest.raises(ConfigError, match=r"^vmlinuz: ") as caught:
        read_header(BootFile("vmlinuz", kernel))
    assert expected in str(caught.value)


def test_too_little_memory_for_the_kernel(boot_machine: BootMachine) -> None:
    """A kernel that does not fit in RAM is refused with a hint, before anything is written."""
    with pytest.raises(ConfigError, match="give more memory"):
        load_linux(boot_machine(), bzimage(init_size=64 * MIB))


def test_command_line_too_long(write: Write) -> None:
    """A command line that the kernel cannot take is refused with the limit."""
    with pytest.raises(ConfigError, match="at most 255"):
        LinuxLoader(LinuxOptions(write("k", bzimage()), append="x" * 256)).open()

"""The Linux boot protocol: what it writes, where it puts things, and which kernels it refuses."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
from boot_kit import (
    LINUX_32_CODE,
    LINUX_CODE,
    MIB,
    BootMachine,
    Context,
    RunGuest,
    Write,
    bzimage,
    elf32,
    elf64,
    pvh_note,
)
from cardcage.errors import ConfigError
from cardcage.x86 import VCpuState
from cardcage_boot.auto import AutoLoader
from cardcage_boot.files import BootFile
from cardcage_boot.linux import LinuxLoader, linux_release, open_linux, read_header
from cardcage_boot.options import AutoOptions, LinuxOptions
from cardcage_boot.pvh import open_pvh
from hypothesis import given
from hypothesis import strategies as st


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


def test_linux_joins_initrds_on_word_bounds(write: Write, boot_machine: BootMachine) -> None:
    """Several initrds follow each other, each padded to 4 bytes with zeros, whatever memory held, as the kernel expects
    of joined archives."""
    context = boot_machine()
    context.memory.write(MIB, b"\xff" * (context.ram_below_4g - MIB))
    image = LinuxLoader(LinuxOptions(write("k", bzimage()), [write("a", b"abcde"), write("b", b"fg")])).open()
    page = context.memory.read(image.load(context).registers.rsi, 4096)
    at, size = struct.unpack_from("<II", page, 0x218)
    assert context.memory.read(at, size) == b"abcde\0\0\0fg\0\0"


def load_linux(context: Context, kernel: bytes, initrd: bytes = b"") -> tuple[VCpuState, bytes]:
    image = open_linux(BootFile("k", kernel), [], "")
    image.initrds = [BootFile("i", initrd)] if initrd else []
    state = image.load(context)
    return state, context.memory.read(state.registers.rsi, 4096)


def test_linux_prefers_its_address_and_moves_when_it_must(boot_machine: BootMachine) -> None:
    """The kernel lies at pref_address where that is free, else, if relocatable, at the first aligned address above."""
    context = boot_machine()
    assert load_linux(context, bzimage(preferred=2 * MIB))[0].registers.rip == 2 * MIB + 0x200
    context.reserve(2 * MIB, 100)
    assert load_linux(context, bzimage(preferred=2 * MIB))[0].registers.rip == 2 * MIB + 0x1200
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


@pytest.mark.parametrize("version", [0x206, 0x207, 0x208, 0x209, 0x20A, 0x20B])
def test_an_old_kernel_is_entered_in_32_bit_mode(
    boot_machine: BootMachine, write: Write, run_guest: RunGuest, version: int
) -> None:
    """A kernel of protocols 2.06 to 2.11 starts at its first byte, with flat segments, at pref_address or 1 MiB."""
    context = boot_machine()
    kernel = write("k", bzimage(b"", start=LINUX_32_CODE, version=version, preferred=2 * MIB, xloadflags=0))
    image = LinuxLoader(LinuxOptions(kernel, write("i", b"initrd-1"), "console=ttyS0")).open()
    state = image.load(context)
    assert state.registers.rip == (2 * MIB if version >= 0x20A else MIB)
    assert run_guest(context, state) == b"console=ttyS0\0initrd-1" + bytes([len(context.e820)])


@pytest.mark.parametrize(("version", "end"), [(0x206, 0x23C), (0x207, 0x248), (0x208, 0x250), (0x209, 0x258)])
def test_an_old_header_may_be_short(boot_machine: BootMachine, version: int, end: int) -> None:
    """The setup header of an old protocol ends where its fields do; what follows it is not taken for fields."""
    kernel = bytearray(bzimage(version=version, preferred=5, init_size=0xFFFFFFFF))
    kernel[0x201] = end - 0x202
    _, page = load_linux(boot_machine(), bytes(kernel))
    assert page[0x258:0x264] == bytes(12)
    kernel[0x201] -= 1
    with pytest.raises(ConfigError, match=f"setup header ends at {end - 1:#x}: expected {end:#x} to 0x290"):
        read_header(BootFile("k", bytes(kernel)))


@given(
    kernel=st.integers(1, 20 * MIB),
    initrd=st.integers(0, 8 * MIB),
    preferred=st.integers(0, 4).map(lambda at: (1 + 3 * at) * MIB),
    relocatable=st.integers(0, 1),
    elf=st.booleans(),
)
def test_too_little_memory_says_how_much_is_needed(
    kernel: int, initrd: int, preferred: int, relocatable: int, elf: bool
) -> None:
    """For any kernel and initrd, one is asked for more memory at most once for each, and that is the least."""

    def refused(memory: int) -> str:
        context = Context(memory * MIB)
        try:
            if elf:
                file = BootFile("k", elf32(b"\xf4", preferred, bss=kernel, notes=pvh_note(preferred)))
                image: Any = open_pvh(file, [], "")
                image.initrds = [BootFile("i", bytes(initrd))] if initrd else []
            else:
                header = bzimage(preferred=preferred, init_size=kernel, relocatable=relocatable)
                image = open_linux(BootFile("k", header), [], "")
                image.initrds = [BootFile("i", bytes(initrd))] if initrd else []
            image.load(context)
        except ConfigError as error:
            return str(error)
        finally:
            context.memory.close()
        return ""

    memory, asked = 1, 0
    while problem := refused(memory):
        found = re.search(r": give more memory, at least (\d+)M$", problem)
        assert found is not None, problem
        memory, asked = int(found[1]), asked + 1
        assert refused(memory - 1)
        assert asked <= 2
    assert memory <= (preferred + kernel + initrd) // MIB + 3


def test_memory_that_cannot_help_is_not_asked_for(boot_machine: BootMachine) -> None:
    """Where the place is taken, or the limit is the kernel's own, the error says that and gives no number."""
    context = boot_machine()
    context.reserve(2 * MIB, 4096)
    with pytest.raises(ConfigError, match=r"0x20ffff: it is not free in the machine's memory map$"):
        load_linux(context, bzimage(preferred=2 * MIB, relocatable=0))
    with pytest.raises(
        ConfigError, match=r"the initrd of 9\.0 MiB does not fit in the guest's free RAM below 0x800000$"
    ):
        load_linux(context, bzimage(initrd_max=8 * MIB - 1, xloadflags=1), bytes(9 * MIB))


def test_an_elf_kernel_of_linux_is_known_by_its_banner() -> None:
    """The release of a vmlinux is read from its banner; another ELF file has none."""
    banner = b"Linux version 6.1.0-57-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-12)\n\0"
    assert linux_release(BootFile("k", elf32(banner, MIB))) == "6.1.0-57-cloud-amd64"
    assert linux_release(BootFile("k", elf32(b"Linux version %s (%s)\0", MIB))) == ""
    assert linux_release(BootFile("k", banner)) == ""
    assert linux_release(BootFile("k", bzimage())) == "6.1.0-t"


def test_an_elf_kernel_of_linux_needs_no_note(boot_machine: BootMachine, write: Write, run_guest: RunGuest) -> None:
    """A vmlinux without a PVH note is entered in 64-bit mode at its entry point, with all that a bzImage gets."""
    context = boot_machine()
    code = LINUX_CODE + b"Linux version 6.1.0-t (x)\0"
    kernel = write("k", elf64(code, 2 * MIB, struct.pack("<III4sI", 4, 4, 18, b"Not\0", MIB)))
    expected = b"console=ttyS0\0initrd-1" + struct.pack("<IBB", 0xE1234, 9, len(context.e820))
    for options, loader in ((LinuxOptions, LinuxLoader), (AutoOptions, AutoLoader)):
        image = loader(options(kernel, write("i", b"initrd-1"), append="console=ttyS0")).open()
        assert run_guest(context, image.load(context)) == expected


@pytest.mark.parametrize("kernel", [elf32(b"Linux version 2.6 (x)\0", MIB), elf64(b"no banner", MIB, b"")])
def test_other_elf_files_are_no_linux(kernel: bytes) -> None:
    """A 32-bit ELF kernel, and one that is not Linux, are refused by protocol ``linux``."""
    with pytest.raises(ConfigError, match=r"k: an ELF file: expected a 64-bit Linux kernel \(a vmlinux\)"):
        open_linux(BootFile("k", kernel), [], "")


def test_an_elf_kernel_of_linux_gets_one_initrd(write: Write) -> None:
    """Linux looks at one module only: by PVH it gets its initrds joined; another kernel gets each as it is."""
    paths = [write("a", b"abcde"), write("b", b"fg")]
    for code, initrds in ((b"Linux version 6.1 (x)\0", [b"abcde\0\0\0fg\0\0"]), (b"Xen", [b"abcde", b"fg"])):
        image = open_pvh(BootFile("k", elf32(code, MIB, notes=pvh_note(MIB))), paths, "")
        assert [one.data for one in image.initrds] == initrds


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (b"x" * 100, "truncated bzImage"),
        (b"x" * 4096, "not a Linux kernel"),
        (bzimage()[:1200], "truncated file: expected the protected-mode kernel"),
        (bzimage(version=0x205), "boot protocol 2.05: expected 2.06 or later"),
        (bzimage(xloadflags=2), "32-bit kernel"),
    ],
)
def test_linux_wrong_kernel_is_one_clear_error(kernel: bytes, expected: str) -> None:
    """A truncated, foreign, old or 32-bit kernel is named with what was expected."""
    with pytest.raises(ConfigError, match=r"^vmlinuz: ") as caught:
        read_header(BootFile("vmlinuz", kernel))
    assert expected in str(caught.value)


def test_too_little_memory_for_the_kernel(boot_machine: BootMachine) -> None:
    """A kernel that does not fit in RAM is refused with the memory that it needs, before anything is written."""
    with pytest.raises(ConfigError, match="give more memory, at least 65M"):
        load_linux(boot_machine(), bzimage(init_size=64 * MIB))


def test_command_line_too_long(write: Write) -> None:
    """A command line that the kernel cannot take is refused with the limit."""
    with pytest.raises(ConfigError, match="at most 255"):
        LinuxLoader(LinuxOptions(write("k", bzimage()), append="x" * 256)).open()

"""Boot files as they come: packed, damaged, unreadable, of any protocol; and the room that their contents get."""

from __future__ import annotations

import gzip
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from boot_kit import (
    MIB,
    MULTIBOOT_CODE,
    PVH_CODE,
    Context,
    Write,
    bzimage,
    elf32,
    elf64,
    multiboot_header,
    pvh_note,
)
from cardcage.boot import BootImage, E820Entry
from cardcage.errors import ConfigError
from cardcage_boot.auto import AutoLoader
from cardcage_boot.elf import read_elf, section
from cardcage_boot.files import BootFile
from cardcage_boot.firmware import open_firmware
from cardcage_boot.layout import Room
from cardcage_boot.linux import LinuxLoader, open_linux
from cardcage_boot.multiboot import MultibootLoader, open_multiboot
from cardcage_boot.options import (
    AutoOptions,
    LinuxOptions,
    MultibootOptions,
)
from cardcage_boot.pvh import open_pvh
from hypothesis import given, settings
from hypothesis import strategies as st


def test_machines_of_one_kernel_have_it_once(write: Write) -> None:
    """Images of the same files share their bytes, not those of a file that has changed, and nothing stays once no image
    holds it."""
    kernel, initrd = write("k", bzimage()), write("i", b"abcde")
    first, second = (LinuxLoader(LinuxOptions(kernel, initrd)).open() for _ in range(2))
    assert first.file is second.file  # type: ignore[attr-defined]  # a Linux image has it
    assert first.initrds[0] is second.initrds[0]  # type: ignore[attr-defined]  # likewise
    for changed in (b"abcdx", b"abcde\0", b"abcd", b"abcde"):
        write("i", changed)
        third: Any = LinuxLoader(LinuxOptions(kernel, initrd)).open()
        assert third.initrds[0].data == changed
    held = weakref.ref(third.initrds[0])
    del third
    assert held() is None


def test_gzipped_kernel_is_unpacked(write: Write) -> None:
    """Multiboot and auto take a kernel that gzip packed, as Debian packages Xen and GNU Mach."""
    kernel = elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB)
    path = write("k.gz", gzip.compress(kernel))
    plain = MultibootLoader(MultibootOptions(write("k", kernel))).open()
    for loader in (MultibootLoader(MultibootOptions(path)), AutoLoader(AutoOptions(path))):
        assert loader.open().elf == plain.elf  # type: ignore[attr-defined]  # a Multiboot image has it


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[:-9], "truncated gzip file"),
        (lambda data: data[:30] + bytes(20) + data[50:], "damaged gzip file"),
    ],
)
def test_damaged_gzip_is_one_clear_error(write: Write, damage: Callable[[bytes], bytes], expected: str) -> None:
    """What gzip cannot unpack is refused, naming the file."""
    path = write("k.gz", damage(gzip.compress(bytes(range(256)) * 9)))
    with pytest.raises(ConfigError, match=expected) as caught:
        AutoLoader(AutoOptions(path)).open()
    assert caught.value.file == path


def test_gzip_bomb_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file does not unpack into more than the limit of a boot file."""
    monkeypatch.setattr("cardcage_boot.files.MAX_FILE", 1 << 20)
    with pytest.raises(ConfigError, match="unpacks to more than"):
        AutoLoader(AutoOptions(write("k.gz", gzip.compress(bytes(2 << 20))))).open()


def test_auto_decides_by_magic(write: Write) -> None:
    """Protocol auto opens each kind of file by its own protocol, and says so when it knows none."""
    note = pvh_note(2 * MIB)
    kinds = {
        "LinuxImage": bzimage(),
        "PvhImage": elf64(PVH_CODE, 2 * MIB, note),
        "MultibootImage": multiboot_header(0x10003, MIB, MIB, 0, 0, MIB),
    }
    for name, data in kinds.items():
        assert type(AutoLoader(AutoOptions(write("k", data))).open()).__name__ == name
    rom = AutoLoader(AutoOptions(firmware=write("f", bytes((64 << 10) - 16) + b"\xea" * 16))).open()
    assert type(rom).__name__ == "FirmwareImage"
    with pytest.raises(ConfigError, match="no boot protocol recognises this kernel"):
        AutoLoader(AutoOptions(write("k", b"#!/bin/sh\n"))).open()
    with pytest.raises(ConfigError, match="nothing to boot"):
        AutoLoader(AutoOptions()).open()


@pytest.mark.parametrize("path", ["/nonexistent/vmlinuz", "/", "a\0b"])
def test_unreadable_file_is_one_clear_error(path: str) -> None:
    """A missing file, a directory or an impossible name is a ConfigError that names it."""
    with pytest.raises(ConfigError, match="cannot be read"):
        AutoLoader(AutoOptions(path)).open()


def attempts(data: bytes) -> Iterator[Callable[[], Any]]:
    file = BootFile("f", data)
    yield lambda: open_linux(file, [], "")
    yield lambda: open_pvh(file, [], "")
    yield lambda: open_multiboot(file, [], "")
    yield lambda: open_firmware(file)
    yield lambda: read_elf(file)
    yield lambda: section(file, ".modinfo")


SEEDS = [
    bzimage(),
    elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB, notes=pvh_note(2 * MIB)),
    elf64(PVH_CODE, 2 * MIB, pvh_note(2 * MIB)),
    multiboot_header(0x10003, MIB, MIB, 0, 0, MIB) + MULTIBOOT_CODE,
]


damage = st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=6)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SEEDS), damage, st.integers(0, 2000))
def test_damaged_files_only_raise_config_error(seed: bytes, changes: list[tuple[int, bytes]], length: int) -> None:
    """Whatever bytes a file holds and wherever it ends, opening and loading it works or is a ConfigError."""
    data = bytearray(seed)
    for at, patch in changes:
        data[at : at + len(patch)] = patch
    context = Context(4 * MIB)
    try:
        for attempt in attempts(bytes(data[:length] if length else data)):
            try:
                found = attempt()
                if hasattr(found, "load"):
                    image: BootImage = found
                    image.load(context)
            except ConfigError:
                continue
    finally:
        context.memory.close()


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(1, 16), st.sampled_from([1, 1, 1, 2, 3])), max_size=6),
    st.lists(st.tuples(st.integers(1, 8 * 4096), st.sampled_from([1, 4096, 16384]), st.booleans()), max_size=8),
)
def test_room_gives_only_free_disjoint_ram(
    entries: list[tuple[int, int, int]], asks: list[tuple[int, int, bool]]
) -> None:
    """Ranges taken are aligned, inside RAM that nothing else covers, and never overlap each other or page 0."""
    table = [E820Entry(at * 4096, size * 4096, kind) for at, size, kind in entries]
    room = Room(table)
    taken: list[tuple[int, int]] = []
    for size, align, top in asks:
        at = room.find(size, align=align, top=top, low=4096)
        if at is None:
            continue
        assert at % align == 0
        assert at >= 4096
        for page in {at // 4096, (at + size - 1) // 4096}:
            kinds = {one.type for one in table if one.address <= page * 4096 < one.address + one.size}
            assert kinds == {1}
        assert all(at + size <= low or low + length <= at for low, length in taken)
        taken.append((at, size))

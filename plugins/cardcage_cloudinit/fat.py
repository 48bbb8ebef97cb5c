"""A FAT12 file system (Microsoft's FAT specification, 2000) with a few files in its root, as bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LARGEST", "make_fat"]

SECTOR, ENTRY, ENTRIES = 512, 32, 128
CLUSTERS = 4084
"""The most that FAT12 has."""
LARGEST = 16 << 20
"""Bytes of all files."""
END = 0xFFF
READ_ONLY, VOLUME, LONG = 0x01, 0x08, 0x0F
DATE = 0x0021
"""1 January 1980: the same files make the same bytes."""
BOOT = struct.Struct("<3s8sHBHBHHBHHHIIBBBI11s8s")


def make_fat(files: Mapping[str, bytes], label: str, serial: int) -> bytes:
    """The file system.

    Args:
        files: names, of up to 255 letters of ASCII that are no dots, slashes or the like, to contents.
        label: up to 11 letters. serial: of the volume, 32 bits.

    Raises ValueError for more than :data:`LARGEST` bytes, or than the root directory has entries for.
    """
    size = sum(map(len, files.values()))
    if size > LARGEST:
        raise ValueError(f"{size} bytes: expected at most {LARGEST}")
    per = SECTOR
    while sum(-(-len(data) // per) for data in files.values()) + 16 > CLUSTERS:
        per *= 2
    clusters, fat, root = bytearray(), [0xFF8, END], bytearray(_entry(label.ljust(11).encode(), VOLUME, 0, 0))
    for number, (name, data) in enumerate(files.items(), 1):
        first = len(fat) if data else 0
        count = -(-len(data) // per)
        fat += [*range(first + 1, first + count), END] if count else []
        clusters += data.ljust(count * per, b"\0")
        short = f"FILE~{number}".ljust(11)[:11].encode()
        root += _long(name, short) + _entry(short, READ_ONLY, first, len(data))
    if len(root) > ENTRIES * ENTRY:
        raise ValueError(f"{len(files)} files: more than the directory has room for")
    fat += [0] * 16  # room, for drivers that want a free cluster
    clusters += bytes(16 * per)
    packed = b"".join(
        struct.pack("<I", low | high << 12)[:3] for low, high in zip(fat[::2], [*fat[1::2], 0], strict=False)
    )
    sectors = -(-len(packed) // SECTOR)
    total = 1 + 2 * sectors + ENTRIES * ENTRY // SECTOR + len(clusters) // SECTOR
    boot = BOOT.pack(
        b"\xeb\x3c\x90",
        b"MSWIN4.1",
        SECTOR,
        per // SECTOR,
        1,
        2,
        ENTRIES,
        total if total < 1 << 16 else 0,
        0xF8,
        sectors,
        32,
        64,
        0,
        total if total >= 1 << 16 else 0,
        0x80,
        0,
        0x29,
        serial,
        label.ljust(11).encode(),
        b"FAT12   ",
    )
    table = packed.ljust(sectors * SECTOR, b"\0")
    return b"".join((boot.ljust(510, b"\0"), b"\x55\xaa", table, table, root.ljust(ENTRIES * ENTRY, b"\0"), clusters))


def _entry(name: bytes, attributes: int, cluster: int, size: int) -> bytes:
    return struct.pack("<11sBBBHHHHHHHI", name, attributes, 0, 0, 0, DATE, DATE, 0, 0, DATE, cluster, size)


def _long(name: str, short: bytes) -> bytes:
    """The entries of a long name, the last part first."""
    check = 0
    for byte in short:
        check = ((check & 1) << 7 | check >> 1) + byte & 0xFF
    units = (name + "\0").encode("utf-16-le") if len(name) % 13 else name.encode("utf-16-le")
    units += b"\xff" * (-len(units) % 26)
    found = []
    for at in range(0, len(units), 26):
        part, number = units[at : at + 26], at // 26 + 1
        if at + 26 == len(units):
            number |= 0x40
        found.append(struct.pack("<B10sBBB12sH4s", number, part[:10], LONG, 0, check, part[10:22], 0, part[22:]))
    return b"".join(reversed(found))

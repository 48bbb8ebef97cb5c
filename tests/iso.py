"""A small ISO 9660 image with an El Torito boot record: what firmware and Linux look for on a disc."""

from __future__ import annotations

import struct

SECTOR = 2048


def sector(data: bytes) -> bytes:
    return data.ljust(SECTOR, b"\0")


def both(value: int) -> bytes:
    return struct.pack("<I", value) + struct.pack(">I", value)


def short(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def make_iso(code: bytes, text: bytes) -> bytes:
    """A disc that boots *code*, up to 2048 bytes at 0x7C00, and has a file ``HELLO.TXT`` with *text*."""
    root = bytes([34, 0]) + both(20) + both(SECTOR) + bytes(7) + bytes([2, 0, 0]) + short(1) + bytes([1, 0])
    volume = bytearray(SECTOR)
    volume[:7] = b"\x01CD001\x01"
    volume[8:72] = b" " * 64
    volume[80:88], volume[120:124], volume[124:128], volume[128:132] = both(24), short(1), short(1), short(SECTOR)
    volume[132:140], volume[140:144], volume[148:152] = both(10), struct.pack("<I", 22), struct.pack(">I", 22)
    volume[156:190], volume[881] = root, 1
    boot = sector(b"\x00CD001\x01" + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", 19))
    head = struct.pack("<BBH24sHBB", 1, 0, 0, b"cage", 0, 0x55, 0xAA)
    checksum = -sum(struct.unpack("<16H", head)) & 0xFFFF
    head = struct.pack("<BBH24sHBB", 1, 0, 0, b"cage", checksum, 0x55, 0xAA)
    catalog = sector(head + struct.pack("<BBHBxHI", 0x88, 0, 0, 0, 4, 21))
    name = b"HELLO.TXT;1"
    entry = bytes([44, 0]) + both(23) + both(len(text)) + bytes(7) + bytes([0, 0, 0]) + short(1) + bytes([len(name)])
    folder = sector(root + root[:32] + b"\x01\x01" + (entry + name).ljust(44, b"\0"))
    paths = sector(bytes([1, 0]) + struct.pack("<IH", 20, 1) + b"\0\0")
    parts = (bytes(volume), boot, sector(b"\xffCD001\x01"), catalog, folder, sector(code), paths, sector(text))
    return bytes(16 * SECTOR) + b"".join(parts)

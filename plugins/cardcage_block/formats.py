"""The format that a file's first and last bytes show: raw, qcow2, or one that is known by name only.

What is taken for raw though it is something else is destroyed by the guest's first write, so every format that
qemu-img(1) knows, and the compressed files and archives that disks are shipped in, are told from raw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import ConfigError

from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from cardcage_block.hostfile import File

__all__ = ["EDGE", "detect", "probe", "refuse_foreign", "shown"]

EDGE = 512
"""Bytes at either end of a file that say what it is."""

_STARTS = {
    "qed": (b"QED\0",),
    "vmdk": (b"KDMV", b"COWD", b"# Disk DescriptorFile"),
    "vhdx": (b"vhdxfile",),
    "vpc": (b"conectix",),
    "parallels": (b"WithoutFreeSpace", b"WithouFreSpacExt"),
    "luks": (b"LUKS\xba\xbe", b"SKUL\xba\xbe"),
    "bochs": (b"Bochs Virtual HD Image",),
    "cloop": (b"#!/bin/sh\n#V2.0 Format\n",),
    "android-sparse": (b"\x3a\xff\x26\xed",),
    "gzip": (b"\x1f\x8b\x08",),
    "xz": (b"\xfd7zXZ\0",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "lz4": (b"\x04\x22\x4d\x18",),
    "lzip": (b"LZIP\x01",),
    "lzop": (b"\x89LZO\0\r\n\x1a\n",),
    "zip": (b"PK\x03\x04",),
    "7z": (b"7z\xbc\xaf\x27\x1c",),
    "rar": (b"Rar!\x1a\x07",),
}
_ENDS = {"vpc": b"conectix", "dmg": b"koly"}
"""Formats whose mark is in the last sector, behind data that begins as a raw disk does."""

_NAMES = {
    "qcow": "a qcow image (version 1)",
    "qed": "a QED image",
    "vmdk": "a VMDK image (VMware)",
    "vdi": "a VDI image (VirtualBox)",
    "vhdx": "a VHDX image (Hyper-V)",
    "vpc": "a VHD image (Virtual PC, Azure)",
    "parallels": "a Parallels image",
    "luks": "a LUKS container (encrypted)",
    "bochs": "a Bochs image",
    "cloop": "a cloop image",
    "dmg": "a DMG image (macOS)",
    "ova": "an OVA archive, which holds disks",
    "android-sparse": "an Android sparse image",
}
_UNPACK = {
    "gzip": "gzip -d",
    "xz": "xz -d",
    "zstd": "zstd -d",
    "bzip2": "bzip2 -d",
    "lzma": "xz -d --format=lzma",
    "lz4": "lz4 -d",
    "lzip": "lzip -d",
    "lzop": "lzop -d",
    "zip": "unzip",
    "7z": "7z x",
    "rar": "unrar x",
    "ova": "tar -xf",
    "android-sparse": "simg2img",
}


def probe(head: bytes, tail: bytes) -> str:
    """The format of a file: ``raw``, ``qcow2`` or a foreign one.

    Args:
        head, tail: its first and last 512 bytes.
    """
    if head.startswith(b"QFI\xfb"):
        return "qcow" if head[4:8] == b"\0\0\0\x01" else "qcow2"
    for name, starts in _STARTS.items():
        if head.startswith(starts):
            return name
    if head[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2"
    if head[:3] == b"\x5d\0\0" and head[5:13] == b"\xff" * 8:
        return "lzma"
    if head[257:262] == b"ustar" and head[:100].rstrip(b"\0").endswith(b".ovf"):
        return "ova"
    if _is_vmdk_text(head):
        return "vmdk"
    return next((name for name, mark in _ENDS.items() if tail.startswith(mark) or tail[1:].startswith(mark)), "raw")


def _is_vmdk_text(head: bytes) -> bool:
    """A VMDK descriptor: ``version=`` after comments and empty lines, as QEMU looks for it (block/vmdk.c)."""
    for line in head.splitlines():
        if not line.startswith(b"#") and line.strip(b" "):
            return line in (b"version=1", b"version=2", b"version=3")
    return False


def detect(file: File) -> str:
    """:func:`probe` of an open file. Raises OSError."""
    size = file.size()
    return probe(read_bytes(file, 0, EDGE), read_bytes(file, size - EDGE, EDGE) if size > EDGE else b"")


def refuse_foreign(form: str, path: str) -> None:
    """Raise ConfigError for a format that is neither raw nor qcow2."""
    if form in ("raw", "qcow2"):
        return
    what = _NAMES.get(form, f"a file compressed with {form}")
    how = f"{_UNPACK[form]} {path}" if form in _UNPACK else f"qemu-img convert -O qcow2 {path} NEW.qcow2"
    raise ConfigError(
        f"{what}: only raw and qcow2 are supported. Convert it ({how}), or say format=raw to use its bytes as they are",
        file=path,
    )


def shown(text: str) -> str:
    """Text of an image's, which may be hostile, for a line or a terminal: what is not printable as escapes."""
    return "".join(map(_printable, text))


def _printable(one: str) -> str:
    if one.isprintable():
        return one
    if "\udc80" <= one <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(one) - 0xDC00:02x}"
    return one.encode("unicode_escape").decode()

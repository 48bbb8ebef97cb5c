"""The "newc" cpio format of initramfs images (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from attrs import field
from attrs.validators import ge, le
from cardcage.errors import ConfigError
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FIELD_MAX", "Entry", "device", "directory", "file", "pack", "parse", "symlink"]

MAGIC = b"070701"
HEADER = 110
TRAILER = "TRAILER!!!"
FIELD_MAX = 0xFFFFFFFF


@frozen
class Entry:
    """One file of an archive. Numbers are 32 bits.

    Attributes:
        name: path without a leading slash. mode: type and permission bits, as ``st_mode``.
        data: contents, or a symbolic link's target.
        device: major and minor number of a device node.
    """

    name: str
    mode: int = field(validator=[ge(0), le(FIELD_MAX)])
    data: bytes = field(default=b"", repr=False)
    device: tuple[int, int] = (0, 0)
    uid: int = 0
    gid: int = 0
    mtime: int = 0


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | mode)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """Write an archive. Parent directories that no earlier entry made are added; inode numbers count from 1.

    The same entries always give the same bytes. Raises ConfigError for a name that is empty, absolute, or has ``..``.
    """
    out = bytearray()
    made: set[str] = set()
    count = 0
    for entry in entries:
        parts = entry.name.split("/")
        if not all(parts) or ".." in parts or "\0" in entry.name or len(entry.data) > FIELD_MAX:
            raise ConfigError(f"{entry.name!r} cannot be a name in an initramfs: expected a clean relative path")
        parents = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        for one in [*(directory(parent) for parent in parents if parent not in made), entry]:
            made.add(one.name)
            count += 1
            _put(out, one, count)
    _put(out, Entry(TRAILER, 0), 0)
    return bytes(out)


def _put(out: bytearray, entry: Entry, inode: int) -> None:
    name = entry.name.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (
        *(inode, entry.mode, entry.uid, entry.gid, links, entry.mtime, len(entry.data), 0, 0),
        *(*entry.device, len(name), 0),
    )
    out += MAGIC + b"".join(b"%08x" % number for number in numbers) + name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)


def parse(data: bytes, path: str = "initramfs") -> list[Entry]:
    """Read an archive, or several joined with zero padding. Raises ConfigError naming *path* for what is none."""
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if at + size > len(data):
            raise ConfigError(f"truncated cpio archive: expected {what} at {at:#x}+{size:#x}", file=path)
        at += size
        return data[at - size : at]

    entries: list[Entry] = []
    ended = False
    while at < len(data):
        if data[at] == 0 and (ended or not entries):
            at += 1
            continue
        head = take(HEADER, "a header")
        if head[:6] != MAGIC:
            raise ConfigError(f"not a newc cpio archive: expected the magic 070701 at {at - HEADER:#x}", file=path)
        try:
            numbers = [int(head[spot : spot + 8].decode("ascii"), 16) for spot in range(6, HEADER, 8)]
            if any(number < 0 for number in numbers):
                raise ValueError
        except ValueError:
            raise ConfigError(f"damaged cpio header at {at - HEADER:#x}: expected hexadecimal", file=path) from None
        _, mode, uid, gid, _, mtime, size, _, _, major, minor, name_size, _ = numbers
        name = take(name_size, "a name").rstrip(b"\0").decode("utf-8", "surrogateescape")
        at += -at % 4
        body = take(size, "a file's data")
        at += -at % 4
        ended = name == TRAILER
        if not ended:
            entries.append(Entry(name, mode, body, (major, minor), uid, gid, mtime))
    if not ended:
        raise ConfigError("truncated cpio archive: expected TRAILER!!!", file=path)
    return entries

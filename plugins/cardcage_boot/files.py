"""Reading boot files: any problem with a file is a ConfigError that names it and what was expected."""

from __future__ import annotations

import os
import stat
import struct
from contextlib import suppress
from weakref import WeakValueDictionary

from cardcage.config import beside
from cardcage.errors import ConfigError
from cardcage.files import read_file
from cardcage.values import frozen

__all__ = ["MAX_FILE", "BootFile", "joined", "open_file", "unpacked"]

MAX_FILE = 2 << 30
"""The most that is read of one boot file, in bytes."""
CHUNK = 256 << 10


@frozen
class BootFile:
    """A file's bytes with checked little-endian access.

    Attributes:
        path: for error messages. name: as the configuration has it, which guests are told.
        data: the whole file.
        kind: what the reader takes it for (``"bzImage"``), for error messages.
    """

    path: str
    data: bytes
    kind: str = "file"
    name: str = ""

    def error(self, problem: str) -> ConfigError:
        """A ConfigError about this file, to raise."""
        return ConfigError(problem, file=self.path)

    def check(self, offset: int, size: int, what: str) -> None:
        """Raise ConfigError when the file does not hold *size* bytes at *offset*."""
        if offset < 0 or size < 0 or offset + size > len(self.data):
            raise self.error(
                f"truncated {self.kind}: expected {what} at {offset:#x}+{size:#x}, "
                f"the file has {len(self.data):#x} bytes"
            )

    def bytes(self, offset: int, size: int, what: str) -> bytes:
        """Exactly *size* bytes at *offset*. Raises ConfigError when the file is shorter."""
        self.check(offset, size, what)
        return self.data[offset : offset + size]

    def unpack(self, form: str, offset: int, what: str) -> tuple[int, ...]:
        """Integers by a :mod:`struct` format without its byte order mark."""
        layout = struct.Struct("<" + form)
        return layout.unpack(self.bytes(offset, layout.size, what))

    def u16(self, offset: int, what: str) -> int:
        """A 16-bit integer."""
        return self.unpack("H", offset, what)[0]

    def u32(self, offset: int, what: str) -> int:
        """A 32-bit integer."""
        return self.unpack("I", offset, what)[0]


_kept: WeakValueDictionary[tuple[str, str], BootFile] = WeakValueDictionary()
"""Files that images in this process hold for resets, by name and kind: machines of one kernel are to have it once.
They are compared each time, as a path may lead to other bytes."""


def _kept_of(path: str, name: str, kind: str) -> BootFile | None:
    """What is held of a file that is as it was."""
    held = _kept.get((name, kind))
    with suppress(OSError, ValueError):  # whoever reads it says so
        if held is not None and held.path == path and stat.S_ISREG(os.stat(path).st_mode):
            at = 0
            with open(path, "rb", buffering=0) as stream:
                while (part := stream.read(CHUNK)) and held.data.startswith(part, at):
                    at += len(part)
            if not part and at == len(held.data):
                return held
    return None


def _keep(file: BootFile) -> BootFile:
    _kept[file.name, file.kind] = file
    return file


def open_file(path: str, kind: str) -> BootFile:
    """Read a whole file; or have it of an image in this process that holds the same bytes.

    Raises ConfigError when it cannot be read, is empty, or is above :data:`MAX_FILE`.
    """
    name, path = str(path), beside(path)
    if (held := _kept_of(path, name, kind)) is not None:
        return held
    data = read_file(path, MAX_FILE, kind)
    if not data:
        raise ConfigError(f"the file is empty: expected a {kind}", file=path)
    return _keep(BootFile(path, data, kind, name))


def joined(parts: list[BootFile]) -> bytes:
    """The contents one after another, each padded to 4 bytes: archives as Linux reads them from one initrd."""
    return b"".join(part.data + bytes(-len(part.data) % 4) for part in parts)


def unpacked(file: BootFile) -> BootFile:
    """Return the contents of a gzip file (Debian's Xen and GNU Mach), and any other file as it is.

    Raises ConfigError for a damaged file, and for more than :data:`MAX_FILE` bytes.
    """
    if file.data[:3] != b"\x1f\x8b\x08":
        return file
    import zlib  # only who has such a kernel pays for it

    made = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        data = made.decompress(file.data, MAX_FILE + 1)
    except zlib.error as error:
        raise file.error(f"damaged gzip file: {error}") from error
    if len(data) > MAX_FILE:
        raise file.error(f"unpacks to more than {MAX_FILE >> 30} GiB: expected a {file.kind}")
    if not made.eof:
        raise file.error(f"truncated gzip file: expected a {file.kind}")
    return BootFile(file.path, data, file.kind, file.name)

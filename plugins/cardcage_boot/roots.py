"""Root file systems for ``Machine.debian(root=...)``: a directory is shared; tar archives and OCI images become a cpio.

An image layout is that of the OCI image specification 1.0: ``oci-layout``, ``index.json`` and ``blobs``.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardcage.errors import ConfigError

from cardcage_boot import cpio

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["IMAGE", "image", "is_image"]

IMAGE = "image"
"""The directory of the initramfs that is the root."""
MOST = 2 << 30
"""Bytes of all files of an image: it lies in the guest's memory."""
ENTRIES = 1_000_000
"""Members of all archives."""
HEADER_MOST = 1 << 20
"""Bytes of a member's headers: tarfile keeps them, whatever size they say they have."""
PIECE = 1 << 19
"""Bytes of a file that are read at once."""
PATH_MAX = 4096 - len("image/") - 4
"""Bytes of a name: Linux passes over longer ones of an initramfs without a word."""
JSON_MOST = 4 << 20
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError)
OPENERS: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
    (b"\x5d\0\0", lzma.open),
)
"""The beginnings of compressed archives."""
TYPES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK, tarfile.FIFOTYPE: stat.S_IFIFO}


def is_image(path: Path) -> bool:
    """True for an OCI image layout and for a file, which then has to be a tar archive; a directory is shared.

    Raises ConfigError where nothing is there.
    """
    if not path.exists():
        raise ConfigError("expected a directory, a tar archive or an OCI image layout", file=str(path), key="root")
    return path.is_file() or (path / "oci-layout").is_file()


def image(path: Path) -> bytes:
    """A cpio archive with all that is in an image, below :data:`IMAGE`. Raises ConfigError for a damaged one."""
    tree = Tree()
    for layer in [path] if path.is_file() else _layers(path):
        tree.add(layer)
    return cpio.pack(tree.entries())


class Tree:
    """Files by their names, as layers one upon the other leave them."""

    def __init__(self) -> None:
        self._files: dict[str, cpio.Entry] = {}
        self._below: dict[str, set[str]] = {}
        self._left, self._members = MOST, 0

    def entries(self) -> Iterator[cpio.Entry]:
        """All, directories before what is in them."""
        yield cpio.directory(IMAGE)
        yield from (self._files[name] for name in sorted(self._files, key=lambda name: name.split("/")))

    def add(self, path: Path) -> None:
        """Put a layer on top."""
        try:
            with _opened(path) as opened:
                file: Any = Bounded(opened)
                archive, new = tarfile.TarFile(fileobj=file), set[str]()
                for member in archive:
                    self._member(path, archive, member, new)
                    file.left = HEADER_MOST
        except ConfigError:
            raise
        except DAMAGED as error:
            raise ConfigError(f"not a tar archive that can be read: {error}", file=str(path), key="root") from error

    def _member(self, path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, new: set[str]) -> None:
        self._members += 1
        if self._members > ENTRIES:
            raise ConfigError(f"more than {ENTRIES} files", file=str(path), key="root")
        if member.size < 0:  # before tarfile looks for the next one behind it
            raise tarfile.ReadError(f"{member.name}: a size of {member.size} bytes")
        name = _clean(path, member.name)
        folder, _, last = name.rpartition("/")
        if last == OPAQUE:
            return self._remove(folder, new, below=True)
        if last.startswith(WHITEOUT):
            return self._remove(f"{folder}/{last.removeprefix(WHITEOUT)}".lstrip("/"), new)
        if not name:
            return None
        if not member.isdir():
            self._remove(name, new)
        new.add(name)
        self._files[name] = self._entry(path, archive, member, f"{IMAGE}/{name}")
        while name and name not in (beside := self._below.setdefault(name.rpartition("/")[0], set())):
            beside.add(name)
            name = name.rpartition("/")[0]
        return None

    def _entry(self, path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> cpio.Entry:
        mode, data, device = member.mode & 0o7777, b"", (0, 0)
        if member.isdir():
            mode |= stat.S_IFDIR
        elif member.issym():
            mode, data = stat.S_IFLNK | 0o777, os.fsencode(member.linkname)
            self._take(path, len(data))
        elif member.islnk():
            linked = self._files.get(_clean(path, member.linkname))
            if linked is None:
                raise ConfigError(f"{member.name}: a link to {member.linkname}, which is not there", file=str(path))
            self._take(path, len(linked.data))  # an archive has it once for each name
            mode, data = linked.mode, linked.data
        elif member.isreg():
            self._take(path, member.size)
            mode, data = mode | stat.S_IFREG, _contents(archive, member)
        elif member.type in TYPES:
            mode, device = mode | TYPES[member.type], (member.devmajor, member.devminor)
            if not all(0 <= one <= cpio.FIELD_MAX for one in device):
                raise tarfile.ReadError(f"{member.name}: a device {device[0]}:{device[1]}")
        else:
            raise ConfigError(f"{member.name}: a file of a type {member.type!r}", file=str(path), key="root")
        uid, gid, when = (min(max(int(one), 0), cpio.FIELD_MAX) for one in (member.uid, member.gid, member.mtime))
        return cpio.Entry(name, mode, data, device, uid, gid, when)

    def _take(self, path: Path, size: int) -> None:
        self._left -= size
        if self._left < 0 or size > cpio.FIELD_MAX:
            raise ConfigError(f"more than {MOST >> 30} GiB of files", file=str(path), key="root")

    def _remove(self, name: str, new: set[str], *, below: bool = False) -> None:
        """Remove what lower layers have at *name*, or only what they have below it."""
        found = [name]
        for one in found:  # and what is below that, until no more is added
            found += self._below.get(one, ())
        for one in reversed(found[1:] if below else found):
            if one not in new:
                self._files.pop(one, None)
            if one not in self._files and not self._below.get(one):
                self._below.pop(one, None)
                self._below.get(one.rpartition("/")[0], set()).discard(one)


class Bounded:
    """The file that tarfile reads: at most *left* bytes until somebody allows more."""

    def __init__(self, file: Any) -> None:
        self._file, self.left = file, HEADER_MOST
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Raises ReadError for more than are left, or all."""
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers of more than {HEADER_MOST} bytes")
        self.left -= size
        return bytes(self._file.read(size))


def _opened(path: Path) -> Any:
    """The file, as its decompressor has it."""
    with path.open("rb") as file:
        head = file.read(8)
    return next((make(path) for begins, make in OPENERS if head.startswith(begins)), None) or path.open("rb")


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    data, file = bytearray(), archive.extractfile(member)
    below: Any = archive.fileobj
    while file is not None:
        below.left = HEADER_MOST
        if not (piece := file.read(PIECE)):
            break
        data += piece
    return bytes(data)


def _clean(path: Path, name: str) -> str:
    """A member's name as a relative path. Raises ConfigError for one that leads out."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name or len(os.fsencode(name)) > PATH_MAX:
        raise ConfigError(f"a file called {name[:100]!r}: expected a path inside the image", file=str(path), key="root")
    return "/".join(parts)


def _layers(path: Path) -> Iterator[Path]:
    """The layers of an image layout, the lowest first, each checked. Raises ConfigError."""
    index = _json(path, path / "index.json")
    for _ in range(4):  # an index may name another
        manifests = _list(path, index, "manifests")
        fitting = [one for one in manifests if _platform(one) in (("linux", "amd64"), ("", ""))]
        if not fitting:
            raise ConfigError("no image for linux/amd64 in it", file=str(path), key="root")
        index = _json(path, _blob(path, fitting[0]))
        if "layers" in index:
            break
    for one in _list(path, index, "layers"):
        if str(one.get("mediaType", "")).endswith("+zstd"):
            raise ConfigError("a layer compressed with zstd: expected gzip or none", file=str(path), key="root")
        yield _blob(path, one)


def _platform(manifest: dict[str, Any]) -> tuple[str, str]:
    found = manifest.get("platform")
    found = found if isinstance(found, dict) else {}
    return str(found.get("os", "")), str(found.get("architecture", ""))


def _list(path: Path, table: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = table.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f'expected an OCI image layout, whose JSON has a list "{name}"', file=str(path), key="root")
    return found


def _blob(path: Path, descriptor: dict[str, Any]) -> Path:
    """The file of a descriptor, whose digest is right."""
    form, _, digest = str(descriptor.get("digest", "")).partition(":")
    if form != "sha256" or len(digest) != 64 or not all(one in "0123456789abcdef" for one in digest):
        raise ConfigError(f"a digest {descriptor.get('digest')!r}: expected sha256", file=str(path), key="root")
    blob = path / "blobs" / "sha256" / digest
    try:
        with blob.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(blob), key="root") from error
    if found != digest:
        raise ConfigError("damaged: its digest is not that of its name", file=str(blob), key="root")
    return blob


def _json(path: Path, file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(JSON_MOST))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"not the JSON of an OCI image layout: {error}", file=str(file), key="root") from error
    if not isinstance(found, dict):
        raise ConfigError("not the JSON of an OCI image layout: expected an object", file=str(path), key="root")
    return found

"""Disks of the same point: copied while the guest stands still, and shown to restored machines through an overlay.

Where the file system shares blocks between files (XFS, btrfs, bcachefs) a copy costs nothing, else what an image has is
copied. An image that stands on others is flattened. A disk that the guest only reads stays where it is; a block device
is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any

from attrs import frozen
from cardcage.abilities import has
from cardcage.backends import BlockBackend
from cardcage.config import beside
from cardcage.errors import ConfigError, StateError
from cardcage_block.make import Qcow2Shape, create_qcow2
from cardcage_block.private import CopiedImage

from cardcage_snapshot.hostcalls import clone, copy_range
from cardcage_snapshot.manifest import Disk
from cardcage_snapshot.pages import file_runs
from cardcage_snapshot.tables import ids_of

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage.machine import Machine

    from cardcage_snapshot.manifest import Manifest
    from cardcage_snapshot.places import Folder, Publication

__all__ = ["DiskCopy", "file_sum", "image_of", "overlays", "plan_disks", "settle_disks", "unchanged"]

KEY = "drive"
"""The option of a device that names its block back end."""
PIECE = 1 << 20
KEPT = ("cache", "discard", "locking", "readonly")
"""Options of a drive that its overlay has too."""
IMAGES = ("drive", "raw", "qcow2")
"""Block back ends that are image files."""
MAGIC = b"QFI\xfb"


@frozen
class DiskCopy:
    """The fate of one disk.

    Attributes:
        device: id. backend: the open back end. path: the image's, empty where the back end is another card's.
        format: of the copy. plain: the image is one file, copied as it is. kept: the guest only reads it.
    """

    device: str
    backend: Any
    path: str
    format: str
    plain: bool
    kept: bool

    @property
    def room(self) -> int:
        """Bytes that a copy takes at most."""
        if self.kept:
            return 0
        return os.stat(self.path).st_blocks * 512 if self.plain else int(self.backend.info.size)

    @property
    def file(self) -> str:
        """Name of the copy; empty where there is none."""
        return "" if self.kept else f"disk-{self.device}.{self.format}"

    def take(self, fd: int) -> Disk:
        """Copy it, flushed, into file *fd*. The guest stands still. Raises OSError."""
        info = self.backend.info
        if self.kept:
            about = os.stat(self.path)
            made = Disk(self.device, self.format, info.size, about.st_size)
            made.path, made.modified = self.path, about.st_mtime_ns
            return made
        self.backend.flush()
        if self.plain:
            self._copy(fd)
        else:
            self._flatten(fd, info.size)
        return Disk(self.device, self.format, info.size, os.fstat(fd).st_size, self.file, path=self.path)

    def _copy(self, target: int) -> None:
        source = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if clone(source, target):
                return
            size = os.fstat(source).st_size
            os.ftruncate(target, size)
            for offset, length in file_runs(source, size):
                copy_range(source, target, offset, length)
        finally:
            os.close(source)

    def _flatten(self, target: int, size: int) -> None:
        os.ftruncate(target, size)
        piece = bytearray(PIECE)
        for at in range(0, size, PIECE):
            part = memoryview(piece)[: min(PIECE, size - at)]
            self.backend.readv(at, [part])
            if any(part):
                os.pwrite(target, part, at)


def plan_disks(machine: Machine) -> list[DiskCopy]:
    """The disks of a machine. Raises StateError in one line for one that cannot be saved; nothing is done yet."""
    found = []
    named = dict(zip(ids_of(machine), machine.config.devices, strict=True))
    for plugged in machine.devices.values():
        disks = [one for one in plugged.slot.host.opened if has(one, BlockBackend)]
        if not disks:
            continue
        config = named.get(plugged.id)
        spec = config.options.get(KEY) if config is not None else None
        if len(disks) > 1 or spec is None:
            raise StateError(
                f'device "{plugged.id}" ({plugged.type}) cannot be saved: its key "{KEY}" does not name its disk'
            )
        found.append(_plan(plugged.id, disks[0], spec, config.options if config else {}))
    return found


def image_of(spec: Any) -> tuple[str, dict[str, Any], str]:
    """The kind of a drive, its options, and the path of its image; that is empty where it is another card's."""
    table = {"file": spec} if isinstance(spec, str) else dict(spec)
    kind = str(table.get("type", "drive"))
    if isinstance(spec, str) and (head := spec.partition(":")[0]) in IMAGES and not os.path.lexists(beside(spec)):
        kind, table = head, {"file": spec.removeprefix(f"{head}:")}
    return kind, table, beside(table["file"]) if kind in IMAGES and isinstance(table.get("file"), str) else ""


def _plan(id: str, backend: Any, spec: Any, options: dict[str, Any]) -> DiskCopy:
    kind, table, path = image_of(spec)
    if path and isinstance(backend, CopiedImage) and not backend.is_at(path):
        path = ""  # a forked machine's own copy, or replaced since: what is there now is another's
    readonly = backend.info.readonly or bool(options.get("readonly"))
    if not path or not os.path.lexists(path):
        return DiskCopy(id, backend, "", "raw", False, False)
    if not stat.S_ISREG(os.stat(path).st_mode):
        if readonly:
            return DiskCopy(id, backend, os.path.abspath(path), "raw", False, True)
        raise StateError(f'device "{id}" cannot be saved: {path} is a block device, of which no copy can be made')
    try:
        with open(path, "rb") as file:
            header = file.read(112)
    except PermissionError:  # a jail, in which only what is open already can be read
        return DiskCopy(id, backend, os.path.abspath(path), "raw", False, readonly)
    form = str(table.get("format", "auto" if kind == "drive" else kind))
    if form == "auto":
        form = "qcow2" if header.startswith(MAGIC) else "raw"
    stands_on = form == "qcow2" and int.from_bytes(header[8:16], "big")
    outside = form == "qcow2" and header[4:8] == b"\0\0\0\3" and header[79] & 4  # an external data file
    plain = not stands_on and not outside
    return DiskCopy(id, backend, os.path.abspath(path), form if plain or readonly else "raw", plain, readonly)


def file_sum(fd: int) -> str:
    """The sum of a file: of where it has data, and of these bytes."""
    found, size = hashlib.blake2b(digest_size=16), os.fstat(fd).st_size
    for at in range(0, size, PIECE):
        data = os.pread(fd, PIECE, at)
        if any(data):
            found.update(at.to_bytes(8, "little"))
            found.update(data)
    found.update(size.to_bytes(8, "little"))
    return found.hexdigest()


def settle_disks(into: Publication, disks: list[Disk]) -> None:
    """Put the copies on stable storage, and note their sums. The guest runs. Raises OSError."""
    for one in disks:
        if one.file:
            fd = into.open(one.file)
            try:
                os.fsync(fd)
                one.sum = file_sum(fd)
            finally:
                os.close(fd)


def overlays(folder: Folder, manifest: Manifest, tables: dict[str, Any], target: Path) -> None:
    """Point the devices of *tables* to overlays in directory *target* over a snapshot's disks; they are made.

    Raises ConfigError that names the disk.
    """
    devices = {str(one.get("id")): one for one in tables.get("device", []) if isinstance(one, dict)}
    for disk in manifest.disks:
        device = devices.get(disk.device)
        if device is None or KEY not in device:
            raise ConfigError(f'no device "{disk.device}" with a {KEY} in the configuration', file=str(folder.path))
        if not disk.file:
            unchanged(disk)
            continue
        fd = folder.open(disk.file)
        there = os.fstat(fd).st_size
        os.close(fd)
        if there != disk.length:
            raise ConfigError(f"has {there} bytes: expected {disk.length}", file=folder.where(disk.file))
        path = target / f"{disk.device}.qcow2"
        if not path.exists():
            base = os.path.realpath(folder.where(disk.file))
            create_qcow2(str(path), disk.size, Qcow2Shape(backing_file=base, backing_format=disk.format))
        old = device[KEY]
        kept = {key: old[key] for key in KEPT if key in old} if isinstance(old, dict) else {}
        device[KEY] = {**kept, "type": "drive", "file": str(path), "format": "qcow2", "backing": [str(folder.path)]}


def unchanged(disk: Disk) -> None:
    """Raises ConfigError unless a disk that a snapshot has not is as it was."""
    try:
        about = os.stat(disk.path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'the disk of device "{disk.device}" is not there: {why}', file=disk.path) from error
    if stat.S_ISREG(about.st_mode) and (about.st_size, about.st_mtime_ns) != (disk.length, disk.modified):
        raise ConfigError(
            f'the disk of device "{disk.device}", which the snapshot has not, was changed since', file=disk.path
        )

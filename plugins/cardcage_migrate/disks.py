"""Disks of a machine that moves: they stay where they are, and change hands.

A writable one lies on storage that both hosts share. The source lets go of it (what was written is stable, its lock is
off) right before it says COMMIT, and only then is it opened at the destination: nothing is cached there that is old.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen
from cardcage.abilities import has
from cardcage.backends import BlockBackend, BlockInfo
from cardcage.errors import ConfigError, HostError, StateError
from cardcage_snapshot.disks import image_of
from cardcage_snapshot.tables import ids_of

from cardcage_migrate.passport import MovedDisk, Stamp, boot_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cardcage.device import Slot
    from cardcage.machine import Machine

__all__ = ["Arriving", "ArrivingOptions", "Held", "Movable", "arrivals", "awaited", "checked", "held_disks"]
__all__ += ["open_arriving", "replaced"]

KEY = "drive"
"""The option of a device that names its block back end."""


class Movable(Protocol):
    """A block back end that can be written, and changes hands: another process opens the same disk later."""

    def may_move(self) -> str:
        """In one line why that cannot be; empty when it can."""

    def let_go(self) -> None:
        """The machine stands still: make all that was written stable, and let others have the disk. Raises OSError."""

    def take_back(self) -> None:
        """The machine goes on here after all. Raises HostError where another has the disk, and nothing is changed."""


class Held:
    """A writable disk at the source."""

    def __init__(self, device: str, backend: Any, path: str) -> None:
        self.device, self.backend, self.path = device, backend, path
        self._gone = False

    def described(self) -> MovedDisk:
        """The disk as the destination is told of it."""
        info, file = self.backend.info, []
        if self.path:
            about = os.stat(self.path)
            file = [about.st_dev, about.st_ino]
        return MovedDisk(
            self.device, info.size, info.block_size, info.discard, info.write_zeroes, self.path if file else "", file
        )

    def let_go(self) -> Stamp | None:
        """Let others have it. Returns what the image is then; None where there is none to look at. Raises OSError."""
        self._gone = True
        self.backend.let_go()
        return stamp(self.device, self.path)

    def take_back(self, left: Stamp | None) -> None:
        """It is this machine's again, unless it was changed since it was *left*. Raises HostError."""
        if self._gone:
            if left is not None and stamp(self.device, self.path) != left:
                raise HostError(f"{self.path}: another machine has written it since")
            self.backend.take_back()
            self._gone = False


def stamp(device: str, path: str) -> Stamp | None:
    """Marks by which a change of the image is seen; None for no regular file that can be looked at."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return None
    return Stamp(device, about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None


def held_disks(machine: Machine) -> list[Held]:
    """The disks that the guest can write. Raises StateError, in one line, for one that cannot change hands."""
    found, specs = [], dict(zip(ids_of(machine), machine.config.devices, strict=True))
    for plugged in machine.devices.values():
        disks: list[Any] = [one for one in plugged.slot.host.opened if has(one, BlockBackend) and not one.info.readonly]
        if not disks:
            continue
        config = specs.get(plugged.id)
        spec = config.options.get(KEY) if config is not None else None
        who = f'the disk of device "{plugged.id}" cannot move'
        if len(disks) > 1 or spec is None:
            raise StateError(f'{who}: its key "{KEY}" does not name it alone')
        if not has(disks[0], Movable):
            raise StateError(f"{who}: {type(disks[0]).__name__} does not say how it changes hands")
        if why := disks[0].may_move():
            raise StateError(f"{who}: {why}")
        path = image_of(original_spec(spec))[2]
        found.append(Held(plugged.id, disks[0], os.path.abspath(path) if path else ""))
    return found


def original_spec(spec: Any) -> Any:
    """The drive itself, also of a machine that has moved here."""
    while isinstance(spec, dict) and spec.get("type") == "arriving":
        spec = spec.get("disk")
    return spec


def checked(disks: list[Held], tables: dict[str, Any]) -> None:
    """Raise StateError for a disk that would be another there: *tables* is the configuration that goes along."""
    devices = {str(one.get("id")): one for one in tables.get("device", []) if isinstance(one, dict)}
    for one in disks:
        path = image_of(original_spec(devices.get(one.device, {}).get(KEY, "")))[2]
        here = os.path.abspath(path) if path else ""
        is_at = getattr(one.backend, "is_at", None)
        if here != one.path or (one.path and is_at is not None and not is_at(one.path)):
            what = "it is an overlay or a copy of this machine's own, which no other can open"
            raise StateError(f'the disk of device "{one.device}" cannot move: {what}')


# at the destination


@frozen
class ArrivingOptions:
    """Options of back end ``arriving``: what the source says of the disk, and what names it here.

    Attributes:
        disk: the drive, as the device's configuration has it. size, block_size: bytes. discard, write_zeroes: what it
            can do. Without a size, the image is looked at.
    """

    disk: str | dict[str, Any]
    size: int | None = None
    block_size: int = field(default=512)
    discard: bool = False
    write_zeroes: bool = False


class Arriving:
    """A disk that is another machine's until :meth:`arrive`; no guest runs before that."""

    def __init__(self, slot: Slot, options: ArrivingOptions) -> None:
        self._slot, self._options = slot, options
        if options.size is None:
            self.info = self._looked_at()
        else:
            self.info = BlockInfo(options.size, options.block_size, False, options.discard, options.write_zeroes)
        self._disk: Any = None
        self._tries = False, False

    @property
    def disk(self) -> str | dict[str, Any]:
        """The drive itself, as the device's configuration has it."""
        return self._options.disk

    def _looked_at(self) -> BlockInfo:
        """The disk's facts, of one that another machine may be writing: it is opened, and closed again."""
        spec, table = self._options.disk, image_of(self._options.disk)[1]
        image = bool(image_of(spec)[2])
        if image:  # without its lock, which the source has
            kind = image_of(spec)[0]
            spec = {**table, "type": kind, "readonly": True, "locking": "off"}
        host: Any = self._slot.host
        disk = host.open("block", spec)
        host.opened.remove(disk)
        disk.close()
        if not image:
            found: BlockInfo = disk.info
            return found
        discard = table.get("discard", "unmap") == "unmap"
        return BlockInfo(disk.info.size, disk.info.block_size, False, discard, True)

    def arrive(self) -> None:
        """Open it. Raises ConfigError or HostError where it cannot be had, or is another than the source's."""
        if self._disk is not None:
            return
        host: Any = self._slot.host
        before = len(host.opened)
        disk = host.open("block", self._options.disk)
        if disk.info != self.info:
            while len(host.opened) > before:
                host.opened.pop().close()
            what = f"a disk of {self.info.size} bytes at the source, of {disk.info.size} here"
            raise HostError(f'device "{self._slot.id}": its disk is not shared: {what}')
        self._disk, self._tries = disk, (hasattr(disk, "try_readv"), hasattr(disk, "try_writev"))
        host.opened[:] = [one for one in host.opened if one is not self]

    def readv(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """See :class:`cardcage.backends.BlockBackend`."""
        self._disk.readv(offset, buffers)

    def try_readv(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """See :class:`cardcage.backends.TryReads`."""
        return self._tries[0] and bool(self._disk.try_readv(offset, buffers))

    def writev(self, offset: int, buffers: Sequence[memoryview], /) -> None:
        """See :class:`cardcage.backends.BlockBackend`."""
        self._disk.writev(offset, buffers)

    def try_writev(self, offset: int, buffers: Sequence[memoryview], /) -> bool:
        """See :class:`cardcage.backends.TryWrites`."""
        return self._tries[1] and bool(self._disk.try_writev(offset, buffers))

    def flush(self) -> None:
        """See :class:`cardcage.backends.BlockBackend`."""
        self._disk.flush()

    def discard(self, offset: int, length: int, /) -> None:
        """See :class:`cardcage.backends.BlockBackend`."""
        self._disk.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, /, *, unmap: bool) -> None:
        """See :class:`cardcage.backends.BlockBackend`."""
        self._disk.write_zeroes(offset, length, unmap=unmap)

    def grow(self, size: int, /) -> None:
        """Make the disk *size* bytes long. Raises OSError where it does not."""
        if not hasattr(self._disk, "grow"):
            raise OSError(errno.EOPNOTSUPP, "its drive is of a kind that has one size")
        self._disk.grow(size)
        self.info = self._disk.info

    def close(self) -> None:
        """The disk itself is closed by the device that opened it."""


def open_arriving(slot: Slot, options: ArrivingOptions) -> Arriving:
    """Back end ``block:arriving``."""
    return Arriving(slot, options)


def replaced(tables: dict[str, Any], disks: list[MovedDisk], host: str) -> None:
    """Let the devices of *tables* wait for their *disks*. Raises ConfigError for one that is not here.

    Args:
        host: boot id of the source's host.
    """
    devices = {str(one.get("id")): one for one in tables.get("device", []) if isinstance(one, dict)}
    for disk in disks:
        device = devices.get(disk.device)
        if device is None or KEY not in device:
            raise ConfigError(f'no device "{disk.device}" with a {KEY} in the configuration')
        spec = original_spec(device[KEY])
        _shared(disk, spec, host)
        device[KEY] = {
            "type": "arriving",
            "disk": spec,
            "size": disk.size,
            "block_size": disk.block_size,
            "discard": disk.discard,
            "write_zeroes": disk.write_zeroes,
        }


def awaited(machine: Machine, disks: list[MovedDisk], host: str) -> None:
    """Hold the *disks* that come to those that *machine*, which is built, waits for. Raises ConfigError."""
    waiting = {
        plugged.id: one
        for plugged in machine.devices.values()
        for one in plugged.slot.host.opened
        if isinstance(one, Arriving)
    }
    there, here = sorted(one.device for one in disks), sorted(waiting)
    if there != here:
        theirs, ours = (", ".join(one) or "none" for one in (there, here))
        raise ConfigError(f"the devices whose disks come are {theirs}; those that wait for one here are {ours}")
    for disk in disks:
        info = waiting[disk.device].info
        if (disk.size, disk.block_size) != (info.size, info.block_size):
            what = f"a disk of {disk.size} bytes at the source, of {info.size} here"
            raise ConfigError(f'the disk of device "{disk.device}" is not shared: {what}')
        _shared(disk, original_spec(waiting[disk.device].disk), host)


def _shared(disk: MovedDisk, spec: Any, host: str) -> None:
    """Raises ConfigError where the image that is named here is another than that of the source's disk."""
    path = image_of(spec)[2]
    if not path:
        return
    try:
        about = os.stat(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f'the disk of device "{disk.device}" is not shared: {path}: {why}') from error
    if host and host == boot_id() and disk.file and disk.file != [about.st_dev, about.st_ino]:
        raise ConfigError(f'the disk of device "{disk.device}" is not shared: {path} is another file')


def arrivals(machine: Machine, stamps: Sequence[Stamp]) -> None:
    """Take the disks that the source let go of. Raises ConfigError or HostError; then none of them is kept."""
    left = {one.device: one for one in stamps}
    for plugged in machine.devices.values():
        for one in list(plugged.slot.host.opened):
            if isinstance(one, Arriving):
                path = image_of(original_spec(one.disk))[2]
                theirs, here = left.get(plugged.id), stamp(plugged.id, path)
                if theirs is not None and here is not None and here != theirs:
                    raise HostError(
                        f'the disk of device "{plugged.id}" is not shared: {path} differs from the source\'s'
                    )
                with machine.lock:
                    one.arrive()

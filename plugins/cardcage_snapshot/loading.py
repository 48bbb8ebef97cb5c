"""A snapshot loaded into a machine that is there: its RAM, state and disks are again as they were.

The machine keeps its configuration and its own images: what differs is written into these. So this is no single step:
where it fails in the middle, the machine is good for nothing but to be loaded again, and ends.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from cardcage.abilities import has
from cardcage.backends import BlockBackend
from cardcage.errors import FAULTS, ConfigError, HostError, StateError
from cardcage.machine import State
from cardcage.ram import PAGE
from cardcage.security import OPERATOR, Act
from cardcage_block.drive import Drive, open_image

from cardcage_snapshot.chain import Chain
from cardcage_snapshot.creating import may_read, savable
from cardcage_snapshot.disks import unchanged
from cardcage_snapshot.manifest import read
from cardcage_snapshot.places import Folder
from cardcage_snapshot.restoring import check_files, read_state
from cardcage_snapshot.state import fits, restore

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage.machine import Machine

    from cardcage_snapshot.manifest import Disk, Manifest
    from cardcage_snapshot.state import MachineState

__all__ = ["load"]

PIECE = 1 << 20


def load(machine: Machine, path: Path, *, any_cpu: bool = False) -> Manifest:
    """Put *machine* back to the snapshot at *path*. One that runs goes on from there, a paused one stays so, and one
    that is built waits for ``start(boot=False)``.

    Raises ConfigError for a snapshot of another machine, StateError, Denied: nothing has changed then. HostError for
    what went wrong in the middle: the machine ends.
    """
    if machine.state is State.STOPPED:
        raise StateError("cannot load a snapshot: the machine has ended")
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("load",), {"machine": machine.name}))
    may_read(machine, path)
    with ExitStack() as end, Folder(path) as folder:
        manifest, _ = read(folder)  # its configuration is not used: the machine has one
        saved = read_state(folder, manifest)
        block = savable(machine)
        if manifest.memory != block.size:
            what = f"has {manifest.memory} bytes of memory: the machine has {block.size}"
            raise ConfigError(what, file=folder.where("manifest.json"))
        chain = end.enter_context(Chain(folder, manifest))
        for level in chain.levels[:-1]:
            may_read(machine, level.folder.path)
        disks = [(one, _image(machine, folder, disk, end)) for one, disk in _disks(machine, folder, manifest)]
        for (device, backend), image in disks:
            if image is not None and image.info.size != backend.info.size:
                what = f'the disk of device "{device}" has {image.info.size} bytes: the machine\'s {backend.info.size}'
                raise ConfigError(what, file=str(path))
        check_files(folder, manifest)
        ran = machine.state is State.RUNNING
        if ran:
            machine.pause()
        try:
            with machine.lock:
                fits(machine, saved, any_cpu=any_cpu)
        except BaseException:
            if ran:
                machine.resume()
            raise
        try:
            _load(machine, chain, saved, any_cpu)
            for (_, backend), image in disks:
                if image is not None:
                    _copy(image, backend)
        except FAULTS as error:
            ended = HostError(f"{machine.name}: its snapshot was loaded in part: {error}")
            machine.fail(ended)
            raise ended from error
        if ran:
            machine.resume()
        return manifest


def _disks(machine: Machine, folder: Folder, manifest: Manifest) -> list[tuple[tuple[str, Any], Disk]]:
    """The machine's disks, by their devices, with what the snapshot has of them. Raises ConfigError."""
    there = {}
    for plugged in machine.devices.values():
        if found := [one for one in plugged.slot.host.opened if has(one, BlockBackend)]:
            there[plugged.id] = found[0]
    theirs, ours = (", ".join(sorted(one)) or "none" for one in ([disk.device for disk in manifest.disks], there))
    if theirs != ours:
        raise ConfigError(f"has disks of devices {theirs}: the machine has {ours}", file=folder.where("manifest.json"))
    return [((disk.device, there[disk.device]), disk) for disk in manifest.disks]


def _image(machine: Machine, folder: Folder, disk: Disk, end: ExitStack) -> Any:
    """The disk's image in the snapshot; None for one that was only read, and is as it was. Raises ConfigError."""
    if not disk.file:
        unchanged(disk)
        return None
    os.close(folder.open(disk.file))  # a plain file in it
    kind: Any = disk.format
    drive = Drive(folder.where(disk.file), format=kind, readonly=True, locking="off", backing="none")
    return end.enter_context(closing(open_image(drive, warn=machine.log.warning)))


def _load(machine: Machine, chain: Chain, saved: MachineState, any_cpu: bool) -> None:
    """RAM, and then what finds its place in it."""
    block, at, written = machine.memory.ranges[0].block, 0, []
    for number in chain.numbers():
        data, start = chain.piece(number), number * chain.levels[0].ram.chunk
        written += _put(block.view, at, start, None)
        written += _put(block.view, start, start + len(data), data)
        at = start + len(data)
    written += _put(block.view, at, block.size, None)
    told = []
    for slot in machine.memory.slots:
        base = slot.host_address - block.host_address
        told += [(slot.address + one - base, PAGE) for one in written if base <= one < base + slot.size]
    machine.memory.written_many(told)
    restore(machine, saved, any_cpu=any_cpu)
    for plugged in machine.devices.values():
        for one in (*plugged.slot.host.opened, plugged.device):
            if (reverted := getattr(one, "reverted", None)) is not None:
                with machine.lock:
                    reverted()


def _put(view: memoryview, start: int, end: int, data: bytes | None) -> list[int]:
    """Make *start* to *end* of RAM as *data* has it, zeros without; returns the pages that differed."""
    found = []
    for at in range(start, end, PIECE):
        size = min(PIECE, end - at)
        wanted, now = bytes(size) if data is None else data[at - start : at - start + size], bytes(view[at : at + size])
        if now == wanted:
            continue
        pages = [one for one in range(0, size, PAGE) if now[one : one + PAGE] != wanted[one : one + PAGE]]
        for page in pages:
            view[at + page : at + page + PAGE] = wanted[page : page + PAGE]
        found += [at + page for page in pages]
    return found


def _copy(image: Any, backend: Any) -> None:
    """Write what differs into the machine's own disk. Raises OSError."""
    size = image.info.size
    ours, theirs = bytearray(PIECE), bytearray(PIECE)
    for at in range(0, size, PIECE):
        length = min(PIECE, size - at)
        one, two = memoryview(ours)[:length], memoryview(theirs)[:length]
        backend.readv(at, [one])
        image.readv(at, [two])
        if one != two:
            backend.writev(at, [two])
    backend.flush()

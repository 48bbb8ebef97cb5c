"""``vm.snapshot()``: all of a machine in a directory, at one point of its time."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from attrs import frozen
from cardcage.errors import ConfigError, HostError, StateError, UsageError
from cardcage.machine import State
from cardcage.registry import DeviceOffer
from cardcage.security import OPERATOR, Act
from cardcage.units import say_size

from cardcage_snapshot.chain import Chain, Changes, refuse_with_children
from cardcage_snapshot.disks import plan_disks, settle_disks
from cardcage_snapshot.manifest import MANIFEST, DeviceCard, File, Manifest, Ram, chunk_size, read, written
from cardcage_snapshot.pages import held, runs_of
from cardcage_snapshot.places import Folder, Publication, located
from cardcage_snapshot.ram import Copy, compressor, finish
from cardcage_snapshot.sealing import prepared
from cardcage_snapshot.state import capture, dumps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cardcage.host import Host
    from cardcage.machine import Machine
    from cardcage.ram import RamBlock

__all__ = ["STATE", "Plan", "Snapshot", "allowed", "cards_of", "completed", "has_agent", "may_read", "remove", "roomy"]
__all__ += ["savable", "since", "snapshot"]

STATE = "state.json"
SPARE = 16 << 20
"""Bytes that a snapshot takes besides RAM and disks, at most."""
_busy: WeakKeyDictionary[Machine, threading.Lock] = WeakKeyDictionary()


@frozen
class Snapshot:
    """A snapshot that was made.

    Attributes:
        path: its directory. machine: name. memory: bytes of RAM. stored: bytes that it takes on the disk.
        stood: seconds that the guest stood still for it.
    """

    path: Path
    machine: str
    memory: int
    stored: int
    stood: float


def snapshot(
    self: Machine,
    where: str | os.PathLike[str],
    *,
    compress: bool = False,
    replace: bool = False,
    parent: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """Save the machine, running or paused, and let it go on.

    Args:
        where: a name of letters, digits and ``. _ -``, kept below ``$XDG_STATE_HOME/cardcage/snapshots``; or the path
            of a directory that is made.
        compress: RAM with zstd (needs the extra ``zstd``): smaller, and unpacked whole by each who restores it.
        replace: one that is there; it is either the old or the new at any moment.
        parent: a snapshot in the same directory, by name or path, of a machine with as much memory. What RAM has in
            common with that one is not kept again, and both are needed to restore this one.

    The guest stands still while its state and the RAM that it ever touched are copied, and its disks.
    Raises StateError for a machine that has not started or has ended, or a device that cannot be saved, before anything
    is stopped; ConfigError where a snapshot is there already, or the parent does not fit; HostError where the host has
    no room; Denied.
    """
    with _busy.setdefault(self, threading.Lock()), ExitStack() as end:
        if compress:
            compressor()
        path = located(where)
        plan = Plan(self)
        allowed(self, path)
        changes = since(parent, path, int(self.config.machine.memory), end) if parent is not None else None
        for one in changes.paths if changes is not None else ():
            may_read(self, one)
        return _snapshot(plan, path, changes, compress=compress, replace=replace)


def since(parent: str | os.PathLike[str], path: Path, memory: int, end: ExitStack) -> Changes:
    """Changes of the snapshot that *path* is to be against *parent*. Raises ConfigError, UsageError.

    Args:
        memory: bytes of the machine. end: closes what is opened.
    """
    there = located(parent)
    if there.parent != path.parent or there == path:
        raise UsageError(f"{there}: expected a parent that lies beside {path}, and is another snapshot")
    folder = end.enter_context(Folder(there))
    manifest, _ = read(folder)
    if manifest.memory != memory or manifest.ram.chunk != chunk_size(memory):
        sizes = f"{say_size(manifest.memory)} of memory: the machine has {say_size(memory)}"
        raise ConfigError(f"cannot be the parent: it has {sizes}", file=str(there))
    return Changes(end.enter_context(Chain(folder, manifest)))


def _snapshot(plan: Plan, path: Path, changes: Changes | None, *, compress: bool, replace: bool) -> Snapshot:
    if replace:
        refuse_with_children(path)
    with Publication(path, replace=replace) as into:
        roomy(into, plan.room)
        files = {name: into.create(name) for name in plan.names}
        try:
            manifest, stood = plan.take(files)
        finally:
            for fd in files.values():
                os.close(fd)
        return completed(into, manifest, stood, changes, compress=compress)


class Plan:
    """All that is to be saved of a machine. Raises StateError for one that cannot be; nothing has happened by then.

    Attributes:
        names: of the files that :meth:`take` writes. room: bytes that they take, at most.
    """

    def __init__(self, machine: Machine) -> None:
        if machine.state not in (State.RUNNING, State.PAUSED):
            raise StateError(f"cannot save a snapshot: the machine is {machine.state}")
        self._machine, self._block, self._disks = machine, savable(machine), plan_disks(machine)
        self.names = ["ram", STATE, *(one.file for one in self._disks if one.file)]
        runs, below = runs_of(self._block)
        ram = held(runs) + (os.fstat(below).st_blocks * 512 if below >= 0 else 0)
        self.room = ram + SPARE + sum(one.room for one in self._disks)

    def take(self, files: Mapping[str, int]) -> tuple[Manifest, float]:
        """Write *files*, by their names. Returns the manifest so far, and the seconds that the guest stood still.

        Raises OSError, and what pausing and saving raise; the guest goes on then.
        """
        machine = self._machine
        tables, seal = prepared(machine)
        state = machine.state
        copy = Copy(files["ram"], self._block)
        try:
            copy.prepare()
            began = time.monotonic()
            if state is State.RUNNING:
                machine.pause()
            try:
                saved = capture(machine)
                copy.take()
                disks = [one.take(files.get(one.file, -1)) for one in self._disks]
            finally:
                if state is State.RUNNING and machine.state is State.PAUSED:
                    machine.resume()
            stood = time.monotonic() - began
        finally:
            copy.close()
        from importlib.metadata import version  # here, for start-up's sake: it takes what all of this does

        text = dumps(saved).encode()
        with open(files[STATE], "wb", closefd=False) as file:
            file.write(text)
        manifest = Manifest(
            version("cardcage"),
            time.time(),
            machine.name,
            machine.label,
            int(machine.config.machine.memory),
            len(machine.vcpus),
            machine.accelerator.name,
            tables,
            cards_of(machine),
            File(len(text), hashlib.blake2b(text, digest_size=16).hexdigest()),
            Ram("ram", "none", chunk_size(self._block.size)),
            seal,
            disks,
            has_agent(machine),
            _processor(),
            platform.release(),
        )
        return manifest, stood


def completed(
    into: Publication, manifest: Manifest, stood: float, changes: Changes | None, *, compress: bool
) -> Snapshot:
    """Finish the files that :meth:`Plan.take` wrote, and let them take their place. Raises OSError, ConfigError."""
    fd = into.open(STATE)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    settle_disks(into, manifest.disks)
    manifest.ram = finish(into, manifest.memory, compress=compress, changes=changes)
    written(manifest, into)
    stored = sum(os.stat(one, dir_fd=into.fd).st_blocks * 512 for one in os.listdir(into.fd))
    into.commit()
    return Snapshot(into.path, manifest.machine, manifest.memory, stored, stood)


def allowed(machine: Machine, path: Path) -> None:
    """Ask whether the machine may be saved there. Raises Denied."""
    machine.mediator.check(Act(OPERATOR, machine.label, "machine", ("save",), {"machine": machine.name}))
    facts = {"machine": machine.name, "readonly": False}
    machine.mediator.ask(Act(machine.label, machine.label, "image", ("create", "write"), facts), str(path))


def may_read(machine: Machine, path: Path) -> None:
    """Ask whether the machine may have what is in a snapshot. Raises Denied."""
    facts = {"machine": machine.name, "readonly": True}
    machine.mediator.ask(Act(machine.label, machine.label, "image", ("open", "read"), facts), str(path))


def remove(host: Host, path: Path) -> None:
    """Remove a snapshot. Raises ConfigError where there is none, HostError; Denied."""
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise ConfigError("there is no such snapshot", file=str(path))
    refuse_with_children(path)
    host.mediator.ask(Act(OPERATOR, OPERATOR, "image", ("write",), {"readonly": False}), str(path))
    hidden = path.with_name(f".{path.name}.{os.getpid()}-rm.new")  # half of one is no snapshot
    try:
        os.rename(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise HostError(f"{error.filename or path}: cannot be removed: {error.strerror}") from error


def roomy(into: Publication, wanted: int) -> None:
    """Raise HostError where the file system has not *wanted* bytes."""
    there = os.fstatvfs(into.fd)
    free = there.f_bavail * there.f_frsize
    if wanted > free:
        raise HostError(f"{into.path}: {say_size(wanted)} are needed, its file system has {say_size(free)} left")


def savable(machine: Machine) -> RamBlock:
    """The block of a machine's RAM, all of which is there. Raises StateError in one line for a machine that cannot be
    saved; HostError where some of it never comes.

    A device that has neither ``save`` nor ``reset`` has no state that a reset would put back, and needs none.
    """
    for one in machine.devices.values():
        if "state" not in one.abilities and "reset" in one.abilities:
            what = f'device "{one.id}" ({one.who.partition("(")[2].rstrip(")")}) cannot be saved'
            raise StateError(f"{machine.name}: {what}: it has no save() and load()")
    if (arrival := machine.services.get("arriving-ram")) is not None:
        arrival.complete()
    block = machine.memory.ranges[0].block
    for shown in machine.memory.ranges:
        if shown.block is not block and not shown.readonly:
            raise StateError(f'{machine.name}: memory "{shown.block.name}" of a device cannot be saved')
    return block


def cards_of(machine: Machine) -> list[DeviceCard]:
    """Whose the devices are."""
    found = []
    for one in machine.devices.values():
        offer = machine.host.registry.get(DeviceOffer, one.type)
        name, _, release = offer.distribution.partition(" ")
        found.append(DeviceCard(one.id, one.type, offer.card, name, release))
    return found


def has_agent(machine: Machine) -> bool:
    """True once an agent has greeted."""
    link = machine.services.get("agent")
    if link is None:
        return False
    try:
        link.await_agent(0)
    except Exception:  # whatever a card's link says, it is that none answers
        return False
    return True


def _processor() -> str:
    """The host's CPU model (proc_cpuinfo(5))."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""

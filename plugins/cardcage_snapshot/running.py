"""Snapshots of machines that run in another process, which may be in a jail: its files are made by who asks for it, and
come as descriptors along with the command.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from attrs import evolve
from cardcage.errors import HostError, UsageError
from cardcage_fleet import command, converse
from cardcage_fleet.control import DESCRIPTORS

from cardcage_snapshot.chain import refuse_with_children
from cardcage_snapshot.creating import Plan, allowed, completed, roomy, since
from cardcage_snapshot.manifest import Manifest, chunk_size, converter
from cardcage_snapshot.places import Publication
from cardcage_snapshot.ram import compressor

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage.machine import Machine
    from cardcage_fleet import RosterEntry, Session

    from cardcage_snapshot.creating import Snapshot

__all__ = ["create", "plan", "save"]

PATIENCE = 24 * 3600
"""Seconds that a machine may take to write itself down."""


def plan(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Command ``snapshot-plan``: ``{path}``; the names of the files that the machine is to be given, and their room.

    Also its memory in bytes.
    """
    path = arguments.get("path")
    if not isinstance(path, str) or arguments.keys() != {"path"}:
        raise UsageError("expected a path")
    from pathlib import Path

    made = Plan(machine)
    allowed(machine, Path(path))
    return {"names": made.names, "room": made.room, "memory": int(machine.config.machine.memory)}


def save(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Command ``snapshot``: ``{names}``, with as many descriptors. Returns manifest and time."""
    names, made, files = arguments.get("names"), Plan(machine), session.fds
    if names != made.names or len(files) != len(made.names) or arguments.keys() != {"names"}:
        raise UsageError(f"expected the names {made.names}, and a descriptor for each")
    try:
        manifest, stood = made.take(dict(zip(made.names, files, strict=True)))
    except OSError as error:
        raise HostError(f"the snapshot cannot be written: {error.strerror or error}") from error
    return {"manifest": converter().unstructure(manifest), "stood": stood}


def create(entry: RosterEntry, path: Path, *, compress: bool, replace: bool, parent: str | None = None) -> Snapshot:
    """Save the machine of *entry*. Raises what it raises, ConfigError and HostError as ``vm.snapshot``."""
    if compress:
        compressor()
    if replace:
        refuse_with_children(path)
    with ExitStack() as end, Publication(path, replace=replace) as into:
        told = command(entry, "snapshot-plan", {"path": str(path)})
        names, room, memory = told.get("names"), told.get("room"), told.get("memory")
        if not isinstance(names, list) or type(room) is not int or type(memory) is not int:
            raise _nonsense(entry)
        if len(names) > DESCRIPTORS:
            raise HostError(f"machine {entry.name} has more disks than can be saved at once")
        roomy(into, room)
        changes = since(parent, path, memory, end) if parent is not None else None
        files = [into.create(_checked(one, entry)) for one in names]
        try:
            with converse(entry, "snapshot", {"names": names}, PATIENCE, fds=files) as session:
                answer = session.told
        finally:
            for fd in files:
                os.close(fd)
        try:
            manifest, stood = converter().structure(answer.get("manifest"), Manifest), float(answer["stood"])
        except Exception as error:  # whatever a machine may answer
            raise _nonsense(entry) from error
        manifest = evolve(manifest, ram=evolve(manifest.ram, chunk=chunk_size(manifest.memory)))
        if manifest.memory != memory or {one.file for one in manifest.disks if one.file} - set(names):
            raise _nonsense(entry)
        return completed(into, manifest, stood, changes, compress=compress)


def _checked(name: object, entry: RosterEntry) -> str:
    if not isinstance(name, str) or "/" in name or not name[:1].isalnum() or len(name) > 128:
        raise _nonsense(entry)
    return name


def _nonsense(entry: RosterEntry) -> HostError:
    return HostError(f"machine {entry.name} (pid {entry.pid}) gave no answer that can be understood")

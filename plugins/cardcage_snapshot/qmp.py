"""Snapshots in the words of QEMU's monitors: ``savevm``, ``loadvm``, ``delvm``, ``info snapshots``, and jobs.

One of tag T and machine M is the snapshot M.T of this account (:func:`cardcage_snapshot.places.snapshot_root`): the
images have nothing of it. M is the name that the machine was given, whichever number was added to it because another
had that name: it finds its snapshots again. So of machines of one name that run at once, each may load the snapshots of
all, and replace or remove its own alone.
"""

from __future__ import annotations

import datetime
import fcntl
from contextlib import contextmanager
from glob import escape
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, HostError
from cardcage.machine import State
from cardcage.units import say_size
from cardcage_fleet import Roster
from cardcage_qmp import QmpError, Session
from cardcage_qmp.jobs import begin_job

from cardcage_snapshot.creating import remove, snapshot
from cardcage_snapshot.given import given_name
from cardcage_snapshot.loading import load
from cardcage_snapshot.manifest import MANIFEST, read
from cardcage_snapshot.places import Folder, located, snapshot_root
from cardcage_snapshot.restoring import read_state, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cardcage.machine import Machine

__all__ = ["delvm", "info_snapshots", "loadvm", "place", "savevm"]
__all__ += ["snapshot_delete", "snapshot_load", "snapshot_save"]


def place(machine: Machine, tag: str) -> Path:
    """Where the snapshot of *tag* is. Raises UsageError for a tag of other letters than ``A-Z a-z 0-9 . _ -``."""
    name = f"{given_name(machine)[0]}.{tag}"
    if "/" in name:
        raise QmpError(f"'{tag:.100}' is no name of a snapshot: expected letters, digits and . _ -")
    return located(name)


def save(machine: Machine, tag: str) -> None:
    """Save it, in place of another of that tag. Raises QmpError where that one is not the machine's to replace."""
    path = place(machine, tag)
    with _kept(machine, path, tag) as there:
        snapshot(machine, path, replace=there)


def drop(machine: Machine, tag: str) -> None:
    """Remove it. Raises QmpError where there is none, or it is not the machine's to remove."""
    path = place(machine, tag)
    with _kept(machine, path, tag) as there:
        if not there:
            raise _missing(tag)
        remove(machine.host, path)


@contextmanager
def _kept(machine: Machine, path: Path, tag: str) -> Iterator[bool]:
    """Keep other machines from writing there; True where a snapshot is. Raises QmpError where that is another's."""
    if not (path / MANIFEST).is_file():
        yield False  # what another puts there meanwhile stays
        return
    with Folder(path) as folder:
        try:
            fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _be_ours(machine, folder, tag)
        except BlockingIOError as error:
            raise QmpError(f"Snapshot '{tag:.100}' is being written or removed by another machine") from error
        yield True


def _be_ours(machine: Machine, folder: Folder, tag: str) -> None:
    """Raise QmpError for a snapshot of another machine of this one's given name that runs, or ran beside it."""
    try:
        manifest, _ = read(folder)
    except ConfigError:  # a damaged one is nobody's
        return
    if manifest.machine == machine.name:
        return
    if manifest.made >= given_name(machine)[1] or _runs(manifest.machine):
        why = f"was saved by machine {manifest.machine!r:.200}, which was given the same name: name them apart"
        raise QmpError(f"Snapshot '{tag:.100}' {why}, or take another tag")


def _runs(name: str) -> bool:
    try:
        return any(one.name == name for one in Roster().read()[0])
    except (HostError, OSError):  # then no name has a number either
        return False


def back(machine: Machine, tag: str) -> None:
    """Load it. The machine runs afterwards, or is paused, as before."""
    ran = machine.state is State.RUNNING
    path = place(machine, tag)
    if not (path / MANIFEST).is_file():
        raise _missing(tag)
    manifest = load(machine, path)
    if ran:
        settle(machine, manifest.agent)


def _missing(tag: str) -> QmpError:
    return QmpError(f"Snapshot '{tag:.100}' does not exist in one or more devices")


def _tag(words: list[str], usage: str) -> str:
    if len(words) != 1:
        raise QmpError(f"expected {usage}")
    return words[0]


def savevm(session: Session, words: list[str]) -> str:
    """``savevm [TAG]``: by default a tag of the date."""
    tag = f"vm-{datetime.datetime.now():%Y%m%d%H%M%S}" if not words else _tag(words, "savevm [TAG]")
    save(session.machine, tag)
    return ""


def loadvm(session: Session, words: list[str]) -> str:
    """``loadvm TAG``."""
    back(session.machine, _tag(words, "loadvm TAG"))
    return ""


def delvm(session: Session, words: list[str]) -> str:
    """``delvm TAG``."""
    drop(session.machine, _tag(words, "delvm TAG"))
    return ""


def info_snapshots(session: Session, words: list[str]) -> str:
    """``info snapshots``."""
    name, _ = given_name(session.machine)
    rows = []
    for path in sorted(snapshot_root().glob(f"{escape(name)}.*/{MANIFEST}")):
        try:
            with Folder(path.parent) as folder:
                manifest, _ = read(folder)
                clock = read_state(folder, manifest).clock
            size = sum(length for _, _, length, _ in manifest.ram.chunks)
            date = datetime.datetime.fromtimestamp(manifest.made)
        except (ConfigError, OSError, ValueError, OverflowError):  # a damaged one is not loaded either
            continue
        seconds, part = divmod(clock // 1_000_000, 1000)
        time = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{part:03}"
        tag = path.parent.name.removeprefix(f"{name}.")
        rows.append(f"--        {tag:16} {say_size(size):>8} {date:%Y-%m-%d %H:%M:%S} {time}\n")
    if not rows:
        return "There is no snapshot available.\n"
    head = f"{'ID':9} {'TAG':16} {'VM SIZE':>8} {'DATE':>19} {'VM CLOCK':>12}\n"
    return "".join(["List of snapshots present on all disks:\n", head, *rows])


def _devices(session: Session, vmstate: str | None, devices: list[str]) -> None:
    """Raises QmpError unless *devices* are the machine's disks, all that can be written: they are saved together."""
    known: set[str] = set()
    for one in session.run("query-named-block-nodes", {}):
        if not one["ro"]:
            known.add(one["node-name"])
    if set(devices) != known:
        raise QmpError(f"Parameter 'devices' expects all disks of the machine: {', '.join(sorted(known)) or 'none'}")
    if vmstate is not None and vmstate not in known:
        raise QmpError(f"Parameter 'vmstate' expects one of the devices, not '{vmstate:.100}'")


def snapshot_save(session: Session, job_id: str, tag: str, vmstate: str, devices: list[str]) -> None:
    """Save the machine, as a job."""
    machine = session.machine
    _devices(session, vmstate, devices)
    path = place(machine, tag)
    if (path / MANIFEST).exists():
        raise QmpError(f"Snapshot '{tag}' already exists in one or more devices")
    begin_job(session, job_id, "snapshot-save", lambda: save(machine, tag))


def snapshot_load(session: Session, job_id: str, tag: str, vmstate: str, devices: list[str]) -> None:
    """Load a snapshot, as a job."""
    machine = session.machine
    _devices(session, vmstate, devices)
    place(machine, tag)
    begin_job(session, job_id, "snapshot-load", lambda: back(machine, tag))


def snapshot_delete(session: Session, job_id: str, tag: str, devices: list[str]) -> None:
    """Remove a snapshot, as a job; nothing where there is none."""
    machine = session.machine
    _devices(session, None, devices)
    path = place(machine, tag)
    begin_job(
        session,
        job_id,
        "snapshot-delete",
        lambda: drop(machine, tag) if (path / MANIFEST).is_file() else None,
    )

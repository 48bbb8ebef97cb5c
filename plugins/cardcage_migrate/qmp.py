"""Migration in QMP's words: ``migrate``, ``query-migrate``, ``migrate_cancel`` and its limits, and the event MIGRATION.

As QEMU has them, but that the source ends once the machine runs at the destination, which has to be cardcage's.
"""

from __future__ import annotations

import os
import threading
from typing import Literal, NotRequired, TypedDict
from weakref import WeakKeyDictionary

from attrs import evolve
from cardcage.errors import CardcageError, UsageError
from cardcage.machine import Machine
from cardcage_qmp import QmpError, Session

from cardcage_migrate.outgoing import Limits, Outgoing
from cardcage_migrate.outgoing import migrate_cancel as cancel
from cardcage_migrate.progress import Progress, current
from cardcage_migrate.reach import adopted, connect, parse

__all__ = [
    "MigrationEvent",
    "migrate",
    "migrate_cancel",
    "migrate_set_parameters",
    "query_migrate",
    "query_migrate_parameters",
]

MigrationStatus = Literal["none", "setup", "active", "device", "completed", "failed", "cancelled"]
Ram = TypedDict("Ram", {"transferred": int, "remaining": int, "total": int, "mbps": float, "dirty-sync-count": int})
MigrationInfo = TypedDict(
    "MigrationInfo",
    {
        "status": NotRequired[MigrationStatus],
        "ram": NotRequired[Ram],
        "total-time": NotRequired[int],
        "downtime": NotRequired[int],
        "expected-downtime": NotRequired[int],
        "cpu-throttle-percentage": NotRequired[int],
        "error-desc": NotRequired[str],
    },
)
MigrationParameters = TypedDict("MigrationParameters", {"max-bandwidth": int, "downtime-limit": int})


class MigrationEvent(TypedDict):
    """The migration has another status."""

    status: MigrationStatus


_limits: WeakKeyDictionary[Machine, Limits] = WeakKeyDictionary()


def status_of(progress: Progress) -> MigrationStatus:
    """Its status in QEMU's words: a machine that went one way, and stands still here, is one that has migrated."""
    match progress.status:
        case "setup" | "active" | "completed" | "failed" | "cancelled":
            return progress.status
        case "switching":
            return "device"
        case "given up":
            return "failed" if progress.error else "completed"
    return "none"


def migrate(session: Session, uri: str, detach: bool = True) -> None:
    """Begin to move the machine; ``fd:NAME`` is a descriptor that ``getfd`` has got. It says nothing of the end."""
    machine, control = session.machine, session.control
    last = "none"

    def tell(progress: Progress) -> None:
        nonlocal last
        if (now := status_of(progress)) != last:
            last = now
            if control.migration_events:
                control.emit("MIGRATION", {"status": now})

    name = uri.removeprefix("fd:")
    if uri != name and not name.isdigit():
        if name not in session.fds:
            raise QmpError(f"File descriptor named '{name}' has not been found")
        fd, where = os.dup(session.fds[name]), uri
        peer, one_way = adopted(fd)
    else:
        place = parse(uri)
        place.ask(machine.mediator, machine.label, machine.name, listen=False)
        where = str(place)
        peer, one_way = connect(place)
    try:
        outgoing = Outgoing(machine, where, _limits.get(machine, Limits()), tell)
    except BaseException:
        peer.close()
        raise

    def move() -> None:
        try:
            outgoing.over(lambda: (peer, one_way))
        except CardcageError as error:  # query-migrate says it, too
            machine.log.warning("the migration failed", why=str(error))

    threading.Thread(target=move, name=f"{machine.name}-migrate").start()


def migrate_cancel(session: Session) -> None:
    """Give it up; nothing where there is none."""
    progress = current(session.machine)
    if progress is not None and progress.status in ("setup", "active", "switching"):
        cancel(session.machine)


def query_migrate(session: Session) -> MigrationInfo:
    """How far it is; empty where none was asked for."""
    progress = current(session.machine)
    if progress is None:
        return {}
    found: MigrationInfo = {
        "status": status_of(progress),
        "total-time": round(progress.total * 1000),
        "ram": {
            "transferred": progress.sent,
            "remaining": progress.remaining,
            "total": int(session.machine.config.machine.memory),
            "mbps": progress.rate * 8 / 1e6,
            "dirty-sync-count": progress.passes,
        },
    }
    if progress.status in ("completed", "given up"):
        found["downtime"] = round(progress.downtime * 1000)
    elif progress.status == "active":
        found["expected-downtime"] = round(progress.expected * 1000)
        found["cpu-throttle-percentage"] = progress.throttle
    if progress.error:
        found["error-desc"] = progress.error
    return found


def migrate_set_parameters(
    session: Session, max_bandwidth: int | None = None, downtime_limit: int | None = None
) -> None:
    """Limits of the next migration: bytes a second, 0 for none; milliseconds."""
    limits = _limits.get(session.machine, Limits())
    try:
        if max_bandwidth is not None:
            limits = evolve(limits, bandwidth=max_bandwidth or None)
        if downtime_limit is not None:
            limits = evolve(limits, downtime=downtime_limit / 1000)
    except UsageError as error:
        raise QmpError(str(error)) from error
    _limits[session.machine] = limits


def query_migrate_parameters(session: Session) -> MigrationParameters:
    """Limits of the next migration."""
    limits = _limits.get(session.machine, Limits())
    return {"max-bandwidth": limits.bandwidth or 0, "downtime-limit": round(limits.downtime * 1000)}

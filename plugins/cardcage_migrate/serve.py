"""The machine's end of ``cardcage migrate``: it may be in a jail, so the connection comes along with the command."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, StateError, UsageError
from cardcage_fleet.session import Kind as SessionKind

from cardcage_migrate.hold import migrate_recover, standing
from cardcage_migrate.leaving import migrate_cancel, migrate_start_postcopy
from cardcage_migrate.limits import Limits
from cardcage_migrate.outgoing import Outgoing
from cardcage_migrate.progress import current
from cardcage_migrate.reach import adopted, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage_fleet import Session

    from cardcage_migrate.progress import Progress

__all__ = ["act", "migrate", "resume"]

KEYS = {"bandwidth", "downtime", "timeout", "strategy", "throttle", "patience", "mode"}


def migrate(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Session ``migrate``: ``{uri, limits}`` and the connection, two unless the mode is ``precopy``; frames with JSON
    tell how far it is. Who hangs up cancels it, until it is too late."""
    if arguments.keys() != {"uri", "limits"}:
        raise UsageError("expected uri and limits")
    outgoing = _outgoing(machine, arguments, _teller(session))
    if len(session.fds) != (1 if arguments["limits"].get("mode", "precopy") == "precopy" else 2):
        raise UsageError("expected a descriptor for each connection")

    def hung_up() -> None:
        with suppress(CardcageError):  # it is over, or too late
            outgoing.cancel()

    session.begin()
    session.listen(lambda frame: None, hung_up)
    links = iter(session.fds)
    return outgoing.over(lambda: adopted(os.dup(next(links)))).table()


def _outgoing(machine: Machine, arguments: dict[str, Any], tell: Callable[[Progress], None] | None = None) -> Outgoing:
    """The migration that ``{uri, limits}`` describes, not begun. Raises UsageError, StateError, Denied."""
    uri, told = arguments.get("uri"), arguments.get("limits")
    if not isinstance(uri, str) or not isinstance(told, dict):
        raise UsageError("expected uri and limits")
    if told.keys() - KEYS:
        raise UsageError(f"expected limits out of {', '.join(sorted(KEYS))}")
    try:
        limits = Limits(**told)
    except TypeError as error:
        raise UsageError(f"limits: {error}") from error
    place = parse(uri)
    place.ask(machine.mediator, machine.label, machine.name, listen=False)
    return Outgoing(machine, str(place), limits, tell)


def _teller(session: Session) -> Callable[[Progress], None]:
    """Tells who has the *session* how far it is, while that listens."""
    gone = False

    def tell(progress: Progress) -> None:
        nonlocal gone
        if not gone:
            try:
                session.send(SessionKind.DATA, json.dumps(progress.table()).encode())
            except OSError:  # too late to cancel, or the listener does
                gone = True

    return tell


def resume(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Session ``migrate-resume``: ``{uri}`` and a new connection for the pages that are missing there; frames with JSON
    tell how far it is. Who hangs up stops nothing."""
    uri = arguments.get("uri")
    if not isinstance(uri, str) or arguments.keys() - {"uri"} or len(session.fds) != 1:
        raise UsageError("expected uri, and a descriptor")
    parse(uri).ask(machine.mediator, machine.label, machine.name, listen=False)
    ways = standing(machine)
    if ways is None or ways.resume is None:
        raise StateError(f"{machine.name}: no memory of it is missing anywhere")
    session.begin()
    ways.resume(lambda: adopted(os.dup(session.fds[0]))[0], _teller(session))
    found = current(machine)
    return {} if found is None else found.table()


def act(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Command ``migrate-act``: ``{act: cancel | show | recover | postcopy}``; with ``{act: check, uri, limits}``,
    whatever ``migrate`` would raise before anybody is connected to."""
    match arguments:
        case {"act": "check", "uri": _, "limits": _, **rest} if not rest:
            _outgoing(machine, arguments)
            return {}
        case {"act": "cancel", **rest} if not rest:
            migrate_cancel(machine)
        case {"act": "recover", **rest} if not rest:
            migrate_recover(machine)
        case {"act": "postcopy", **rest} if not rest:
            migrate_start_postcopy(machine)
        case {"act": "show", **rest} if not rest:
            pass
        case _:
            raise UsageError("expected act: cancel, show, recover, postcopy, or check with uri and limits")
    found = current(machine)
    return {} if found is None else found.table()

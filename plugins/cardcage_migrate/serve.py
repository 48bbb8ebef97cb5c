"""The machine's end of ``cardcage migrate``: it may be in a jail, so the connection comes along with the command."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, UsageError
from cardcage_fleet.session import Kind as SessionKind

from cardcage_migrate.hold import migrate_recover
from cardcage_migrate.outgoing import Limits, Outgoing, migrate_cancel
from cardcage_migrate.progress import current
from cardcage_migrate.reach import adopted, parse

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage_fleet import Session

    from cardcage_migrate.progress import Progress

__all__ = ["act", "migrate"]

KEYS = {"bandwidth", "downtime", "timeout", "strategy", "throttle", "patience"}


def migrate(machine: Machine, arguments: dict[str, Any], session: Session) -> dict[str, Any]:
    """Session ``migrate``: ``{uri, limits}`` and the connection; frames with JSON tell how far it is. Who hangs up
    cancels it, until it is too late."""
    uri, told = arguments.get("uri"), arguments.get("limits", {})
    if not isinstance(uri, str) or not isinstance(told, dict) or arguments.keys() - {"uri", "limits"}:
        raise UsageError("expected uri and limits")
    if told.keys() - KEYS or len(session.fds) != 1:
        raise UsageError(f"expected limits out of {', '.join(sorted(KEYS))}, and a descriptor")
    try:
        limits = Limits(**told)
    except TypeError as error:
        raise UsageError(f"limits: {error}") from error
    place = parse(uri)
    place.ask(machine.mediator, machine.label, machine.name, listen=False)
    gone = False

    def tell(progress: Progress) -> None:
        nonlocal gone
        if not gone:
            try:
                session.send(SessionKind.DATA, json.dumps(progress.table()).encode())
            except OSError:  # too late to cancel, or the listener does
                gone = True

    outgoing = Outgoing(machine, str(place), limits, tell)

    def hung_up() -> None:
        with suppress(CardcageError):  # it is over, or too late
            outgoing.cancel()

    session.begin()
    session.listen(lambda frame: None, hung_up)
    return outgoing.over(lambda: adopted(os.dup(session.fds[0]))).table()


def act(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Command ``migrate-act``: ``{act: cancel | show | recover}``."""
    match arguments:
        case {"act": "cancel", **rest} if not rest:
            migrate_cancel(machine)
        case {"act": "recover", **rest} if not rest:
            migrate_recover(machine)
        case {"act": "show", **rest} if not rest:
            pass
        case _:
            raise UsageError("expected act: cancel, show or recover")
    found = current(machine)
    return {} if found is None else found.table()

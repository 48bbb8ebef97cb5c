"""Common ground of both agents of a guest for their callers: the way to the port, and times."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cardcage.errors import StateError, UsageError
from cardcage.machine import State
from cardcage.security import OPERATOR, Act

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["nanoseconds", "reach"]


def reach(machine: Machine, service: str, command: str, missing: str) -> Any:
    """The link that *machine* has as *service*, for a command that security checkers are asked about.

    Raises Denied; StateError with the words *missing* for a machine without it, and for one that was not started.
    """
    facts = {"machine": machine.name, "command": command}
    machine.mediator.check(Act(OPERATOR, machine.label, "management", ("reach",), facts))
    link = machine.services.get(service)
    if link is None:
        raise StateError(f"{machine.name}: no port for {missing}")
    if machine.state is State.BUILT:
        raise StateError(f"{machine.name}: the machine was not started, so that no agent runs")
    return link


def nanoseconds(seconds: float | None) -> int:
    """A time since 1970, by default this host's. Raises UsageError for one that no guest's clock has."""
    if seconds is None:
        return time.time_ns()
    if not 0 <= seconds * 1e9 < 1 << 63:  # no number and infinity are neither
        raise UsageError(f"a time of {seconds} s: expected seconds since 1970, from 0")
    return int(seconds * 1e9)

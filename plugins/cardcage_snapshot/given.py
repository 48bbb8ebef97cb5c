"""Names that machines were given, before numbers were added to them: their snapshots in QEMU's words have these."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from cardcage.host import Host
    from cardcage.machine import Machine

__all__ = ["given_name", "note"]


def _known(host: Host) -> WeakKeyDictionary[Machine, tuple[str, float]]:
    found: WeakKeyDictionary[Machine, tuple[str, float]] = host.share("snapshot:given", WeakKeyDictionary)
    return found


def note(machine: Machine, name: str) -> None:
    """*machine* is being made, and was given *name*; an empty one for whichever name it has."""
    _known(machine.host)[machine] = name, time.time()


def given_name(machine: Machine) -> tuple[str, float]:
    """The name that *machine* was given, else the one that it has; and when it was made, in seconds since 1970."""
    name, made = _known(machine.host)[machine]
    return name or machine.name, made

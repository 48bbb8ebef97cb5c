"""Names that machines were given, before numbers were added to them: their snapshots in QEMU's words have these."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from cardcage_snapshot import GIVEN

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["given_name"]


def given_name(machine: Machine) -> tuple[str, float]:
    """The name that *machine* was given, else the one that it has; and when it was made, in seconds since 1970."""
    known: WeakKeyDictionary[Machine, tuple[str, float]] = machine.host.share(GIVEN, WeakKeyDictionary)
    name, made = known[machine]
    return name or machine.name, made

"""A copy that stands still, and must: nobody lets it go on but who knows that no other copy runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from cardcage.errors import Denied, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage.security import Act

__all__ = ["Hold", "migrate_recover", "recoverable", "standing"]

STOPPED = frozenset({"start", "resume", "reset", "add", "fork"})
"""Acts that are refused of a machine meanwhile."""
_ways: WeakKeyDictionary[Machine, Callable[[], None]] = WeakKeyDictionary()
_lock = threading.Lock()


class Hold:
    """Keeps a machine from going on, as a security checker that comes last, until :meth:`drop`."""

    def __init__(self, machine: Machine, why: str) -> None:
        self._machine, self._why = machine, why
        machine.mediator.checkers = (*machine.mediator.checkers, self)

    def check(self, act: Act, /) -> None:
        """Refuse what would let it go on."""
        if act.tclass == "machine" and STOPPED & set(act.permissions):
            raise Denied(f"{self._machine.name}: {self._why}")

    def drop(self) -> None:
        """Let it be. Idempotent."""
        self._machine.mediator.checkers = tuple(one for one in self._machine.mediator.checkers if one is not self)


def recoverable(machine: Machine, go_on: Callable[[], None] | None) -> None:
    """From now on :func:`migrate_recover` calls *go_on*; None for never."""
    with _lock:
        if go_on is None:
            _ways.pop(machine, None)
        else:
            _ways[machine] = go_on


def standing(machine: Machine) -> bool:
    """True for a copy that stands still until :func:`migrate_recover`."""
    with _lock:
        return machine in _ways


def migrate_recover(self: Machine) -> None:
    """Go on with a machine that stands still because its migration broke off in the moment of the switch.

    Whoever calls it knows that no other copy runs: that is what nobody could tell. A disk is the witness where there is
    one: it is locked, and must be as this copy left it.
    Raises StateError for a machine that no migration left so, HostError where a disk is another's or was changed.
    """
    with _lock:
        found = _ways.get(self)
    if found is None:
        raise StateError(f"{self.name}: no migration of it waits to be recovered")
    found()

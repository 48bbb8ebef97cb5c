"""Admission: the seam of policies that let one more machine start, or refuse it.

``[policy] admission`` names one (or several: all must agree), which a card offers by an
:class:`~cardcage_fleet.AdmissionOffer`. It is asked before any RAM is taken, while the roster
(:mod:`cardcage_fleet.roster`) is locked, so that of two machines that start at once, in whichever processes, the second
sees the first. Without one, a machine may have as much as the host has in all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from cardcage.abilities import require, tell_near_misses
from cardcage.config import specs_of
from cardcage.values import frozen

from cardcage_fleet import AdmissionOffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.config import Place
    from cardcage.machine import Machine

    from cardcage_fleet.hostmemory import MemoryLimit
    from cardcage_fleet.roster import RosterEntry

__all__ = ["Admission", "Room", "Starter", "admissions", "rooms_of"]


@frozen
class Starter:
    """A machine that wants to start.

    Attributes:
        name: its name. size: bytes of the host's memory that it may come to use. priority: ``machine.priority``.
    """

    name: str
    size: int
    priority: int = 0


@frozen
class Room:
    """The host, or a cgroup around this process that has a limit.

    Attributes:
        limit: what it is, what it has, and what of that can be had now.
        machines: how many machines live in it. promised: the sum of their sizes in bytes. The new one is in neither.
    """

    limit: MemoryLimit
    machines: int = 0
    promised: int = 0


class Admission(Protocol):
    """An admission policy card's factory product."""

    def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
        """Return to let the machine start; raise :exc:`~cardcage.errors.ConfigError`, with numbers, to refuse it.

        *rooms*: the host first, then each cgroup with a limit, the nearest first. Asked while others wait: be quick.
        """


def rooms_of(limits: tuple[MemoryLimit, ...], entries: list[RosterEntry]) -> tuple[Room, ...]:
    """The limits, each with the machines that live under it."""
    found = []
    for limit in limits:
        inside = [one for one in entries if not limit.path or f"{one.group}/".startswith(f"{limit.path.rstrip('/')}/")]
        found.append(Room(limit, len(inside), sum(one.promised for one in inside)))
    return tuple(found)


def admissions(machine: Machine) -> list[Callable[[Starter, tuple[Room, ...]], None]]:
    """Return a question for each policy that ``policy.admission`` names; errors get the place of that key."""
    found: list[Callable[[Starter, tuple[Room, ...]], None]] = []
    for spec in specs_of(machine.config.policy.get("admission", []), machine.config.place("policy.admission")):
        offer = machine.host.registry.get(AdmissionOffer, spec.name, file=spec.place.file, key=spec.place.key)
        policy = machine.host.make(AdmissionOffer, spec)
        tell_near_misses(policy, (Admission,), offer.who, machine.log)
        found.append(partial(_ask, require(policy, Admission, offer.who), spec.place, offer.who))
    return found


def _ask(policy: Admission, place: Place, who: str, starter: Starter, rooms: tuple[Room, ...]) -> None:
    place.blamed(who, lambda: policy.admit(starter, rooms))

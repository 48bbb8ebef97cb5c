"""Whether one more machine may start: the seam of admission policies.

``[policy] admission`` names one (or several: all must agree), which a card offers with ``registry.admission``. It is
asked before any RAM is taken, while the roster (``cardcage.roster``) is locked, so that of two machines that start at
once, in whichever processes, the second sees the first. Without one, a machine may have as much as the host has in all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from attrs import frozen

from cardcage.abilities import check_signature
from cardcage.assembly import blamed
from cardcage.config import specs_of

if TYPE_CHECKING:
    from cardcage.hostmemory import MemoryLimit
    from cardcage.machine import Machine
    from cardcage.roster import Entry

__all__ = ["Admission", "Request", "Room", "admissions", "rooms_of"]


@frozen
class Request:
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

    def admit(self, request: Request, rooms: tuple[Room, ...], /) -> None:
        """Return to let the machine start; raise :exc:`~cardcage.errors.ConfigError`, with numbers, to refuse it.

        *rooms*: the host first, then each cgroup with a limit, the nearest first. Asked while others wait: be quick.
        """
        ...


def rooms_of(limits: tuple[MemoryLimit, ...], entries: list[Entry]) -> tuple[Room, ...]:
    """The limits, each with the machines that live under it."""
    found = []
    for limit in limits:
        inside = [one for one in entries if not limit.path or f"{one.group}/".startswith(f"{limit.path.rstrip('/')}/")]
        found.append(Room(limit, len(inside), sum(one.promised for one in inside)))
    return tuple(found)


def admissions(machine: Machine) -> list[Any]:
    """What asks each policy that ``policy.admission`` names; its errors get the place of that key."""
    found, host = [], machine.host
    value = machine.config.policy.get("admission", [])
    for spec in specs_of(value, machine.config.place("policy.admission")):
        place = spec.place
        offer = host.registry.get("admission", spec.name, file=place.file, key=place.key)
        options = host.options(offer, spec.options, file=place.file, key=place.key)
        who = f'admission "{spec.name}" (card {offer.card}, {offer.distribution})'
        factory = offer.load()
        policy = blamed(who, place, partial(factory, options) if options is not None else factory)
        ask = check_signature(policy, "admit", 2, who)
        found.append(lambda *given, ask=ask, who=who, place=place: blamed(who, place, partial(ask, *given)))
    return found

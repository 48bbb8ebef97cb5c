"""Card ``fleet``: the machines of one user on this host, told apart, counted, admitted and commanded.

Other cards add to it: an admission policy by :class:`AdmissionOffer`, a command to running machines by
:class:`ControlOffer` or, for one that is a conversation, :class:`SessionOffer`. ``cardcage stats`` shows what each
machine's memory costs the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names
from cardcage.registry import Offer

if TYPE_CHECKING:
    from cardcage.machine import Machine
    from cardcage.registry import Registry
    from cardcage.security import Needs

    from cardcage_fleet.accounting import MachineStats, stats_of
    from cardcage_fleet.admission import Admission, Room, Starter
    from cardcage_fleet.control import command, find
    from cardcage_fleet.roster import Roster, RosterEntry
    from cardcage_fleet.session import Conversation, Session, converse

__all__ = [
    "Admission",
    "AdmissionOffer",
    "ControlOffer",
    "Conversation",
    "MachineStats",
    "Room",
    "Roster",
    "RosterEntry",
    "Session",
    "SessionOffer",
    "Starter",
    "command",
    "converse",
    "find",
    "stats_of",
]


class AdmissionOffer(Offer):
    """An admission policy: ``factory(options)`` gives an :class:`~cardcage_fleet.admission.Admission`."""

    kind: ClassVar[str] = "admission"

    def protocols(self) -> tuple[Any, ...]:
        from cardcage_fleet.admission import Admission

        return (Admission,)


class ControlOffer(Offer):
    """A command to running machines (:mod:`cardcage_fleet.control`): ``factory(machine, arguments) -> dict``.

    Both are tables of JSON. It runs on a thread of its own, without the machine's lock.
    """

    kind: ClassVar[str] = "control"


class SessionOffer(Offer):
    """A command that goes on as a conversation: ``factory(machine, arguments, session) -> dict``.

    *session* is a :class:`~cardcage_fleet.session.Session`. It runs on a thread of its own, without the machine's lock;
    what it raises, and the table that it returns, is what the caller hears last.
    """

    kind: ClassVar[str] = "session"


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command ``stats``; read ``policy.admission``."""
    registry.policy_key("admission", help="the admission policies that a machine must be let in by")
    registry.command(
        "stats",
        "cardcage_fleet.stats:run",
        configure="cardcage_fleet.stats:configure",
        help="show what the memory of each running machine costs the host",
    )


@hookimpl
def cardcage_admit(machine: Machine) -> None:
    """Ask the admission policies, and put the machine on the roster."""
    from cardcage_fleet.membership import admit

    admit(machine)


@hookimpl(trylast=True)  # a memory policy may move the process to another cgroup first
def cardcage_built(machine: Machine) -> None:
    """Say on the roster where the machine's RAM is, and open its control socket."""
    from cardcage_fleet.membership import publish

    publish(machine)


@hookimpl
def cardcage_forking(machine: Machine) -> None:
    """Ask the admission policies about one machine more."""
    from cardcage_fleet.membership import forking

    forking(machine)


@hookimpl(tryfirst=True)  # the others find the name that the copy has
def cardcage_forked(machine: Machine) -> None:
    """Put the copy on the roster, under a name of its own, and open its control socket."""
    from cardcage_fleet.membership import forked

    forked(machine)


@hookimpl
def cardcage_needs(machine: Machine) -> Needs:
    """The machine's folder on the roster, with its entry and sockets."""
    from cardcage_fleet.membership import needs

    return needs(machine)


_names: Any = lazy_names(
    "cardcage_fleet",
    accounting="MachineStats stats_of",
    admission="Admission Room Starter",
    control="command find",
    roster="Roster RosterEntry",
    session="Conversation Session converse",
)
__getattr__ = _names

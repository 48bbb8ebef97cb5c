"""A ledger of this user's machines, in whichever process: limits refuse a machine by it, ``cardcage ledger`` shows it.

``[policy] ledger`` names limits: the card's own ``most``, and whatever other cards add as a :class:`LimitOffer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.registry import Offer, Registry
from cardcage.security import Needs

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["LimitOffer"]


class LimitOffer(Offer):
    """A limit: ``factory(options)`` gives a :class:`ledger_card.limits.Limit`."""

    kind: ClassVar[str] = "limit"


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.policy_key("ledger", help="the limits that a machine must keep within")
    registry.add(LimitOffer("most", "ledger_card.limits:Most", options="ledger_card.limits:MostOptions"))
    registry.command(
        "ledger", "ledger_card.command:run", configure="ledger_card.command:configure", help="list this user's machines"
    )


@hookimpl(trylast=True)  # whom another card refuses was never in the ledger
def cardcage_admit(machine: Machine) -> None:
    from ledger_card.limits import admit

    admit(machine)


@hookimpl
def cardcage_forked(machine: Machine) -> None:
    """A copy of a machine is in the ledger, too."""
    from ledger_card.limits import forked

    forked(machine)


@hookimpl
def cardcage_needs(machine: Machine) -> Needs:
    """The ledger is written when the machine's state changes."""
    from ledger_card.ledger import Ledger

    return Needs(write=(str(Ledger().folder),))

"""Overcommit: who may start (``strict``, ``ratio``, ``none``), and what happens when memory runs short (``edge``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage_fleet import AdmissionOffer
from cardcage_memory_policies import PolicyOffer

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the admission policies and the policy of the edge."""
    where = "cardcage_overcommit.admission"
    registry.add(
        AdmissionOffer(
            "strict",
            f"{where}:Strict",
            options=f"{where}:StrictOptions",
            help="all machines fit into the memory of the host and of each enclosing cgroup",
        )
    )
    registry.add(
        AdmissionOffer(
            "ratio",
            f"{where}:Ratio",
            options=f"{where}:RatioOptions",
            help="like strict, times a ratio, while enough memory is free",
        )
    )
    registry.add(
        AdmissionOffer("none", f"{where}:Open", help="every machine may start; promised memory is only counted")
    )
    registry.add(
        PolicyOffer(
            "edge",
            "cardcage_overcommit.edge:Edge",
            options="cardcage_overcommit.edge:EdgeOptions",
            shared=True,
            help="when memory runs short: the order in which machines give and are ended; a soft limit",
        )
    )

"""Overcommit: who may start (``strict``, ``ratio``, ``none``), and what happens when memory runs short (``edge``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the admission policies and the policy of the edge."""
    where = "cardcage_overcommit.admission"
    registry.admission(
        "strict",
        f"{where}:Strict",
        options=f"{where}:StrictOptions",
        help="all machines fit into what the host, and each cgroup around them, has",
    )
    registry.admission(
        "ratio",
        f"{where}:Ratio",
        options=f"{where}:RatioOptions",
        help="machines may be promised more than there is, by a ratio, while enough is free now",
    )
    registry.admission("none", f"{where}:Open", help="each machine may start; what is promised is only counted")
    registry.policy(
        "edge",
        "cardcage_overcommit.edge:Edge",
        options="cardcage_overcommit.edge:EdgeOptions",
        shared=True,
        help="when memory runs short: who gives first, who is ended first, and a soft limit for the process",
    )

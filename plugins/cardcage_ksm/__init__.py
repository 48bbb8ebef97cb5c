"""Kernel same-page merging: a policy that lets ksmd merge guests' equal pages, and a lease on ksmd's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the policy ``ksm``, the command ``ksm``, and a line for ``doctor``."""
    registry.policy(
        "ksm",
        "cardcage_ksm.policy:KsmPolicy",
        options="cardcage_ksm.policy:KsmOptions",
        help="ksmd merges equal pages of guests; it is started and tuned where that is permitted, and put back",
    )
    registry.command(
        "ksm",
        "cardcage_ksm.tool:run",
        configure="cardcage_ksm.tool:configure",
        help="what ksmd does, who has a lease on it, and put its settings back",
    )
    registry.check("KSM lease", "cardcage_ksm.tool:check", help="whether ksmd has settings of a machine that is gone")

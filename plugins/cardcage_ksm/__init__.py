"""Kernel same-page merging: a policy that lets ksmd merge guests' equal pages, and a lease on ksmd's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage_memory_policies import PolicyOffer

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the policy ``ksm``, the command ``ksm``, and a line for ``doctor``."""
    registry.add(
        PolicyOffer(
            "ksm",
            "cardcage_ksm.policy:KsmPolicy",
            options="cardcage_ksm.policy:KsmOptions",
            help="merges equal pages of guests through ksmd, started and tuned where permitted, and restored",
        )
    )
    registry.command(
        "ksm",
        "cardcage_ksm.tool:run",
        configure="cardcage_ksm.tool:configure",
        help="show the state of ksmd and its lease, or restore its settings",
    )
    registry.doctor("KSM", "cardcage_ksm.tool:check_kernel", help="the kernel merges pages")
    registry.doctor("KSM lease", "cardcage_ksm.tool:check", help="settings of ksmd that a machine left behind")

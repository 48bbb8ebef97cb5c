"""Mandatory access control between a machine's own objects, in the style of SELinux: ``cardcage policy``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command ``policy``."""
    registry.command(
        "policy",
        "cardcage_selinux.tool:run",
        configure="cardcage_selinux.tool:configure",
        help="check, explain, diff or query a security policy, or write rules from a log",
    )

"""``cardcage stats``: what each machine's memory costs, now, over time, and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command."""
    registry.command(
        "stats",
        "cardcage_stats.command:run",
        configure="cardcage_stats.command:configure",
        help="show what the memory of each running machine costs the host",
    )

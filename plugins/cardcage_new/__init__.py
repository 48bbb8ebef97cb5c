"""Card ``new``: writes the distribution that a card begins as, ready to install, run and test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the command ``new``."""
    registry.command(
        "new",
        "cardcage_new.command:run",
        configure="cardcage_new.command:configure",
        help="write the distribution of a new card: cardcage new card NAME",
    )

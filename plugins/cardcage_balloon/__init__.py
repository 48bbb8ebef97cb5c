"""The balloon policy: memory flows from idle guests to busy ones, within what the host has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the policy ``balloon``."""
    registry.policy(
        "balloon",
        "cardcage_balloon.policy:BalloonPolicy",
        options="cardcage_balloon.policy:BalloonOptions",
        shared=True,
        help="targets from guest statistics and host pressure; machines may add up to more than the host has",
    )

"""The balloon policy: memory flows from idle guests to busy guests, within what the host has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage_memory_policies import PolicyOffer

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the policy ``balloon``."""
    registry.add(
        PolicyOffer(
            "balloon",
            "cardcage_balloon.policy:BalloonPolicy",
            options="cardcage_balloon.policy:BalloonOptions",
            shared=True,
            help="balloon targets from guest statistics and host pressure; machines may together exceed the host",
        )
    )
